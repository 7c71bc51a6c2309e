"""What happens in Redis in one step each. A script begins with a command that an overloaded Redis refuses, or with one that
it never refuses: once a script has written, Redis refuses none of its commands any more (scriptVerifyOOM), so none is half done.

KEYS[1] is the prefix of all keys: their names come out of the data. In a cluster the prefix is a hash tag, so that all of them
are in one slot, on one master.

Anybody can make another kind of key where a queue's list would be. Nothing is taken from elsewhere before it is sure that there
is a place for it: a script that fails half way takes back nothing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

_COMMON = r"""
local P, SEP = KEYS[1], '\6\22'
local UNACKED, INDEX, LEASE, HELD = P..'unacked', P..'unacked_index', P..'amqtask.lease', P..'amqtask.held'
local TRIES, QUEUES, DELAY, DELAYED = P..'amqtask.tries', P..'amqtask.queues', P..'amqtask.delay', P..'amqtask.delayed'
local OWNED, SWEPT = P..'amqtask.owned', P..'amqtask.swept'
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

-- After this Redis refuses nothing for its full memory (scriptVerifyOOM): it has written.
local function insist() redis.call('ZREM', LEASE, '') end

-- Whether the key can be pushed to.
local function takes(key)
  local kind = redis.call('TYPE', key).ok
  return kind == 'list' or kind == 'none'
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

-- Goes back to the last # only: a pattern with many of them must not keep Redis from others.
local function fits(pattern, key)
  local i, j, after, from = 1, 1, nil, nil
  while j <= #key do
    if pattern[i] == '#' then
      i = i + 1
      after, from = i, j
    elseif pattern[i] and (pattern[i] == '*' or pattern[i] == key[j]) then
      i, j = i + 1, j + 1
    elseif after then
      from = from + 1
      i, j = after, from
    else
      return false
    end
  end
  while pattern[i] == '#' do i = i + 1 end
  return i > #pattern
end

-- The queues, or nil when there is no such exchange.
local function route(exchange, key)
  if exchange == '' then
    if there(key) then return {key} end
    return {}
  end
  local members = redis.pcall('SMEMBERS', P..'_kombu.binding.'..exchange)
  if members.err then return nil end
  if #members == 0 and redis.call('HEXISTS', P..'amqtask.exchanges', exchange) == 0 then return nil end
  local found, seen, wanted = {}, {}, words(key)
  for _, member in ipairs(members) do
    local parts = split(member, 3)
    local queue = parts[3]
    if queue and not seen[queue] then
      local is_topic = parts[2] ~= ''
      if (is_topic and fits(words(parts[1]), wanted)) or (not is_topic and parts[1] == key) then
        seen[queue] = true
        found[#found + 1] = queue
      end
    end
  end
  return found
end

-- Whether one of the queues has as many messages as it may have.
local function is_full(queues)
  for _, queue in ipairs(queues) do
    local most = redis.call('HGET', P..'amqtask.limits', queue)
    if most then
      local size = 0
      for _, step in ipairs(STEPS) do size = size + redis.call('LLEN', list(queue, step)) end
      if size >= tonumber(most) then return true end
    end
  end
  return false
end

local function all_take(queues, step)
  for _, queue in ipairs(queues) do
    if not takes(list(queue, step)) then return false end
  end
  return true
end

local function is_fanout(exchange) return redis.call('HGET', P..'amqtask.exchanges', exchange) == 'fanout' end

local function tell(channels, exchange, key, message)
  local channel = P..channels..exchange
  if key ~= '' then channel = channel..'/'..key end
  return redis.call('PUBLISH', channel, message)
end

-- Whether somebody has written something else there.
local function takes_delayed()
  local table, order = redis.call('TYPE', DELAYED).ok, redis.call('TYPE', DELAY).ok
  return (table == 'none' or table == 'hash') and (order == 'none' or order == 'zset')
end

local function postpone(id, due, exchange, key, step, message)
  redis.call('HSET', DELAYED, id, exchange..SEP..key..SEP..step..SEP..message)
  redis.call('ZADD', DELAY, due, id)
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

-- Where a message came from, by itself: somebody has deleted the note, or Redis has, to make room.
local function origin(entry)
  local is_read, words = pcall(cjson.decode, entry)
  if not is_read or type(words) ~= 'table' or type(words[3]) ~= 'string' then return {} end
  local properties = type(words[1]) == 'table' and words[1].properties
  local priority, own = type(properties) == 'table' and tonumber(properties.priority) or 0, '0'
  for _, step in ipairs(STEPS) do
    if tonumber(step) <= priority then own = step end
  end
  return {words[3], own}
end

-- queue, step and message of a tag that is still held.
local function held(tag)
  local entry = redis.call('HGET', UNACKED, tag)
  if not entry then return nil end
  local parts = split(redis.call('HGET', HELD, tag) or '', 2)
  if not parts[2] then parts = origin(entry) end
  if not parts[2] then return nil end
  local tail = ',"",'..cjson.encode(parts[1])..']'
  return parts[1], parts[2], string.sub(entry, 2, -(#tail + 1))
end

local function give_back(tag, failures)
  local queue, step, message = held(tag)
  if queue and not takes(list(queue, step)) then
    redis.pcall('ZADD', LEASE, score(seconds() + 30), tag) -- once more then
    return 0
  end
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

_REMOVE = r"""
-- How many messages it had.
local function delete(queue, sources)
  local count = 0
  for _, step in ipairs(STEPS) do
    if takes(list(queue, step)) then
      count = count + redis.call('LLEN', list(queue, step))
      redis.call('DEL', list(queue, step))
    end
  end
  redis.call('HDEL', QUEUES, queue)
  redis.call('HDEL', P..'amqtask.limits', queue)
  for _, source in ipairs(sources) do
    for _, table in ipairs({'_kombu.binding.', '_kombu.binding_permanent.'}) do
      for _, member in ipairs(redis.call('SMEMBERS', P..table..source)) do
        if split(member, 3)[3] == queue then redis.call('SREM', P..table..source, member) end
      end
    end
  end
  return count
end

-- One of its owners has it no longer; the queue goes with the last one.
local function leave(member)
  redis.call('ZREM', OWNED, member)
  local parts = split(member, 3)
  for _, other in ipairs(redis.call('ZRANGE', OWNED, 0, -1)) do
    if split(other, 3)[1] == parts[1] then return end
  end
  local sources = {}
  for source in string.gmatch(parts[3], '[^\6\22]+') do sources[#sources + 1] = source end
  delete(parts[1], sources)
end
"""

# ARGV: beginning of fanout channels, exchange, routing key, step, message, and, for a consumer that may publish only while it
# has a queue alone, that queue and itself. How many queues have the message; -1: there is no such exchange; -2: a queue is full;
# -3: the consumer has its queue no longer.
_PUBLISH = r"""
local NO_LIST = 'WRONGTYPE one of the keys of its queues is no list'
if ARGV[6] and redis.call('GET', P..'amqtask.active.'..ARGV[6]) ~= ARGV[7] then return -3 end
if is_fanout(ARGV[2]) then return tell(ARGV[1], ARGV[2], ARGV[3], ARGV[5]) end
local queues = route(ARGV[2], ARGV[3])
if not queues then return -1 end
if is_full(queues) then return -2 end
if #queues > 1 and not all_take(queues, ARGV[4]) then return redis.error_reply(NO_LIST) end
for _, queue in ipairs(queues) do redis.call('LPUSH', list(queue, ARGV[4]), ARGV[5]) end
return #queues
"""

# ARGV: id, due time (ms), exchange, routing key, step, message.
_POSTPONE = r"""
postpone(ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6])
return 1
"""

# ARGV: how many at most, beginning of fanout channels. How many have left, when the next is due (ms from now, -1: none waits),
# how many have no queue, or one that is no list: these are tried again ten seconds later.
_RELEASE_DUE = r"""
local now = math.floor(seconds() * 1000)
local left, homeless = 0, 0
for _, id in ipairs(redis.call('ZRANGEBYSCORE', DELAY, '-inf', now, 'LIMIT', 0, ARGV[1])) do
  local entry = redis.call('HGET', DELAYED, id)
  redis.call('ZREM', DELAY, id)
  redis.call('HDEL', DELAYED, id)
  local parts = entry and split(entry, 4) or {}
  local to_all = parts[4] and is_fanout(parts[1])
  local queues = parts[4] and not to_all and (parts[1] == '' and {parts[2]} or route(parts[1], parts[2]))
  if to_all then
    tell(ARGV[2], parts[1], parts[2], parts[4])
    left = left + 1
  elseif parts[4] and (not queues or #queues == 0) then
    redis.call('HSET', DELAYED, id, entry)
    redis.call('ZADD', DELAY, now + 10000, id)
    homeless = homeless + 1
  end
  for number, queue in ipairs(queues or {}) do
    if takes(list(queue, parts[3])) then
      redis.call('LPUSH', list(queue, parts[3]), parts[4])
      left = left + 1
    else
      postpone(id..':'..number, now + 10000, '', queue, parts[3], parts[4])
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
# how many it may have, and '1' if only one consumer may have it. First whether more may be there, then the messages in groups:
# their queue, the failures of each ('': never delivered), and themselves; at the end for each queue whose key is no list: the
# queue, '!', and what Redis says of it. Asked again with the same number, it answers the same. An answer has some megabytes at
# most, or one message.
_RESERVE = r"""
local out, number, most, bytes = {0}, tonumber(ARGV[2]), tonumber(ARGV[4]), 0
local acks = ARGV[3] ~= ''
local group = {}
local function give(queue, failures, message)
  if group[1] ~= queue or group[2] ~= failures then
    group = {queue, failures}
    out[#out + 1] = group
  end
  group[#group + 1] = message
end
local function failures(message)
  return redis.call('HGET', TRIES, redis.sha1hex(message)) or ''
end
if acks then
  while true do
    local queue, _, message = held(ARGV[1]..':'..number)
    if not queue then break end
    give(queue, failures(message), message)
    number = number + 1
  end
  if #out > 1 then
    out[1] = 1
    return out
  end
  redis.call('ZREM', INDEX, '') -- what is noted at the end can be: nothing is popped where this fails
  redis.call('HEXISTS', HELD, '')
end
local now, rooms = seconds(), {}
insist()
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
-- Notes of all that was popped, which are made together.
local entries, indexed, leased, places, odd = {}, {}, {}, {}, {}
local popped_at, ends_at = score(now), acks and score(now + tonumber(ARGV[3]))
local function note(queue, step, message)
  local tag, at = ARGV[1]..':'..number, #entries
  number = number + 1
  entries[at + 1], entries[at + 2] = tag, '['..message..',"",'..cjson.encode(queue)..']'
  indexed[at + 1], indexed[at + 2] = popped_at, tag
  leased[at + 1], leased[at + 2] = ends_at, tag
  places[at + 1], places[at + 2] = tag, queue..SEP..step
end
-- 1 when more may be there.
local function pop_all()
  for _, step in ipairs(STEPS) do
    local progress = true
    while progress do
      progress = false
      for at = 5, #ARGV, 3 do
        if rooms[at] > 0 then
          if most == 0 or bytes > 4194304 then return 1 end
          local queue = ARGV[at]
          local message = redis.pcall('RPOP', list(queue, step))
          if type(message) == 'table' then
            rooms[at] = 0
            odd[#odd + 1] = {queue, '!', message.err}
          elseif message then
            progress = true
            rooms[at], most, bytes = rooms[at] - 1, most - 1, bytes + #message
            if acks then note(queue, step, message) end
            give(queue, has_tries and failures(message) or '', message)
          end
        end
      end
    end
  end
  return 0
end
out[1] = pop_all()
if #entries > 0 then
  redis.call('HSET', UNACKED, unpack(entries))
  redis.call('ZADD', INDEX, unpack(indexed))
  redis.call('ZADD', LEASE, unpack(leased))
  redis.call('HSET', HELD, unpack(places))
end
for _, words in ipairs(odd) do out[#out + 1] = words end
return out
"""

# ARGV: consumer, then numbers of its tags. How many were still held.
_ACK = r"""
local tags, has_tries = {}, redis.call('EXISTS', TRIES) == 1
for i = 2, #ARGV do
  local tag = ARGV[1]..':'..ARGV[i]
  tags[#tags + 1] = tag
  if has_tries then
    local queue, _, message = held(tag)
    if queue then redis.call('HDEL', TRIES, redis.sha1hex(message)) end
  end
end
if #tags == 0 then return 0 end
redis.call('ZREM', INDEX, unpack(tags))
redis.call('ZREM', LEASE, unpack(tags))
redis.call('HDEL', HELD, unpack(tags))
return redis.call('HDEL', UNACKED, unpack(tags))
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
local queues = route(ARGV[2], ARGV[3])
if not queues or #queues == 0 then queues = {ARGV[2] == '' and ARGV[3] or ARGV[6]} end
if not all_take(queues, ARGV[4]) then return redis.error_reply('WRONGTYPE the key of '..queues[1]..' is no list') end
redis.call('HDEL', TRIES, redis.sha1hex(message))
forget(ARGV[1])
for _, target in ipairs(queues) do redis.call('LPUSH', list(target, ARGV[4]), ARGV[5]) end
return 1
"""

# ARGV: tag, beginning of fanout channels, then for each message its due time (ms; '': now), exchange, routing key, step, '1' if
# it must have a queue, itself. All are published and the tag is acknowledged (1); or nothing is done, because it is held no
# longer (0), or because there is no place for one of them (-1).
_REPLACE = r"""
local queue, _, message = held(ARGV[1])
if not queue then return 0 end
local targets = {}
for at = 3, #ARGV, 6 do
  if ARGV[at] == '' and not is_fanout(ARGV[at + 1]) then
    local queues = route(ARGV[at + 1], ARGV[at + 2]) or {}
    if (#queues == 0 and ARGV[at + 4] == '1') or is_full(queues) or not all_take(queues, ARGV[at + 3]) then return -1 end
    targets[at] = queues
  elseif ARGV[at] ~= '' and not takes_delayed() then
    return -1
  end
end
-- A user may not publish to channels: first, so that nothing is done then.
for at = 3, #ARGV, 6 do
  if ARGV[at] == '' and not targets[at] then tell(ARGV[2], ARGV[at + 1], ARGV[at + 2], ARGV[at + 5]) end
end
if redis.call('EXISTS', TRIES) == 1 then redis.call('HDEL', TRIES, redis.sha1hex(message)) end
forget(ARGV[1])
for at = 3, #ARGV, 6 do
  local exchange, key, step, text = ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 5]
  if ARGV[at] ~= '' then
    postpone(ARGV[1]..':'..at, ARGV[at], exchange, key, step, text)
  elseif targets[at] then
    for _, target in ipairs(targets[at]) do redis.call('LPUSH', list(target, step), text) end
  end
end
return 1
"""

# ARGV: consumer, seconds of the lease, how many queues it has alone, these, then numbers of its tags. The numbers that are no
# longer held, and the queues that another consumer has.
_RENEW = r"""
local now, lease, alone = seconds(), tonumber(ARGV[2]), tonumber(ARGV[3])
insist()
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
    redis.call('ZADD', LEASE, score(now + lease), tag)
    redis.call('ZADD', INDEX, score(now), tag)
  else
    lost[1][#lost[1] + 1] = ARGV[i]
  end
end
return lost
"""

# ARGV: how many at most, and seconds. How many have gone back. Queues go whose owners no longer say that they have them. When
# nobody has looked for so many seconds, Redis was away, or its clock has jumped, and leases are over of those who live: nothing
# goes back for so many seconds more, in which they renew them. Without seconds nobody is waited for.
_SWEEP = r"""
local patience, now = tonumber(ARGV[2]), seconds()
if patience then
  insist()
  local looked, from = unpack(redis.call('HMGET', SWEPT, 'looked', 'from'))
  looked, from = tonumber(looked or ''), tonumber(from or '') or 0
  redis.call('HSET', SWEPT, 'looked', score(now))
  if not looked or math.abs(now - looked) > patience or from > now + patience then
    from = now + patience
    redis.call('HSET', SWEPT, 'from', score(from))
  end
  if now < from then return 0 end
end
for _, member in ipairs(redis.call('ZRANGEBYSCORE', OWNED, '-inf', score(now), 'LIMIT', 0, ARGV[1])) do leave(member) end
return sweep(ARGV[1])
"""

# ARGV: seconds, then `owners`: a queue, who has it, and the exchanges that it is bound to, joined.
_OWN = r"""
insist()
for i = 2, #ARGV do redis.call('ZADD', OWNED, score(seconds() + tonumber(ARGV[1])), ARGV[i]) end
return 1
"""

# ARGV: `owners` that have their queues no longer. A queue goes with the last of them.
_DISOWN = r"""
for _, member in ipairs(ARGV) do leave(member) end
return 1
"""

# ARGV: consumer, then queues that it had alone.
_LEAVE = r"""
for i = 2, #ARGV do
  local key = P..'amqtask.active.'..ARGV[i]
  if redis.call('GET', key) == ARGV[1] then redis.call('DEL', key) end
end
return 1
"""

# ARGV: queue, and the exchanges that it is bound to. How many messages it had.
_DELETE = r"""
local sources = {}
for i = 2, #ARGV do sources[#sources + 1] = ARGV[i] end
return delete(ARGV[1], sources)
"""

# ARGV: queue, the oldest and the newest of the messages that were read, how many. Whether they are gone now; not, when another
# reader has taken some of them.
_TRIM = r"""
local key, count = list(ARGV[1], '0'), tonumber(ARGV[4])
if redis.call('LINDEX', key, -1) ~= ARGV[2] or redis.call('LINDEX', key, -count) ~= ARGV[3] then return 0 end
redis.call('LTRIM', key, 0, -(count + 1))
return 1
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
POSTPONE = Script(_COMMON + _ROUTE + _POSTPONE)
RELEASE_DUE = Script(_COMMON + _ROUTE + _RELEASE_DUE)
RESERVE = Script(_COMMON + _RELEASE + _RESERVE)
ACK = Script(_COMMON + _RELEASE + _ACK)
GIVE_BACK = Script(_COMMON + _RELEASE + _GIVE_BACK)
BURY = Script(_COMMON + _ROUTE + _RELEASE + _BURY)
RENEW = Script(_COMMON + _RENEW)
REPLACE = Script(_COMMON + _ROUTE + _RELEASE + _REPLACE)
SWEEP = Script(_COMMON + _RELEASE + _REMOVE + _SWEEP)
OWN = Script(_COMMON + _OWN)
DISOWN = Script(_COMMON + _REMOVE + _DISOWN)
LEAVE = Script(_COMMON + _LEAVE)
DELETE = Script(_COMMON + _REMOVE + _DELETE)
TRIM = Script(_COMMON + _TRIM)
ALL = (
    PUBLISH,
    POSTPONE,
    RELEASE_DUE,
    RESERVE,
    ACK,
    GIVE_BACK,
    BURY,
    REPLACE,
    RENEW,
    SWEEP,
    OWN,
    DISOWN,
    LEAVE,
    DELETE,
    TRIM,
)
