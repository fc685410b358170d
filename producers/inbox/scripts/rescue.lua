#!lua flags=allow-oom
-- KEYS: inbox, lease
-- ARGV: lease id, lease in ms, drain message
-- Sends a drain if messages wait and no drain of this inbox is queued or running.
-- Returns 1 if it did.
if redis.call('XLEN', KEYS[1]) == 0 then
  redis.call('GET', KEYS[2]) -- an error if it has a wrong type, which a producer may not mend
  redis.call('SREM', WAITING, organization_of(KEYS[1]))
  return 0
end
redis.call('SADD', WAITING, organization_of(KEYS[1]))
if held_lease(KEYS[2]) then
  return 0
end
send_drain(KEYS[2], ARGV[1], ARGV[2], ARGV[3])
return 1
