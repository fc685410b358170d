-- A lease that nobody will free is free: one without a time to live, or with more than 60 s left.
local function held_lease(key)
  local held = redis.call('GET', key)
  if held then
    local left = redis.call('PTTL', key)
    if left < 0 or left > 60000 then
      redis.call('DEL', key)
      return false
    end
  end
  return held
end
