-- Stop leading a flight that others may carry on (this server stops): the uid stays for who takes over.
-- KEYS: 1 lease
-- ARGV: 1 token, 2 uid
-- Returns 1, or 0 where the lease was not this token's.
if redis.call('GET', KEYS[1]) ~= ARGV[1] .. ' ' .. ARGV[2] then
  return 0
end
redis.call('DEL', KEYS[1])
return 1
