#!lua flags=allow-oom
-- KEYS: inbox, lease
-- ARGV: run id, lease in ms, most messages, most bytes
-- Renews the lease and returns the head of the inbox: {{id, {field, value, …}}, …}, at least one message
-- if there is any. Returns false if the lease is another's. A lease that ran out and that nobody took is
-- taken again: this drain is the one that is on the way.
local held = redis.call('GET', KEYS[2])
if held and held ~= 'running ' .. ARGV[1] then
  return false
end
redis.call('SET', KEYS[2], 'running ' .. ARGV[1], 'PX', ARGV[2])
local entries, bytes, from = {}, 0, '-'
for _ = 1, tonumber(ARGV[3]) do
  local entry = redis.call('XRANGE', KEYS[1], from, '+', 'COUNT', 1)[1]
  if not entry then
    break
  end
  for _, value in ipairs(entry[2]) do
    bytes = bytes + #value
  end
  if #entries > 0 and bytes > tonumber(ARGV[4]) then
    break
  end
  entries[#entries + 1] = entry
  from = '(' .. entry[1]
end
return entries
