#!lua flags=allow-oom
-- KEYS: dead letters, failing
-- ARGV: how many are kept, entry id, field, value, field, value, …
-- Keeps a message for an operator, once: what follows may fail and be repeated.
if redis.call('HGET', KEYS[2], 'kept') ~= ARGV[2] then
  redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[1], '*', unpack(ARGV, 3))
  redis.call('HSET', KEYS[2], 'kept', ARGV[2])
end
return 1
