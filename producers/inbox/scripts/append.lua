-- KEYS: inbox, lease
-- ARGV: limit, lease id, lease in ms, token, message, message, …
-- Appends messages up to the limit, in order, and takes the lease if it is free. The time of
-- acceptance is a field, in ms since the epoch: ids give the order alone, and never run back.
-- Returns {how many were appended, 1 if a drain is to be sent}. A client that repeats the call after
-- a lost answer finds the lease queued under its own id, and sends the drain.
local held = held_lease(KEYS[2])
local free = tonumber(ARGV[1]) - redis.call('XLEN', KEYS[1])
local appended = math.max(0, math.min(#ARGV - 4, free))
local time = redis.call('TIME')
local accepted_at = time[1] .. string.format('%03d', math.floor(time[2] / 1000))
for i = 5, 4 + appended do
  redis.call('XADD', KEYS[1], '*', 'message', ARGV[i], 'token', ARGV[4], 'accepted_at', accepted_at)
end
local queued = 'queued ' .. ARGV[2]
if appended == 0 or (held and held ~= queued) then
  return {appended, 0}
end
redis.call('SET', KEYS[2], queued, 'PX', ARGV[3])
return {appended, 1}
