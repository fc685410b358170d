#!lua flags=allow-oom
-- ARGV: an id
-- What `task_tags.wake` begins with, and each drain (acquire.lua).
-- Returns 1 if the caller is to look for lost drains.
return claim_rescue(ARGV[1])
