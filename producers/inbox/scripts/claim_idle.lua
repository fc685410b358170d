-- KEYS: inbox, lease
-- ARGV: lease id, lease in ms
-- For an inbox that may be waiting with nobody on the way: takes the lease if it is free and there is work.
-- Returns 1 if a drain is to be sent.
if redis.call('XLEN', KEYS[1]) == 0 then
  return 0
end
if redis.call('SET', KEYS[2], 'queued ' .. ARGV[1], 'NX', 'PX', ARGV[2]) then
  return 1
end
return 0
