#!lua flags=allow-oom
-- KEYS: inbox, lease, dead letters, failing, position
-- ARGV: run id, lease in ms, max messages, max bytes, the last message in the run's hands or
--       nothing, how many dead letters are kept, the cursor of the last change event or nothing;
--       number of ids, id, id, …; number of publications, channel, payload, …; number of dead
--       letters, and for each the number of fields and values, field, value, …
-- Publishes what became of messages and removes them from the inbox. Their batches are committed,
-- so this needs no lease. What can fail comes before what can't be undone: a key of a wrong type,
-- and a channel that this user may not publish to.
-- Returns what comes next (_read_head.lua), or false if the lease is another's. A lease that
-- expired and that nobody took is taken again: this drain is the one at work.
local held = held_lease(KEYS[2])
redis.call('XLEN', KEYS[1])
redis.call('HLEN', KEYS[4])
redis.call('SADD', WAITING, organization_of(KEYS[1]))
local at = 8
local function next_argument()
  at = at + 1
  return ARGV[at - 1]
end
local ids, publications, kept = {}, {}, {}
local function give_up(failure)
  if #kept > 0 then
    redis.call('XDEL', KEYS[3], unpack(kept))
  end
  return failure
end
for i = 1, tonumber(next_argument()) do
  ids[i] = next_argument()
end
for i = 1, tonumber(next_argument()) do
  publications[i] = {next_argument(), next_argument()}
end
for _ = 1, tonumber(next_argument()) do
  local fields = {}
  for i = 1, tonumber(next_argument()) do
    fields[i] = next_argument()
  end
  local id = redis.pcall('XADD', KEYS[3], 'MAXLEN', '~', ARGV[6], '*', unpack(fields))
  if type(id) == 'table' then
    return give_up(id)
  end
  kept[#kept + 1] = id
end
for _, publication in ipairs(publications) do
  local answer = redis.pcall('PUBLISH', publication[1], publication[2])
  if type(answer) == 'table' then
    return give_up(answer)
  end
end
for first = 1, #ids, 1000 do
  redis.call('XDEL', KEYS[1], unpack(ids, first, math.min(first + 999, #ids)))
end
redis.call('DEL', KEYS[4])
if ARGV[7] ~= '' then
  redis.call('SET', KEYS[5], ARGV[7])
end
if held and held ~= 'running ' .. ARGV[1] then
  return false
end
return read_head(KEYS[1], KEYS[2], ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5])
