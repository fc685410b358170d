#!lua flags=allow-oom
-- KEYS: lease
-- ARGV: run id, lease in ms
-- The drain goes to the end of the Celery queue and keeps the lease while it waits there.
-- Returns 1 if its message is to be sent, 0 if the lease is another's.
local queued, held = 'queued ' .. ARGV[1], held_lease(KEYS[1])
if held and held ~= 'running ' .. ARGV[1] and held ~= queued then
  return 0
end
redis.call('SET', KEYS[1], queued, 'PX', ARGV[2])
return 1
