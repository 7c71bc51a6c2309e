"""What happens in Redis in one step each. A script begins with a command that an overloaded Redis refuses, or with one that
it never refuses: once a script has written, Redis refuses none of its commands any more (scriptVerifyOOM), so none is half done.

KEYS[1] is the prefix of all keys: their names come out of the data, so a cluster cannot run these scripts.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

_COMMON = r"""
local P, SEP = KEYS[1], '\6\22'
local UNACKED, INDEX, LEASE, HELD = P..'unacked', P..'unacked_index', P..'amqtask.lease', P..'amqtask.held'
local TRIES, QUEUES, DELAY, DELAYED = P..'amqtask.tries', P..'amqtask.queues', P..'amqtask.delay', P..'amqtask.delayed'
local STEPS = {'0', '3', '6', '9'}

local function seconds()
  local t = redis.call('TIME')
  return tonumber(t[1]) + tonumber(t[2]) / 1000000
end

local function score(number) return string.format('%.3f', number) end

local function list(queue, step)
  if step == '0' then return P..queue end
  return P..queue..SEP..step
end

local function split(text, count)
  local parts, from = {}, 1
  for i = 1, count - 1 do
    local at = string.find(text, SEP, from, true)
    if not at then return parts end
    parts[i] = string.sub(text, from, at - 1)
    from = at + #SEP
  end
  parts[count] = string.sub(text, from)
  return parts
end
"""

_ROUTE = r"""
local function there(queue)
  if redis.call('HEXISTS', QUEUES, queue) == 1 then return true end
  return redis.call('EXISTS', P..'_kombu.binding.'..queue, list(queue, '0'), list(queue, '3'), list(queue, '6'),
                    list(queue, '9')) > 0
end

local function words(text)
  local found = {}
  for word in string.gmatch(text..'.', '([^.]*)%.') do found[#found + 1] = word end
  return found
end

local function fits(pattern, key, i, j)
  if i > #pattern then return j > #key end
  if pattern[i] == '#' then
    for after = j, #key + 1 do
      if fits(pattern, key, i + 1, after) then return true end
    end
    return false
  end
  if j > #key then return false end
  return (pattern[i] == '*' or pattern[i] == key[j]) and fits(pattern, key, i + 1, j + 1)
end

-- The queues, or nil when there is no such exchange.
local function route(exchange, key)
  if exchange == '' then
    if there(key) then return {key} end
    return {}
  end
  local members = redis.call('SMEMBERS', P..'_kombu.binding.'..exchange)
  if #members == 0 and redis.call('HEXISTS', P..'amqtask.exchanges', exchange) == 0 then return nil end
  local found, seen, wanted = {}, {}, words(key)
  for _, member in ipairs(members) do
    local parts = split(member, 3)
    local queue = parts[3]
    if queue and not seen[queue] then
      local is_topic = parts[2] ~= ''
      if (is_topic and fits(words(parts[1]), wanted, 1, 1)) or (not is_topic and parts[1] == key) then
        seen[queue] = true
        found[#found + 1] = queue
      end
    end
  end
  return found
end
"""

_RELEASE = r"""
-- Whether it was held.
local function forget(tag)
  redis.call('ZREM', INDEX, tag)
  redis.call('ZREM', LEASE, tag)
  redis.call('HDEL', HELD, tag)
  return redis.call('HDEL', UNACKED, tag)
end

-- queue, step and message of a tag that is still held.
local function held(tag)
  local entry, place = redis.call('HGET', UNACKED, tag), redis.call('HGET', HELD, tag)
  if not entry or not place then return nil end
  local parts = split(place, 2)
  local tail = ',"",'..cjson.encode(parts[1])..']'
  return parts[1], parts[2], string.sub(entry, 2, -(#tail + 1))
end

local function give_back(tag, failures)
  local queue, step, message = held(tag)
  forget(tag)
  if not queue then return 0 end
  if failures >= 0 then
    redis.call('HINCRBY', TRIES, redis.sha1hex(message), failures)
    redis.call('EXPIRE', TRIES, 604800) -- of messages that others have taken since
  end
  redis.call('RPUSH', list(queue, step), message)
  return 1
end

-- What consumers hold that no longer renew their leases goes back to its queues.
local function sweep(most)
  local back = 0
  for _, tag in ipairs(redis.call('ZRANGEBYSCORE', LEASE, '-inf', score(seconds()), 'LIMIT', 0, most)) do
    back = back + give_back(tag, 1)
  end
  return back
end
"""

# ARGV: beginning of fanout channels, exchange, routing key, step, message, and, for a consumer that may publish only while it
# has a queue alone, that queue and itself. How many queues have the message; -1: there is no such exchange; -2: a queue is full;
# -3: the consumer has its queue no longer.
_PUBLISH = r"""
if ARGV[6] and redis.call('GET', P..'amqtask.active.'..ARGV[6]) ~= ARGV[7] then return -3 end
if redis.call('HGET', P..'amqtask.exchanges', ARGV[2]) == 'fanout' then
  local channel = P..ARGV[1]..ARGV[2]
  if ARGV[3] ~= '' then channel = channel..'/'..ARGV[3] end
  return redis.call('PUBLISH', channel, ARGV[5])
end
local queues = route(ARGV[2], ARGV[3])
if not queues then return -1 end
for _, queue in ipairs(queues) do
  local most = redis.call('HGET', P..'amqtask.limits', queue)
  if most then
    local size = 0
    for _, step in ipairs(STEPS) do size = size + redis.call('LLEN', list(queue, step)) end
    if size >= tonumber(most) then return -2 end
  end
end
for _, queue in ipairs(queues) do redis.call('LPUSH', list(queue, ARGV[4]), ARGV[5]) end
return #queues
"""

# ARGV: id, due time (ms), exchange, routing key, step, message.
_POSTPONE = r"""
redis.call('HSET', DELAYED, ARGV[1], ARGV[3]..SEP..ARGV[4]..SEP..ARGV[5]..SEP..ARGV[6])
redis.call('ZADD', DELAY, ARGV[2], ARGV[1])
return 1
"""

# ARGV: how many at most. How many have left, when the next is due (ms from now, -1: none waits), how many have no queue.
_RELEASE_DUE = r"""
local now = math.floor(seconds() * 1000)
local left, homeless = 0, 0
for _, id in ipairs(redis.call('ZRANGEBYSCORE', DELAY, '-inf', now, 'LIMIT', 0, ARGV[1])) do
  local entry = redis.call('HGET', DELAYED, id)
  redis.call('ZREM', DELAY, id)
  redis.call('HDEL', DELAYED, id)
  if entry then
    local parts = split(entry, 4)
    local queues = parts[1] == '' and {parts[2]} or route(parts[1], parts[2])
    if queues and #queues > 0 then
      for _, queue in ipairs(queues) do redis.call('LPUSH', list(queue, parts[3]), parts[4]) end
      left = left + 1
    else
      redis.call('HSET', DELAYED, id, entry)
      redis.call('ZADD', DELAY, now + 10000, id)
      homeless = homeless + 1
    end
  end
end
local first = redis.call('ZRANGE', DELAY, 0, 0, 'WITHSCORES')
local wait = -1
if first[2] then wait = math.max(0, math.ceil(tonumber(first[2]) - now)) end
return {left, wait, homeless}
"""

# ARGV: consumer, number of its next tag, seconds of the lease ('': no acks), how many at most, then for each queue its name,
# how many it may have, and '1' if only one consumer may have it. First whether more may be there, then for each message its
# queue, itself and its failures ('': never delivered). Asked again with the same number, it answers the same.
_RESERVE = r"""
local out, number, most = {0}, tonumber(ARGV[2]), tonumber(ARGV[4])
local acks = ARGV[3] ~= ''
local function failures(message)
  return redis.call('HGET', TRIES, redis.sha1hex(message)) or ''
end
if acks then
  while true do
    local queue, _, message = held(ARGV[1]..':'..number)
    if not queue then break end
    out[#out + 1], out[#out + 2], out[#out + 3] = queue, message, failures(message)
    number = number + 1
  end
  if #out > 1 then
    out[1] = 1
    return out
  end
end
local now, rooms = seconds(), {}
for at = 5, #ARGV, 3 do
  rooms[at] = tonumber(ARGV[at + 1])
  if ARGV[at + 2] == '1' and rooms[at] > 0 then
    local key = P..'amqtask.active.'..ARGV[at]
    if redis.call('SET', key, ARGV[1], 'NX', 'PX', math.floor(tonumber(ARGV[3]) * 1000)) then
      sweep(100) -- what the one before held, whose time is over as well
    elseif redis.call('GET', key) ~= ARGV[1] then
      rooms[at] = 0
    end
  end
end
local has_tries = redis.call('EXISTS', TRIES) == 1
for _, step in ipairs(STEPS) do
  local progress = true
  while progress do
    progress = false
    for at = 5, #ARGV, 3 do
      if rooms[at] > 0 then
        if most == 0 then
          out[1] = 1
          return out
        end
        local queue = ARGV[at]
        local message = redis.call('RPOP', list(queue, step))
        if message then
          progress = true
          rooms[at], most = rooms[at] - 1, most - 1
          if acks then
            local tag = ARGV[1]..':'..number
            redis.call('HSET', UNACKED, tag, '['..message..',"",'..cjson.encode(queue)..']')
            redis.call('ZADD', INDEX, score(now), tag)
            redis.call('ZADD', LEASE, score(now + tonumber(ARGV[3])), tag)
            redis.call('HSET', HELD, tag, queue..SEP..step)
            number = number + 1
          end
          out[#out + 1], out[#out + 2], out[#out + 3] = queue, message, has_tries and failures(message) or ''
        end
      end
    end
  end
end
return out
"""

# ARGV: consumer, then numbers of its tags. How many were still held.
_ACK = r"""
local done, has_tries = 0, redis.call('EXISTS', TRIES) == 1
for i = 2, #ARGV do
  local tag = ARGV[1]..':'..ARGV[i]
  if has_tries then
    local queue, _, message = held(tag)
    if queue then redis.call('HDEL', TRIES, redis.sha1hex(message)) end
  end
  done = done + forget(tag)
end
return done
"""

# ARGV: consumer, then numbers of its tags, each with 1 for a failed delivery, 0 for one that is no failure, -1 for none at all.
_GIVE_BACK = r"""
local done = 0
for i = 2, #ARGV, 2 do done = done + give_back(ARGV[1]..':'..ARGV[i], tonumber(ARGV[i + 1])) end
return done
"""

# ARGV: tag, exchange, routing key, step, message, and the queue for it when the exchange has none.
_BURY = r"""
local queue, _, message = held(ARGV[1])
if not queue then return 0 end
redis.call('HDEL', TRIES, redis.sha1hex(message))
forget(ARGV[1])
local queues = route(ARGV[2], ARGV[3])
if not queues or #queues == 0 then queues = {ARGV[2] == '' and ARGV[3] or ARGV[6]} end
for _, target in ipairs(queues) do redis.call('LPUSH', list(target, ARGV[4]), ARGV[5]) end
return 1
"""

# ARGV: consumer, seconds of the lease, how many queues it has alone, these, then numbers of its tags. The numbers that are no
# longer held, and the queues that another consumer has.
_RENEW = r"""
local now, lease, alone = seconds(), tonumber(ARGV[2]), tonumber(ARGV[3])
local lost = {{}, {}}
for i = 4, 3 + alone do
  local key = P..'amqtask.active.'..ARGV[i]
  redis.call('SET', key, ARGV[1], 'NX', 'PX', math.floor(lease * 1000))
  if redis.call('GET', key) == ARGV[1] then
    redis.call('PEXPIRE', key, math.floor(lease * 1000))
  else
    lost[2][#lost[2] + 1] = ARGV[i]
  end
end
for i = 4 + alone, #ARGV do
  local tag = ARGV[1]..':'..ARGV[i]
  if redis.call('HEXISTS', UNACKED, tag) == 1 then
    redis.call('ZADD', LEASE, 'XX', score(now + lease), tag)
    redis.call('ZADD', INDEX, 'XX', score(now), tag)
  else
    lost[1][#lost[1] + 1] = ARGV[i]
  end
end
return lost
"""

# ARGV: how many at most. How many have gone back.
_SWEEP = r"""
return sweep(ARGV[1])
"""

# ARGV: consumer, then queues that it had alone.
_LEAVE = r"""
for i = 2, #ARGV do
  local key = P..'amqtask.active.'..ARGV[i]
  if redis.call('GET', key) == ARGV[1] then redis.call('DEL', key) end
end
return 1
"""

# ARGV: queue. How many messages it had.
_DELETE = r"""
local count = 0
for _, step in ipairs(STEPS) do
  count = count + redis.call('LLEN', list(ARGV[1], step))
  redis.call('DEL', list(ARGV[1], step))
end
redis.call('HDEL', QUEUES, ARGV[1])
redis.call('HDEL', P..'amqtask.limits', ARGV[1])
for i = 2, #ARGV do
  for _, table in ipairs({'_kombu.binding.', '_kombu.binding_permanent.'}) do
    for _, member in ipairs(redis.call('SMEMBERS', P..table..ARGV[i])) do
      if split(member, 3)[3] == ARGV[1] then redis.call('SREM', P..table..ARGV[i], member) end
    end
  end
end
return count
"""


@dataclass(frozen=True)
class Script:
    """A script, and the hash by which Redis knows it."""

    source: str

    @cached_property
    def sha(self) -> str:
        """The hash of EVALSHA."""
        return hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()


PUBLISH = Script(_COMMON + _ROUTE + _PUBLISH)
POSTPONE = Script(_COMMON + _POSTPONE)
RELEASE_DUE = Script(_COMMON + _ROUTE + _RELEASE_DUE)
RESERVE = Script(_COMMON + _RELEASE + _RESERVE)
ACK = Script(_COMMON + _RELEASE + _ACK)
GIVE_BACK = Script(_COMMON + _RELEASE + _GIVE_BACK)
BURY = Script(_COMMON + _ROUTE + _RELEASE + _BURY)
RENEW = Script(_COMMON + _RENEW)
SWEEP = Script(_COMMON + _RELEASE + _SWEEP)
LEAVE = Script(_COMMON + _LEAVE)
DELETE = Script(_COMMON + _DELETE)
ALL = (PUBLISH, POSTPONE, RELEASE_DUE, RESERVE, ACK, GIVE_BACK, BURY, RENEW, SWEEP, LEAVE, DELETE)
