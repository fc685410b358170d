#!lua flags=allow-oom
-- KEYS: inbox, lease
-- ARGV: run id, lease in ms, max messages, max bytes, how many more messages of the Celery queue
--       are wanted, one of how many that wait there
-- A drain begins, or goes on after a failure: it takes the lease unless another drain is running.
-- It takes more messages from a long queue only: so each of many workers finds some.
-- Returns {1 if this run is to look for lost drains, these messages, the head of the inbox
-- (_read_head.lua) or false if another drain is running}.
local rescue, held = claim_rescue(ARGV[1]), held_lease(KEYS[2])
if held and held ~= 'running ' .. ARGV[1] and string.sub(held, 1, 7) ~= 'queued ' then
  return {rescue, {}, false}
end
redis.call('SADD', WAITING, organization_of(KEYS[1]))
local entries = read_head(KEYS[1], KEYS[2], ARGV[1], ARGV[2], ARGV[3], ARGV[4], '')
local others = tonumber(ARGV[5])
if others > 0 then
  others = math.min(others, math.floor(redis.call('LLEN', QUEUE) / ARGV[6]))
end
return {rescue, others > 0 and redis.call('RPOP', QUEUE, others) or {}, entries}
