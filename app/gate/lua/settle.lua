-- A call is over: what it reserved is given back, and what it took is charged. Said twice it counts once.
-- ARGV: 1 the call's id, 2 tokens it reserved, 3 tokens it took, 4 most tokens a minute ('': no limit),
--       5 cost, 6 unit of the budget ('': none), 7 its period
-- Returns 1; 0 where the call was settled before.
local at = now()
lapse(at)

if redis.call('HEXISTS', KEYS[3], ARGV[1]) == 1 then
  let_go(ARGV[1])
elseif redis.call('ZREM', KEYS[4], ARGV[1]) == 0 then
  return 0
end

local most = tonumber(ARGV[4])
local more = tonumber(ARGV[3]) - (most and math.min(tonumber(ARGV[2]), most) or 0)
if most and more ~= 0 then
  local full_at = counter('tokens')
  put('tokens', (more > 0 and math.max(full_at, at) or full_at) + more * MINUTE / most)
end

if ARGV[6] ~= '' and tonumber(ARGV[5]) > 0 then
  local name = ARGV[6] .. ' ' .. period(at, ARGV[7])
  local spent = redis.call('HGET', KEYS[1], 'period') == name and counter('spent') or 0
  redis.call('HSET', KEYS[1], 'period', name)
  put('spent', spent + ARGV[5])
end
return 1
