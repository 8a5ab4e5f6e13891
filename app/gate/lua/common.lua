-- What all scripts of this folder begin with. All of them have these
-- KEYS: 1 counters of a key (hash), 2 when each of its running calls is given up for dead (sorted set, ms),
--       3 what each of them reserved of the budget (hash), 4 those that were given up, for an hour (sorted set)
-- Counters: `requests`, `tokens`: when each rate's bucket is full again, ms (GCRA's theoretical arrival time);
--           `period`, `spent`, `reserved`: of the budget.
-- The only clock is this server's.

local MINUTE, HOUR, DAY = 60000, 3600000, 86400000

local function now()
  local time = redis.call('TIME')
  return time[1] * 1000 + time[2] / 1000
end

local function counter(name)
  return tonumber(redis.call('HGET', KEYS[1], name) or '0')
end

-- A number as Lua would write it is cut to 14 digits.
local function put(name, value)
  redis.call('HSET', KEYS[1], name, string.format('%.3f', value))
end

local function let_go(id)
  local amount = redis.call('HGET', KEYS[3], id)
  redis.call('ZREM', KEYS[2], id)
  redis.call('HDEL', KEYS[3], id)
  if tonumber(amount) > 0 then
    put('reserved', counter('reserved') - amount)
  end
end

-- Give up the calls whose process says nothing of them any more.
local function lapse(at)
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', math.floor(at))) do
    let_go(id)
    redis.call('ZADD', KEYS[4], math.floor(at + HOUR), id)
  end
  redis.call('ZREMRANGEBYSCORE', KEYS[4], '-inf', math.floor(at))
end

-- Days before a month begins, from 1970 on (Howard Hinnant, "chrono-compatible low-level date algorithms").
local function days_before(year, month)
  if month <= 2 then year = year - 1 end
  local of_era = year % 400
  local of_year = math.floor((153 * ((month + 9) % 12) + 2) / 5)
  return (year - of_era) / 400 * 146097 + of_era * 365 + math.floor(of_era / 4) - math.floor(of_era / 100) + of_year
    - 719468
end

local function month_of(day)
  day = day + 719468
  local of_era = day % 146097
  local year = math.floor((of_era - math.floor(of_era / 1460) + math.floor(of_era / 36524) - math.floor(of_era / 146096))
    / 365)
  local of_year = of_era - (365 * year + math.floor(year / 4) - math.floor(year / 100))
  local month = (math.floor((5 * of_year + 2) / 153) + 2) % 12 + 1
  return year + (day - of_era) / 146097 * 400 + (month <= 2 and 1 or 0), month
end

-- The name of a budget's period at this time, and its end in ms (-1: none).
local function period(at, kind)
  if kind == 'hour' or kind == 'day' then
    local length = kind == 'hour' and HOUR or DAY
    local number = math.floor(at / length)
    return kind .. ' ' .. number, (number + 1) * length
  elseif kind == 'month' then
    local year, month = month_of(math.floor(at / DAY))
    local next_year, next_month = year + math.floor(month / 12), month % 12 + 1
    return string.format('month %d-%d', year, month), days_before(next_year, next_month) * DAY
  end
  return kind, -1
end
