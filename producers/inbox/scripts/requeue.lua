#!lua flags=allow-oom
-- KEYS: inbox, lease
-- ARGV: run id, lease in ms, drain message
-- The drain goes to the end of the Celery queue and keeps the lease while it waits there.
-- Returns 1, or 0 if the lease is another's.
local held = held_lease(KEYS[2])
if held == 'queued ' .. ARGV[1] then
  return 1 -- a repeated call
end
if held and held ~= 'running ' .. ARGV[1] then
  return 0
end
if redis.call('XLEN', KEYS[1]) > 0 then
  redis.call('SADD', WAITING, organization_of(KEYS[1]))
end
send_drain(KEYS[2], ARGV[1], ARGV[2], ARGV[3])
return 1
