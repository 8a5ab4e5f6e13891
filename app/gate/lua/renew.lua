-- These calls still run.
-- ARGV: 1 ms after which they are given up, 2... their ids
-- Returns how many had been given up already.
local at = now()
lapse(at)
local gone = 0
for index = 2, #ARGV do
  if redis.call('ZSCORE', KEYS[2], ARGV[index]) then
    redis.call('ZADD', KEYS[2], math.floor(at + ARGV[1]), ARGV[index])
  else
    gone = gone + 1
  end
end
return gone
