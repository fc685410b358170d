-- KEYS: keys, with the type of each in ARGV
-- ARGV: a suffix for the names of keys that are moved aside, type, type, …
-- Mends keys of a wrong type: a key that should be a stream is renamed aside, for nothing that may
-- hold messages is deleted; any other is deleted.
-- Returns the names of the keys that were wrong.
local wrong = {}
for i, key in ipairs(KEYS) do
  local found = redis.call('TYPE', key)['ok']
  if found ~= 'none' and found ~= ARGV[i + 1] then
    if ARGV[i + 1] == 'stream' then
      redis.call('RENAME', key, key .. ARGV[1])
    else
      redis.call('DEL', key)
    end
    wrong[#wrong + 1] = key
  end
end
return wrong
