#!lua flags=allow-oom
-- KEYS: dead letters
-- ARGV: how many are kept, field, value, field, value, …
-- Keeps a message for an operator.
redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[1], '*', unpack(ARGV, 2))
return 1
