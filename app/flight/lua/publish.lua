-- Say something in a flight's live stream, and go on leading; or say the last thing, and stop leading.
-- KEYS: 1 lease, 2 current uid, 3 riders, 4 live stream
-- ARGV: 1 token, 2 uid, 3 lease ms, 4 how long stream and uid outlive this, ms, 5 entry ('' only goes on leading),
--       6 '1' where the entry is the last
-- Returns 1, or 0 where the lease is not this token's any more: then nothing was written.
if redis.call('GET', KEYS[1]) ~= ARGV[1] .. ' ' .. ARGV[2] then
  return 0
end
if ARGV[5] ~= '' then
  redis.call('XADD', KEYS[4], '*', 'e', ARGV[5])
end
redis.call('PEXPIRE', KEYS[4], ARGV[4])
if ARGV[6] == '1' then
  redis.call('DEL', KEYS[1], KEYS[2], KEYS[3])
else
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
  redis.call('PEXPIRE', KEYS[2], ARGV[4])
end
return 1
