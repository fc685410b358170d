-- KEYS: keys, with the type of each in ARGV
-- ARGV: a suffix for the names of keys that are moved aside, type, type, …
-- Mends keys of a wrong type: a key that should be a stream is renamed aside, for nothing that may
-- hold messages is deleted; any other is deleted. A stream of type `log` is renamed aside also if
-- it has reached its last id; an inbox is not: its messages are still to be applied.
-- Returns the names of the keys that were wrong.
local LAST_ID = '18446744073709551615-18446744073709551615'

local function is_full(key)
  local about = redis.call('XINFO', 'STREAM', key)
  for i = 1, #about, 2 do
    if about[i] == 'last-generated-id' then
      return about[i + 1] == LAST_ID
    end
  end
end

local wrong = {}
for i, key in ipairs(KEYS) do
  local is_log, found = ARGV[i + 1] == 'log', redis.call('TYPE', key)['ok']
  local wanted = is_log and 'stream' or ARGV[i + 1]
  if found ~= 'none' and (found ~= wanted or is_log and is_full(key)) then
    if wanted == 'stream' then
      redis.call('RENAME', key, key .. ARGV[1])
    else
      redis.call('DEL', key)
    end
    wrong[#wrong + 1] = key
  end
end
return wrong
