-- KEYS: lease
-- ARGV: lease id
-- The drain could not be sent: the next append, or the wake task, may send one.
if redis.call('GET', KEYS[1]) == 'queued ' .. ARGV[1] then
  redis.call('DEL', KEYS[1])
end
return 1
