#!lua flags=allow-oom
-- KEYS: lease
-- ARGV: run id, lease in ms
-- A drain begins: it makes the lease its own unless another drain is running. Returns 1 if it may go on.
local mine, held = 'running ' .. ARGV[1], redis.call('GET', KEYS[1])
if held and held ~= mine and string.sub(held, 1, 7) ~= 'queued ' then
  return 0
end
redis.call('SET', KEYS[1], mine, 'PX', ARGV[2])
return 1
