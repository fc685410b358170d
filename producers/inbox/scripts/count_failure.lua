#!lua flags=allow-oom
-- KEYS: failing
-- ARGV: entry id, error, the kind of failure as a suffix of two fields
-- Counts a failure of the message at the head of the inbox, across processes, each kind apart.
-- Returns {how many there were, seconds since the first}.
local now = tonumber(redis.call('TIME')[1])
local FIRST, ATTEMPTS = 'first' .. ARGV[3], 'attempts' .. ARGV[3]
if redis.call('HGET', KEYS[1], 'entry') ~= ARGV[1] then
  redis.call('HDEL', KEYS[1], 'first', 'attempts', 'first_slow', 'attempts_slow')
end
local found = redis.call('HMGET', KEYS[1], FIRST, ATTEMPTS)
local first, attempts = tonumber(found[1]), tonumber(found[2])
if not first or not attempts then
  first, attempts = now, 0
end
first = math.min(first, now) -- if the clock was ahead, it would take as long again
attempts = attempts + 1
redis.call('HSET', KEYS[1], 'entry', ARGV[1], FIRST, first, ATTEMPTS, attempts, 'error', ARGV[2])
return {attempts, now - first}
