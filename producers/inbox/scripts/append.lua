-- KEYS: inbox, lease
-- ARGV: limit, lease id, lease in ms, token, drain message, message, message, …
-- Appends messages up to the limit, in order, unless the inbox has 256 MiB. If the lease is free,
-- the drain message is sent in the same step. The time of acceptance is a field, in ms since the
-- epoch: ids give the order alone, and never run back. What can fail comes before the messages: a
-- drain that finds nothing does no harm.
-- Returns how many were appended.
local MAX_BYTES = 256 * 1024 * 1024

-- Returns whether a stream has too many bytes, by the size of its first nodes. A user may lack the
-- right to ask.
local function is_too_large(stream)
  local bytes = redis.pcall('MEMORY', 'USAGE', stream, 'SAMPLES', 5)
  return type(bytes) == 'number' and bytes >= MAX_BYTES
end

local held, waiting = held_lease(KEYS[2]), redis.call('XLEN', KEYS[1])
local appended = math.max(0, math.min(#ARGV - 5, tonumber(ARGV[1]) - waiting))
if appended == 0 or waiting >= 100 and is_too_large(KEYS[1]) then
  return 0
end
if waiting == 0 then
  redis.call('SADD', WAITING, organization_of(KEYS[1]))
end
if not held then
  send_drain(KEYS[2], ARGV[2], ARGV[3], ARGV[5])
end
local time = redis.call('TIME')
local accepted_at = time[1] .. string.format('%03d', math.floor(time[2] / 1000))
for i = 6, 5 + appended do
  redis.call('XADD', KEYS[1], '*', 'message', ARGV[i], 'token', ARGV[4], 'accepted_at', accepted_at)
end
return appended
