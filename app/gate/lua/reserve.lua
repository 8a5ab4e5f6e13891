-- Let a call in, or say which limit keeps it out; nothing is written then. '' among the limits: none.
-- ARGV: 1 the call's id ('': it is over already, and what it costs is spent at once), 2 ms after which it is given up,
--       3 requests, 4 most requests a minute, 5 tokens, 6 most tokens a minute, 7 most calls at one time,
--       8 cost, 9 budget, 10 its unit, 11 its period
-- Returns {limit that keeps it out ('': none), ms until it would not (-1: not known),
--          requests left, ms until all are, tokens left, ms until all are, budget left}
local at = now()
lapse(at)

-- One rate as GCRA (ITU-T I.371): a bucket that holds a minute's worth, and how full it would be afterwards, in ms.
local function rate(name, cost, most)
  if not most then
    return {every = 0, due = 0, cost = 0}
  end
  local every = MINUTE / most
  -- What is more than a minute's worth waits for a full bucket; the rest is a debt when it is settled.
  return {every = every, due = math.max(0, counter(name) - at), cost = math.min(cost, most) * every, most = most}
end

local requests = rate('requests', tonumber(ARGV[3]), tonumber(ARGV[4]))
local tokens = rate('tokens', tonumber(ARGV[5]), tonumber(ARGV[6]))
local cost, budget = tonumber(ARGV[8]), tonumber(ARGV[9])
local spent, reserved, ends, name = 0, 0, -1, ''
if budget then
  name, ends = period(at, ARGV[11])
  name = ARGV[10] .. ' ' .. name
  spent = redis.call('HGET', KEYS[1], 'period') == name and counter('spent') or 0
  reserved = counter('reserved')
end

-- Rounding of stored times must keep nobody out.
local function wait(bucket)
  local over = bucket.cost > 0 and bucket.due + bucket.cost - MINUTE or 0
  return over > 0.5 and over or 0
end

local kept_out, wait_ms = '', 0
if ARGV[1] ~= '' and tonumber(ARGV[7]) and redis.call('ZCARD', KEYS[2]) >= tonumber(ARGV[7]) then
  kept_out, wait_ms = 'concurrency', -1
elseif wait(requests) > 0 then
  kept_out, wait_ms = 'requests', wait(requests)
elseif wait(tokens) > 0 then
  kept_out, wait_ms = 'tokens', wait(tokens)
elseif budget and cost > 0 and spent + reserved + cost > budget then
  kept_out, wait_ms = 'budget', ends < 0 and -1 or ends - at
end

if kept_out == '' then
  for field, bucket in pairs({requests = requests, tokens = tokens}) do
    if bucket.cost > 0 then
      bucket.due = bucket.due + bucket.cost
      put(field, at + bucket.due)
    end
  end
  if budget and cost > 0 then
    redis.call('HSET', KEYS[1], 'period', name)
    if ARGV[1] == '' then
      spent = spent + cost
    else
      reserved = reserved + cost
    end
    put('spent', spent)
    put('reserved', reserved)
  end
  if ARGV[1] ~= '' then
    redis.call('ZADD', KEYS[2], math.floor(at + ARGV[2]), ARGV[1])
    redis.call('HSET', KEYS[3], ARGV[1], budget and cost or 0)
  end
end

local function left(bucket)
  return bucket.most and math.max(0, math.floor((MINUTE - bucket.due) / bucket.every + 0.001)) or 0
end

return {kept_out, math.ceil(wait_ms), left(requests), math.ceil(requests.due), left(tokens), math.ceil(tokens.due),
  budget and budget - spent - reserved or 0}
