#!lua flags=allow-oom
-- KEYS: inbox, lease
-- ARGV: run id, lease in ms, max messages, max bytes
-- A drain begins, or goes on after a failure: it takes the lease unless another drain is running.
-- Returns {1 if this run is to look for lost drains, the head of the inbox (_read_head.lua)}; there
-- is no second if there is nothing to do.
local rescue, held = claim_rescue(ARGV[1]), held_lease(KEYS[2])
if held and held ~= 'running ' .. ARGV[1] and string.sub(held, 1, 7) ~= 'queued ' then
  return {rescue}
end
redis.call('SADD', WAITING, organization_of(KEYS[1]))
return {rescue, read_head(KEYS[1], KEYS[2], ARGV[1], ARGV[2], ARGV[3], ARGV[4], '')}
