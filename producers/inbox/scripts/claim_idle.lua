-- KEYS: inbox, lease
-- ARGV: lease id, lease in ms
-- Takes the lease if it is free and messages wait: no drain of this inbox is queued or running.
-- Returns 1 if a drain is to be sent.
if redis.call('XLEN', KEYS[1]) == 0 then
  return 0
end
held_lease(KEYS[2])
if redis.call('SET', KEYS[2], 'queued ' .. ARGV[1], 'NX', 'PX', ARGV[2]) then
  return 1
end
return 0
