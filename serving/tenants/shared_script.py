"""What Redis does in one go: it counts what it is told, and decides on all requests that are asked for.

Names, with the prefix of the settings:

- ``PREFIX:epoch``: which counters are in use. They are new with each process of Redis and whenever they were emptied,
  so that a gateway knows when it has to tell what it let through before.
- ``PREFIX:workers``: sorted set of the workers and when they were last heard of, in milliseconds.
- ``PREFIX:EPOCH:{KEY}:minute``: a hash. ``r`` and ``t`` are the requests and tokens of the last minute, ``r1700000000``
  and ``t1700000000`` those of a second; ``first`` is the oldest that may be there, ``newest`` the last.
- ``PREFIX:EPOCH:{KEY}:running``: a hash of the workers that have requests of the key: ``COUNT:MILLISECONDS``.

Everything expires: after as long as it can matter.
"""

from serving.tenants.windows import SPAN

ALIVE = 4.0  # seconds that a worker counts after it was last heard of
PER_REQUEST = 8  # integers of the answer

# ARGV: epoch, worker, 1 to be counted as alive; then for each key, whose two names are in KEYS: its requests that run
# here; its limits of concurrency, requests and tokens, -1 for none; the number of changes, and each as second,
# requests, tokens; the number of requests, and the tokens of each.
# The answer: milliseconds of the clock, workers alive (0: not asked); then for each request PER_REQUEST integers:
# granted, second, requests, tokens, milliseconds to wait for requests, for tokens, requests that run, milliseconds
# until nothing is left. Only the clock where the epoch is another.
DECIDE = (
    f"local SPAN, ALIVE = {SPAN}, {ALIVE * 1000:.0f}"
    + """
local clock = redis.call('TIME')
local second = tonumber(clock[1])
local now = second * 1000 + math.floor(tonumber(clock[2]) / 1000)
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return {now} end
local worker, workers, at = ARGV[2], 0, 4
if ARGV[3] == '1' then
  redis.call('ZADD', KEYS[2], now, worker)
  redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now - ALIVE)
  redis.call('ZREMRANGEBYSCORE', KEYS[2], now + ALIVE, '+inf')
  workers = redis.call('ZCARD', KEYS[2])
  redis.call('EXPIRE', KEYS[2], SPAN + 1)
  redis.call('EXPIRE', KEYS[1], 3600)
end
local answer = {now, workers}

local function next_number()
  at = at + 1
  return tonumber(ARGV[at - 1])
end

for k = 3, #KEYS, 2 do
  local minute, running = KEYS[k], KEYS[k + 1]
  local here, most, requests_limit, tokens_limit = next_number(), next_number(), next_number(), next_number()
  local counted = requests_limit >= 0 or tokens_limit >= 0
  local first, newest, requests, tokens, kept = second, 0, 0, 0, -1
  local added = {r = {}, t = {}}

  local function add(name, s, count)
    if count ~= 0 then added[name][s] = (added[name][s] or 0) + count end
  end

  local function wait(name, excess)
    if excess <= 0 then return 0 end
    for s = first, second do
      excess = excess - (tonumber(redis.call('HGET', minute, name .. s)) or 0) - (added[name][s] or 0)
      if excess <= 0 then return math.max((s + SPAN) * 1000 - now, 1) end
    end
    return SPAN * 1000
  end

  if counted then
    local found = redis.call('HMGET', minute, 'first', 'newest', 'r', 't')
    if found[1] then
      first, newest, requests, tokens = tonumber(found[1]), tonumber(found[2]), tonumber(found[3]), tonumber(found[4])
      kept = newest
    end
    if newest > second + 1 then
      -- The clock was set back: all of it counts as of now, or the key would wait until the clock is there again.
      redis.call('DEL', minute)
      add('r', second, requests)
      add('t', second, tokens)
      first, newest, kept = second, second, -1
    end
    local old = {}
    for s = first, math.min(second - SPAN, first + 2 * SPAN) do
      old[#old + 1] = 'r' .. s
      old[#old + 1] = 't' .. s
    end
    if second - newest >= SPAN then
      redis.call('DEL', minute)
      first, requests, tokens, kept = second, 0, 0, -1
    elseif #old > 0 then
      local gone = redis.call('HMGET', minute, unpack(old))
      for i = 1, #gone, 2 do
        requests, tokens = requests - (tonumber(gone[i]) or 0), tokens - (tonumber(gone[i + 1]) or 0)
      end
      redis.call('HDEL', minute, unpack(old))
      first = second - SPAN + 1
    end
  end

  for _ = 1, next_number() do
    local s, r, t = math.min(next_number(), second), next_number(), next_number()
    if counted and s > second - SPAN then
      -- What was lost meanwhile cannot be taken back.
      if r < 0 then r = math.max(r, -(tonumber(redis.call('HGET', minute, 'r' .. s)) or 0) - (added.r[s] or 0)) end
      if t < 0 then t = math.max(t, -(tonumber(redis.call('HGET', minute, 't' .. s)) or 0) - (added.t[s] or 0)) end
      add('r', s, r)
      add('t', s, t)
      requests, tokens = requests + r, tokens + t
      first, newest = math.min(first, s), math.max(newest, s)
    end
  end

  local all = here
  if most >= 0 then
    local found = redis.call('HGETALL', running)
    for i = 1, #found, 2 do
      if found[i] ~= worker then
        local count, seen = string.match(found[i + 1], '(%d+):(%d+)')
        if math.abs(tonumber(seen) - now) < ALIVE then
          all = all + tonumber(count)
        else
          redis.call('HDEL', running, found[i])
        end
      end
    end
  end

  for _ = 1, next_number() do
    local need = next_number()
    local requests_wait, tokens_wait = 0, 0
    if requests_limit >= 0 then requests_wait = wait('r', requests + 1 - requests_limit) end
    if tokens_limit >= 0 then tokens_wait = wait('t', tokens + need - tokens_limit) end
    local full = most >= 0 and all >= most
    local granted = requests_wait == 0 and tokens_wait == 0 and not full
    if granted then
      here, all, newest = here + 1, all + 1, second
      if requests_limit >= 0 then
        requests = requests + 1
        add('r', second, 1)
      end
      if tokens_limit >= 0 then
        tokens = tokens + need
        add('t', second, need)
      end
    end
    local reset = math.max((newest + SPAN) * 1000 - now, 0)
    local values = {granted and 1 or 0, second, requests, tokens, requests_wait, tokens_wait, all, reset}
    for i = 1, #values do answer[#answer + 1] = values[i] end
  end

  if counted then
    for name, counts in pairs(added) do
      for s, count in pairs(counts) do redis.call('HINCRBY', minute, name .. s, count) end
    end
    redis.call('HSET', minute, 'first', first, 'newest', newest, 'r', requests, 't', tokens)
    if newest ~= kept then redis.call('EXPIRE', minute, SPAN + 1) end -- not for those that are refused
  end
  if most >= 0 then
    if here > 0 then
      redis.call('HSET', running, worker, here .. ':' .. now)
      redis.call('PEXPIRE', running, 2 * ALIVE)
    else
      redis.call('HDEL', running, worker)
    end
  end
end
return answer
"""
)

# KEYS: the epoch's name. ARGV: the id of Redis' process; a name for a new epoch; 1 where the caller has let requests
# through under an older one; milliseconds in which others may tell what they have.
# The answer: the epoch, milliseconds of the clock, milliseconds until everyone has told.
BEGIN = """
local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
local epoch = redis.call('GET', KEYS[1])
local process, settled = string.match(epoch or '', '^(.+)%.(%d+)%.[^.]+$')
if process ~= ARGV[1] then
  settled = ARGV[3] == '1' and now + ARGV[4] or 0
  epoch = ARGV[1] .. '.' .. string.format('%d', settled) .. '.' .. ARGV[2]
  redis.call('SET', KEYS[1], epoch, 'EX', 3600)
end
return {epoch, now, math.min(math.max(tonumber(settled) - now, 0), tonumber(ARGV[4]))}
"""
