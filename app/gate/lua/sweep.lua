-- Forget the counters of a key if nothing of them matters any more: its buckets are full, its budget's period is over.
-- ARGV: 1 unit of the budget ('': none), 2 its period
-- Returns 1 where they are gone.
local at = now()
lapse(at)
local name = ARGV[1] ~= '' and ARGV[1] .. ' ' .. period(at, ARGV[2])
local is_spent = name and redis.call('HGET', KEYS[1], 'period') == name and counter('spent') > 0
local is_busy = redis.call('ZCARD', KEYS[2]) + redis.call('ZCARD', KEYS[4]) > 0
if is_busy or is_spent or counter('requests') > at or counter('tokens') > at then
  return 0
end
redis.call('DEL', KEYS[1])
return 1
