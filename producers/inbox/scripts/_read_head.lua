-- The end of `acquire` and `ack_and_publish`: this run goes on with what is at the head of the
-- inbox and renews its lease; if the inbox is empty, the run is over and the lease is freed.
-- Reading and freeing are one step with respect to an append. A run that has messages in its hands
-- reads what is behind the last of them, and keeps its lease.
-- Returns {{id, {field, value, …}}, …}, from the head at least one message if there is any.
local function read_head(inbox, lease, run, lease_ms, max_messages, max_bytes, after)
  local entries, bytes, from = {}, 0, after == '' and '-' or '(' .. after
  for _ = 1, tonumber(max_messages) do
    if from == '(18446744073709551615-18446744073709551615' then
      break -- there is no id behind the last one
    end
    local entry = redis.call('XRANGE', inbox, from, '+', 'COUNT', 1)[1]
    if not entry then
      break
    end
    for _, value in ipairs(entry[2]) do
      bytes = bytes + #value
    end
    if #entries > 0 and bytes > tonumber(max_bytes) then
      break
    end
    entries[#entries + 1] = entry
    from = '(' .. entry[1]
  end
  if #entries == 0 and after == '' then
    redis.call('SREM', WAITING, organization_of(inbox))
    redis.call('DEL', lease)
  else
    redis.call('SET', lease, 'running ' .. run, 'PX', lease_ms)
  end
  return entries
end
