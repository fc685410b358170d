#!lua flags=allow-oom
-- What `take` and `remove` end with: this run goes on with what is at the head of the inbox, and keeps its lease
-- for another while; if the inbox is empty, the run is over, and the lease is free. To look and to free is one
-- step with whatever an append does. Returns {{id, {field, value, …}}, …}, one message at least if there is any.
local function go_on(inbox, lease, run, lease_ms, most, most_bytes)
  local entries, bytes, from = {}, 0, '-'
  for _ = 1, tonumber(most) do
    local entry = redis.call('XRANGE', inbox, from, '+', 'COUNT', 1)[1]
    if not entry then
      break
    end
    for _, value in ipairs(entry[2]) do
      bytes = bytes + #value
    end
    if #entries > 0 and bytes > tonumber(most_bytes) then
      break
    end
    entries[#entries + 1] = entry
    from = '(' .. entry[1]
  end
  if #entries == 0 then
    redis.call('DEL', lease)
  else
    redis.call('SET', lease, 'running ' .. run, 'PX', lease_ms)
  end
  return entries
end
