-- Note what an idempotency key was first used for.
-- KEYS: 1 claim
-- ARGV: 1 fingerprint of the call, 2 how long it is remembered, ms
-- Returns the fingerprint of its first use, which is this call's where it is new.
local first = redis.call('GET', KEYS[1])
if first then
  return first
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return ARGV[1]
