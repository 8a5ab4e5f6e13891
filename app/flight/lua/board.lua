-- Lead a flight, or be counted among those who follow it.
-- KEYS: 1 lease, 2 current uid, 3 riders
-- ARGV: 1 token, 2 a uid for a flight that is new, 3 lease ms, 4 how long the uid outlives its leader, ms,
--       5 this process, 6 how long a follower is believed, ms
-- Returns {1, uid, inherited}: this token leads; inherited is 1 where the flight was begun by another.
--         {0, uid, 0}: somebody else leads it, and this process is noted as a follower.
local held = redis.call('GET', KEYS[1])
if held then
  local time = redis.call('TIME')
  local until_ms = time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[6]
  redis.call('ZADD', KEYS[3], until_ms, ARGV[5])
  redis.call('PEXPIRE', KEYS[3], ARGV[4])
  return {0, string.match(held, ' (.+)$'), 0}
end
local uid = redis.call('GET', KEYS[2])
local inherited = uid and 1 or 0
uid = uid or ARGV[2]
redis.call('SET', KEYS[1], ARGV[1] .. ' ' .. uid, 'PX', ARGV[3])
redis.call('SET', KEYS[2], uid, 'PX', ARGV[4])
redis.call('ZREM', KEYS[3], ARGV[5])
return {1, uid, inherited}
