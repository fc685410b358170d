#!lua flags=allow-oom
-- KEYS: failing
-- ARGV: entry id, error
-- Counts a failure of the message at the head of the inbox, across processes.
-- Returns {how many there were, seconds since the first}.
local now = tonumber(redis.call('TIME')[1])
if redis.call('HGET', KEYS[1], 'entry') ~= ARGV[1] then
  redis.call('DEL', KEYS[1])
  redis.call('HSET', KEYS[1], 'entry', ARGV[1], 'first', now)
end
if tonumber(redis.call('HGET', KEYS[1], 'first')) > now then
  redis.call('HSET', KEYS[1], 'first', now) -- the clock was ahead: it would take as long again
end
redis.call('HSET', KEYS[1], 'error', ARGV[2])
local attempts = redis.call('HINCRBY', KEYS[1], 'attempts', 1)
return {attempts, now - tonumber(redis.call('HGET', KEYS[1], 'first'))}
