-- Stop leading a flight that nobody follows any more.
-- KEYS: 1 lease, 2 current uid, 3 riders, 4 live stream
-- ARGV: 1 token, 2 uid
-- Returns 1 where other processes follow: the lease is kept. 0 where nobody does: all of the flight is gone.
if redis.call('GET', KEYS[1]) ~= ARGV[1] .. ' ' .. ARGV[2] then
  return 0
end
local time = redis.call('TIME')
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', time[1] * 1000 + math.floor(time[2] / 1000))
if redis.call('ZCARD', KEYS[3]) > 0 then
  return 1
end
redis.call('DEL', KEYS[1], KEYS[2], KEYS[3], KEYS[4])
return 0
