-- The end of `acquire` and `ack_and_publish`: this run goes on with what is at the head of the
-- inbox and renews its lease; if the inbox is empty, the run is over and the lease is freed.
-- Reading and freeing are one step with respect to an append. A run that has messages in its hands
-- reads what is behind the last of them, and keeps its lease.
-- Of a value that is larger than any message that is read (MAX_READABLE_BYTES in
-- producers/contract/encoding.py), only the beginning is returned.
-- Returns {{id, {field, value, …}}, …}, from the head at least one message if there is any.
local MAX_VALUE = 4 * 1024 * 1024

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
    for i, value in ipairs(entry[2]) do
      bytes = bytes + #value
      if #value > MAX_VALUE then
        entry[2][i] = string.sub(value, 1, MAX_VALUE + 1)
      end
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
