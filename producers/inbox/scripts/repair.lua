-- KEYS: lease, failing, inbox, dead letters
-- ARGV: a suffix for the names of keys that are moved aside
-- Mends keys of a wrong type: a lease or a count is deleted, a stream's key is renamed aside, for
-- nothing that may hold messages is deleted.
-- Returns the names of the keys that were wrong.
local wanted, wrong = {'string', 'hash', 'stream', 'stream'}, {}
for i, key in ipairs(KEYS) do
  local found = redis.call('TYPE', key)['ok']
  if found ~= 'none' and found ~= wanted[i] then
    if i <= 2 then
      redis.call('DEL', key)
    else
      redis.call('RENAME', key, key .. ARGV[1])
    end
    wrong[#wrong + 1] = key
  end
end
return wrong
