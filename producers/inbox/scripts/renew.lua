#!lua flags=allow-oom
-- KEYS: lease
-- ARGV: run id, lease in ms
-- A run keeps its lease while PostgreSQL works for it.
-- Returns 1, or 0 if the lease is another's.
if held_lease(KEYS[1]) ~= 'running ' .. ARGV[1] then
  return 0
end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
