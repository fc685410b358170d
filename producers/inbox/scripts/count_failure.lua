#!lua flags=allow-oom
-- KEYS: failing
-- ARGV: entry id, error
-- Counts a failure of the message at the head of the inbox, across processes.
-- Returns {how many there were, seconds since the first}.
local now = tonumber(redis.call('TIME')[1])
local found = redis.call('HMGET', KEYS[1], 'entry', 'first', 'attempts')
local first, attempts = tonumber(found[2]), tonumber(found[3])
if found[1] ~= ARGV[1] or not first or not attempts then
  first, attempts = now, 0
end
first = math.min(first, now) -- if the clock was ahead, it would take as long again
attempts = attempts + 1
redis.call(
  'HSET', KEYS[1], 'entry', ARGV[1], 'first', first, 'attempts', attempts, 'error', ARGV[2]
)
return {attempts, now - first}
