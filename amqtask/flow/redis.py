"""Locks and places in Redis or Valkey: each question is one script.

Of a task with the scope S: `S:unique:…` is a lock, "w" or "r" (it waits, it runs) and the id of the call that has it; a limit's
key is the set of those who have a place, or of a rate the time at which its next run may begin, and `…:line` its pace and
tickets; `S:leases` has the end of each run's lease, `S:locked` the lock of each run, `S:limits` what operators have set,
`S:keys:…` when each key of a limit was used last; `S:breaker` is a breaker that is not closed, `…:failures` when the last runs
failed while it was. Times are the server's.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from amqtask.flow import contract as rules
from amqtask.flow.contract import Circuit, KeyUse, Override, Verdict

if TYPE_CHECKING:
    from amqtask.flow.contract import Bound, Entry

# Each takes one key and one argument, and answers 0 where there is nothing to tell.
_TAKE = """
local e = cjson.decode(ARGV[1])
local there = redis.call('GET', KEYS[1])
if there then
  local owner = string.sub(there, 2)
  if owner ~= e.id and not (e.replaces and string.sub(there, 1, 1) == 'w') then return owner end
end
redis.call('SET', KEYS[1], 'w'..e.id, 'PX', e.ms)
return 0
"""
_CONFIRM = """
local e = cjson.decode(ARGV[1])
local there = redis.call('GET', KEYS[1])
if there and string.sub(there, 2) == e.id and redis.call('PTTL', KEYS[1]) < e.ms then
  redis.call('PEXPIRE', KEYS[1], e.ms)
end
return 0
"""
_FREE = """
local there = redis.call('GET', KEYS[1])
if there and string.sub(there, 2) == cjson.decode(ARGV[1]).id then redis.call('DEL', KEYS[1]) end
return 0
"""
_COMMON = f"""
local S = KEYS[1]
local LEASES, LOCKED = S..':leases', S..':locked'
local e = cjson.decode(ARGV[1])
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
local function owner(key)
  local there = redis.call('GET', key)
  return there and string.sub(there, 2)
end
local function keep(lock, state)
  local present = owner(lock.key)
  if not present or (present == e.id and lock['until'] ~= 'ttl') then
    redis.call('SET', lock.key, state..e.id, 'PX', math.ceil(lock.ttl * 1000))
  end
end
local function free(key)
  if owner(key) == e.id then redis.call('DEL', key) end
end
local function note(bound, field, value)
  redis.call('HSET', bound.key..':line', 'text', bound.text, field, string.format('%.6f', value))
  redis.call('EXPIRE', bound.key..':line', {rules.REMEMBERED})
end
"""
_ENTER = (
    _COMMON
    + f"""
local lock = e.lock
if lock and lock['until'] ~= 'started' then
  local present = owner(lock.key)
  if present and present ~= e.id and not (lock['until'] == 'ttl' and lock.taken) then return {{'', '', present}} end
end
local guard, breaker = e.guard, nil
if guard then
  breaker = redis.call('HMGET', guard.key, 'until', 'tries', 'refused')
  if breaker[1] then
    local tries, left = breaker[2] or '', tonumber(breaker[1]) - now
    local is_tried = tries ~= '' and tries ~= e.holder and tonumber(redis.call('ZSCORE', LEASES, tries) or 0) > now
    if left > 0 or is_tried then
      local later = math.min(tonumber(breaker[3] or 0) * {rules.RAMP}, e.random * guard.pause)
      redis.call('HINCRBY', guard.key, 'refused', 1)
      if is_tried then later = math.max(later, math.min(guard.pause, {rules.TRYING})) end
      if lock then keep(lock, 'w') end
      return {{string.format('%.3f', math.max({rules.SHORTEST}, math.max(left, 0) + later)), '{rules.BREAKER_IS_OPEN}', ''}}
    end
  end
end
local labels = {{}}
for i, bound in ipairs(e.bounds) do labels[i] = bound.label end
local set = labels[1] and redis.call('HMGET', S..':limits', unpack(labels)) or {{}}
for i, bound in ipairs(e.bounds) do
  if set[i] then
    local override = cjson.decode(set[i])
    if bound.places > 0 then bound.places = override.places
    else bound.interval, bound.burst = override.interval, override.burst end
  end
end
local function occupy(bound, till)
  redis.call('SET', bound.key, string.format('%.6f', till), 'PX', math.ceil((till - now) * 1000) + 1000)
end
local function taken(bound)
  local till, most = tonumber(redis.call('GET', bound.key) or 0), now + bound.burst * bound.interval
  if till > most + 0.000001 then
    till = most
    occupy(bound, till)
  end
  return math.max(till, now)
end
local function first(bound)
  return taken(bound) - (bound.burst - 1) * bound.interval
end
local function used(bound)
  redis.call('ZADD', S..':keys:'..bound.label, string.format('%.6f', now), bound.key)
  redis.call('EXPIRE', S..':keys:'..bound.label, {rules.REMEMBERED})
end
local lines = {{}}
local function line_of(bound)
  local line = lines[bound.key]
  if line then return line end
  local names = {{'mean', 'began', 'issued', 'served', 'front'}}
  local values = redis.call('HMGET', bound.key..':line', unpack(names))
  line = {{}}
  for i, name in ipairs(names) do line[name] = tonumber(values[i] or nil) end
  line.began, line.issued = line.began or 0, line.issued or 0
  line.served, line.front = line.served or 0, line.front or 0
  line.count = bound.places > 0 and redis.call('SCARD', bound.key) or 0
  lines[bound.key] = line
  return line
end
local function pace_of(bound, line)
  if bound.places == 0 then return bound.interval end
  local run = line.mean or {rules.UNKNOWN}
  if line.count >= bound.places then
    local taken = math.min(now - line.began, {rules.LONGEST})
    run = math.max(run, line.mean and taken * {rules.DOUBT} or taken)
  end
  return run / bound.places
end
local function has_room(bound)
  local line, ticket = line_of(bound), e.tickets[bound.label]
  if not ticket then
    if (line.issued - line.served) * pace_of(bound, line) > {rules.PATIENCE} then return false end
  elseif line.front > now and ticket - line.served > bound.places + 1 then
    return false
  end
  if bound.places == 0 then return first(bound) <= now + 0.000001 end
  if line.count < bound.places or redis.call('SISMEMBER', bound.key, e.holder) == 1 then return true end
  for _, holder in ipairs(redis.call('SMEMBERS', bound.key)) do
    if tonumber(redis.call('ZSCORE', LEASES, holder) or 0) <= now then
      redis.call('SREM', bound.key, holder)
      redis.call('ZREM', LEASES, holder)
      redis.call('HDEL', LOCKED, holder)
      line.count = line.count - 1
    end
  end
  return line.count < bound.places
end
local function draw(bound)
  local line, ticket = line_of(bound), e.tickets[bound.label]
  if not ticket then
    ticket = line.issued + 1
    line.issued = ticket
    note(bound, 'issued', ticket)
    used(bound)
  end
  local pace, ahead = pace_of(bound, line), math.min(ticket, line.issued) - line.served
  local from, at = now, nil
  if bound.places == 0 then from = first(bound) end
  if bound.places == 0 and ahead > 1 then
    at = from + (ahead - 1) * pace
  elseif bound.places == 0 and from - now < pace / 2 then
    return ticket, math.max({rules.LEAST_WAIT}, from - now)
  elseif ahead > bound.places + 1 then
    at = from + ahead * pace * {rules.PACE}
  else
    local step = pace
    if bound.places > 0 then
      local least = math.min(pace * bound.places * {rules.SHARE}, {rules.MOST_STEP})
      step = math.min(pace * {rules.SOONER}, math.max({rules.LEAST_STEP}, least))
    end
    at = math.max(math.min(line.front, now + {rules.LONGEST}) + step, from)
    note(bound, 'front', at)
  end
  return ticket, math.min(math.max({rules.SHORTEST}, at - now), {rules.LONGEST})
end
local longest, reason, tickets = 0, '', {{}}
for _, bound in ipairs(e.bounds) do
  if not has_room(bound) then
    local ticket, seconds = draw(bound)
    tickets[#tickets + 1] = bound.label
    tickets[#tickets + 1] = string.format('%d', ticket)
    if seconds > longest then longest, reason = seconds, bound.label end
  end
end
if longest > 0 then
  if lock then keep(lock, 'w') end
  return {{string.format('%.4f', longest), reason, '', unpack(tickets)}}
end
local runs, has_lease = e.most, lock or guard
for _, bound in ipairs(e.bounds) do
  local line = line_of(bound)
  if line.issued > line.served then runs = 1 end
  if bound.places > 0 then
    has_lease = true
  else
    runs = math.max(1, math.min(runs, math.floor((now - first(bound)) / bound.interval * {rules.SPARE}) + 1))
  end
end
for _, bound in ipairs(e.bounds) do
  local line = line_of(bound)
  if bound.places > 0 then
    redis.call('SADD', bound.key, e.holder)
    redis.call('EXPIRE', bound.key, {rules.REMEMBERED})
  else
    occupy(bound, taken(bound) + runs * bound.interval)
  end
  note(bound, 'began', now)
  used(bound)
  local served = math.min(line.issued, math.max(line.served, e.tickets[bound.label] or 0))
  if served > line.served then note(bound, 'served', served) end
end
if has_lease then
  redis.call('ZADD', LEASES, string.format('%.6f', now + e.lease), e.holder)
  redis.call('EXPIRE', LEASES, {rules.REMEMBERED})
end
if lock then
  if lock['until'] == 'started' then
    free(lock.key)
  else
    keep(lock, 'r')
    if lock['until'] ~= 'ttl' then
      redis.call('HSET', LOCKED, e.holder, math.ceil(lock.ttl * 1000)..' '..lock.key)
      redis.call('EXPIRE', LOCKED, {rules.REMEMBERED})
    end
  end
end
if breaker and breaker[1] then
  redis.call('HSET', guard.key, 'state', '{rules.HALF_OPEN}', 'tries', e.holder)
  return {{'', '', '', '{rules.HALF_OPEN}'}}
end
return runs == e.most and 0 or runs
"""
)
_LEAVE = (
    _COMMON
    + f"""
for _, bound in ipairs(e.bounds) do
  if bound.places > 0 and redis.call('SREM', bound.key, e.holder) == 1 then
    local mean = tonumber(redis.call('HGET', bound.key..':line', 'mean') or e.seconds)
    note(bound, 'mean', mean + (e.seconds - mean) * math.min(1, e.runs / {rules.NOTED_RUNS}))
  end
end
redis.call('ZREM', LEASES, e.holder)
redis.call('HDEL', LOCKED, e.holder)
local lock = e.lock
if lock and lock['until'] ~= 'started' and lock['until'] ~= 'ttl' then
  if e.ending == 'free' then free(lock.key) else keep(lock, 'w') end
end
local guard = e.guard
if not guard then return 0 end
local failures = guard.key..':failures'
local function open()
  local till = string.format('%.6f', now + guard.pause)
  redis.call('HSET', guard.key, 'state', '{rules.OPEN}', 'until', till, 'tries', '', 'refused', 0)
  redis.call('EXPIRE', guard.key, {rules.REMEMBERED} + math.ceil(guard.pause))
  redis.call('DEL', failures)
  return '{rules.OPEN}'
end
local breaker = redis.call('HMGET', guard.key, 'until', 'tries')
if not breaker[1] then
  if e.ended ~= 'failure' then return 0 end
  redis.call('LPUSH', failures, string.format('%.6f', now))
  redis.call('LTRIM', failures, 0, guard.failures - 1)
  redis.call('EXPIRE', failures, math.ceil(guard.seconds))
  local oldest = tonumber(redis.call('LINDEX', failures, guard.failures - 1) or nil)
  if oldest and oldest > now - guard.seconds then return open() end
elseif breaker[2] == e.holder then
  if e.ended == 'success' then
    redis.call('DEL', guard.key)
    return '{rules.CLOSED}'
  end
  if e.ended == 'failure' then return open() end
  redis.call('HSET', guard.key, 'tries', '')
end
return 0
"""
)
_RENEW = (
    _COMMON
    + f"""
for _, holder in ipairs(e.holders) do
  if redis.call('ZSCORE', LEASES, holder) then
    redis.call('ZADD', LEASES, string.format('%.6f', now + e.lease), holder)
  end
  local locked = redis.call('HGET', LOCKED, holder)
  if locked then
    local ttl, key = string.match(locked, '^(%d+) (.*)$')
    if redis.call('PTTL', key) < tonumber(ttl) then redis.call('PEXPIRE', key, ttl) end
  end
end
redis.call('EXPIRE', LEASES, {rules.REMEMBERED})
redis.call('EXPIRE', LOCKED, {rules.REMEMBERED})
return 0
"""
)
_SET = """
local before = redis.call('HDEL', KEYS[1]..':limits', cjson.decode(ARGV[1]).label)
local override = cjson.decode(ARGV[1]).override
if override then redis.call('HSET', KEYS[1]..':limits', cjson.decode(ARGV[1]).label, override) end
return before
"""
_LOOK = (
    _COMMON
    + f"""
local found = {{redis.call('HGETALL', S..':limits')}}
for _, label in ipairs(e.labels) do
  local keys = S..':keys:'..label
  redis.call('ZREMRANGEBYSCORE', keys, '-inf', string.format('%.6f', now - {rules.REMEMBERED}))
  local uses = {{}}
  for _, key in ipairs(redis.call('ZREVRANGE', keys, 0, {rules.MOST_KEYS} - 1)) do
    local line, running = redis.call('HMGET', key..':line', 'text', 'issued', 'served'), 0
    if redis.call('TYPE', key).ok == 'set' then
      for _, holder in ipairs(redis.call('SMEMBERS', key)) do
        if tonumber(redis.call('ZSCORE', LEASES, holder) or 0) > now then running = running + 1 end
      end
    end
    uses[#uses + 1] = line[1] or ''
    uses[#uses + 1] = running
    uses[#uses + 1] = math.max(0, tonumber(line[2] or 0) - tonumber(line[3] or 0))
  end
  found[#found + 1] = uses
end
return found
"""
)
_CIRCUIT = """
local breaker = redis.call('HMGET', KEYS[1], 'state', 'until')
if not breaker[1] then return 0 end
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
return {breaker[1], string.format('%.3f', math.max(0, tonumber(breaker[2]) - now))}
"""
SCRIPTS = (_TAKE, _CONFIRM, _FREE, _ENTER, _LEAVE, _RENEW, _SET, _LOOK, _CIRCUIT)


class Server(Protocol):
    """Runs one of SCRIPTS with a key and an argument. Raises: FlowStoreUnreachable."""

    def ask(self, script: str, key: str, argument: bytes, /) -> Any:
        """Its answer."""

    def tell(self, script: str, key: str, argument: bytes, /) -> None:
        """Its answer is not waited for."""


class RedisStore:
    """See amqtask.flow.contract.FlowStore. `server` gives this process's way to the server."""

    def __init__(self, name: str, server: Callable[[], Server], on_close: Callable[[], None]) -> None:
        self.name = name
        self._server = server
        self._on_close = on_close

    def take(self, key: str, task_id: str, seconds: float, *, replaces: bool = False) -> str | None:
        """See FlowStore."""
        owner = self._server().ask(_TAKE, key, _json(id=task_id, ms=_milliseconds(seconds), replaces=replaces))
        return _text(owner) if owner else None

    def confirm(self, key: str, task_id: str, seconds: float) -> None:
        """See FlowStore."""
        self._server().tell(_CONFIRM, key, _json(id=task_id, ms=_milliseconds(seconds)))

    def free(self, key: str, task_id: str) -> None:
        """See FlowStore."""
        self._server().ask(_FREE, key, _json(id=task_id))

    def enter(self, entry: Entry, lease: float, most: int = 1) -> Verdict:
        """See FlowStore."""
        fields: dict[str, object] = {"lease": lease, "tickets": dict(entry.tickets), "most": most}
        if entry.guard is not None:
            fields["random"] = random.random()
        answer = self._server().ask(_ENTER, entry.scope, _of(entry, **fields))
        if isinstance(answer, int):
            return rules.RUN if most == 1 else Verdict(runs=answer or most)
        seconds, reason, other, *tickets = answer
        if not seconds and not other:
            return Verdict(changed=_text(tickets[0]))
        drawn = {_text(label): int(ticket) for label, ticket in zip(tickets[::2], tickets[1::2], strict=True)}
        return Verdict(float(seconds or 0), _text(reason), _text(other), {**entry.tickets, **drawn})

    def leave(self, entry: Entry, seconds: float, lock: str, ended: str = "", runs: int = 1) -> str:
        """See FlowStore. Places are given back without waiting for the answer; with a key, callers want to know at once."""
        if entry.lock is None and entry.guard is None and not any(bound.places for bound in entry.bounds):
            return ""  # of a rate nothing is held
        server, fields = self._server(), _of(entry, seconds=seconds, ending=lock, ended=ended, runs=runs)
        if entry.guard is not None:
            return _text(server.ask(_LEAVE, entry.scope, fields) or b"")
        send = server.tell if entry.lock is None else server.ask
        send(_LEAVE, entry.scope, fields)
        return ""

    def circuits(self, keys: Sequence[str]) -> dict[str, Circuit]:
        """See FlowStore."""
        # One by one: in a cluster each may be elsewhere.
        found = {key: self._server().ask(_CIRCUIT, key, b"") for key in keys}
        return {key: Circuit(_text(answer[0]), float(answer[1])) for key, answer in found.items() if answer}

    def renew(self, scope: str, holders: Sequence[str], lease: float) -> None:
        """See FlowStore."""
        self._server().ask(_RENEW, scope, _json(holders=holders, lease=lease))

    def set_limit(self, scope: str, label: str, override: Override | None) -> bool:
        """See FlowStore."""
        written = None if override is None else json.dumps(override._asdict())
        return bool(
            self._server().ask(_SET, scope, _json(label=label, **({} if written is None else {"override": written})))
        )

    def look(self, scope: str, labels: Sequence[str]) -> tuple[Mapping[str, Override], Mapping[str, Sequence[KeyUse]]]:
        """See FlowStore."""
        written, *uses = self._server().ask(_LOOK, scope, _json(labels=labels))
        overrides = {
            _text(label): Override(**json.loads(override))
            for label, override in zip(written[::2], written[1::2], strict=True)
        }
        return overrides, {
            label: [KeyUse(_text(key), running, waiting) for key, running, waiting in _in_threes(fields)]
            for label, fields in zip(labels, uses, strict=True)
        }

    def close(self) -> None:
        """See FlowStore."""
        self._on_close()


def _in_threes(fields: list[Any]) -> Iterator[tuple[Any, ...]]:
    return zip(*[iter(fields)] * 3, strict=True)


def _of(entry: Entry, **parameters: object) -> bytes:
    lock = entry.lock
    if lock is not None:
        parameters["lock"] = {"key": lock.key, "ttl": lock.ttl, "until": lock.until, "taken": lock.is_taken}
    if entry.guard is not None:
        parameters["guard"] = entry.guard._asdict()
    return _json(id=entry.task_id, holder=entry.holder, bounds=_bounds(entry.bounds), **parameters)


@lru_cache(maxsize=1000)
def _bounds(bounds: tuple[Bound, ...]) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode([bound._asdict() for bound in bounds]))


def _json(**fields: object) -> bytes:
    return msgspec.json.encode(fields)


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
