-- The keys that all organizations share. Scripts name them here and not in KEYS, so that a confined
-- user needs no more of them than the commands of its scripts.
local QUEUE, WAITING, WAKE = 'task-tags', 'task-tags:waiting', 'task-tags:wake'

local function organization_of(inbox)
  return string.match(inbox, '{(.-)}')
end

-- Puts a drain message on the Celery queue; the lease says so.
local function send_drain(lease, lease_id, lease_ms, message)
  redis.call('LPUSH', QUEUE, message)
  redis.call('SET', lease, 'queued ' .. lease_id, 'PX', lease_ms)
end

-- Returns 1 if the caller is to look for inboxes whose drain was lost: once in five seconds, by
-- this server's clock alone.
local function claim_rescue(id)
  local left = redis.call('PTTL', WAKE)
  if left >= 0 and left <= 5000 then
    return 0
  end
  redis.call('SET', WAKE, id, 'PX', 5000)
  return 1
end
