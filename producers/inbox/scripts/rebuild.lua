-- KEYS: inbox, a free name
-- Copies the messages of an inbox, in their order, to a stream whose ids start again, which then
-- takes its place. A drain at work applies what it has read once more, and finds it answered.
-- Returns how many messages there are.
local from, copied = '-', 0
redis.call('DEL', KEYS[2])
while true do
  local entries = redis.call('XRANGE', KEYS[1], from, '+', 'COUNT', 100)
  if #entries == 0 then
    break
  end
  for _, entry in ipairs(entries) do
    redis.call('XADD', KEYS[2], '*', unpack(entry[2]))
    copied = copied + 1
    from = '(' .. entry[1]
  end
  if from == '(18446744073709551615-18446744073709551615' then
    break -- there is no id behind the last one
  end
end
redis.call('DEL', KEYS[1])
if copied > 0 then
  redis.call('RENAME', KEYS[2], KEYS[1])
end
return copied
