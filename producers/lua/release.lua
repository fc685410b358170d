#!lua flags=allow-oom
-- KEYS: inbox, lease
-- ARGV: run id
-- The drain that found the inbox empty gives the lease back, but only if the inbox is still empty.
-- Returns 1 if this drain is over (released, or the lease is another's), 0 if it has to go on.
local held = redis.call('GET', KEYS[2])
if held and held ~= 'running ' .. ARGV[1] then
  return 1
end
if redis.call('XLEN', KEYS[1]) > 0 then
  return 0
end
redis.call('DEL', KEYS[2])
return 1
