"""`redis://`, `sentinel://`, `redis+cluster://`: results in Redis under Celery's keys, waited for by publish/subscribe
(celery/backends/redis.py).

`celery-task-meta-<id>` holds the encoded meta with an expiry; the same value is published on a channel of that name, by one
script. A stored SUCCESS is never overwritten. Who waits subscribes, has the subscription confirmed, and looks at
the key only then: a result is stored before or after that, and seen either way.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import redis

from amqtask import states
from amqtask.backends.contract import BackendOptions, Codec, PatientStore, RetryPolicy, key_prefix, too_late
from amqtask.backends.redis_waiting import (
    ERRORS,
    FIRST_PAUSE,
    LONGEST_PAUSE,
    RETRY_FOR,
    SLICE,
    TRANSIENT,
    AsyncWaiters,
    Callbacks,
    RedisServer,
    Subscription,
    unreachable,
)
from amqtask.exceptions import EncodeError
from amqtask.ground.deadlines import end_of
from amqtask.ground.lazy import ByProcess
from amqtask.ground.plugins import others_names
from amqtask.ground.printable import bounded_logger, described
from amqtask.ground.strikes import let_through
from amqtask.protocol.result import ResultMessage
from amqtask.protocol.serialization import dumps
from amqtask.transport.redis.lines import WELL, LinePool, Lines, Question, Watch, run_script
from amqtask.transport.redis.servers import Cluster, SentinelMaster, deployment_of

# -- Chords counted in Redis, under Celery's keys and in its encoding, so that workers of both systems end one header together.
#
# `celery-taskset-meta-<group>` plus a suffix (celery/backends/redis.py): `.j` the parts (a sorted set by index; a list with
# `result_chord_ordered` False), `.t` how many members were added, `.s` how many were published, `.d` which members have
# ended, `.c` who publishes the body, then `done`; and ours alone: `.b` the id of the body, which our workers' parts must know.
# A part is `[1, task id, state, result]`. Without a suffix: the group's shape, where Celery saved it.
#
# The claim `.c` holds the id of the member that completed the chord, not a random token: that member's message is unanswered
# until the body is confirmed, so after a crash it comes again, finds its own claim, and publishes the body then.

# KEYS: j t s d b c; ARGV: member, value, score ("" for a list), expiry of the parts, expiry of the claim, task id, body's id
ADD_PART = """
local body = redis.call('GET', KEYS[5])
if body and body ~= ARGV[7] then return false end
if redis.call('GET', KEYS[6]) == 'done' then return false end
if redis.call('SADD', KEYS[4], ARGV[1]) == 1 then
  if ARGV[3] == '' then redis.call('RPUSH', KEYS[1], ARGV[2]) else redis.call('ZADD', KEYS[1], ARGV[3], ARGV[2]) end
end
if tonumber(ARGV[4]) > 0 then
  for i = 1, 5 do redis.call('EXPIRE', KEYS[i], ARGV[4]) end
end
local size = redis.call('GET', KEYS[3])
if not size then return false end
local ended = redis.call('SCARD', KEYS[4])
if ended < tonumber(size) + tonumber(redis.call('GET', KEYS[2]) or 0) then return false end
local claim = redis.call('GET', KEYS[6])
if claim and claim ~= ARGV[6] then return false end
redis.call('SET', KEYS[6], ARGV[6], 'EX', ARGV[5])
if ARGV[3] == '' then return redis.call('LRANGE', KEYS[1], 0, -1) end
return redis.call('ZRANGE', KEYS[1], 0, -1)
"""
# KEYS: a t; ARGV: task id, expiry. `.a` is ours: who is added again counts once.
ADD_MEMBER = """
if redis.call('SADD', KEYS[1], ARGV[1]) == 1 then redis.call('INCR', KEYS[2]) end
if tonumber(ARGV[2]) > 0 then
  for i = 1, 2 do redis.call('EXPIRE', KEYS[i], ARGV[2]) end
end
"""
CLAIM_SECONDS = 3600
# How long a member that comes again after the body has run is recognised.
DONE_SECONDS = 3600
Retrying = Callable[[Callable[[Any], Any]], Any]


class RedisChords:
    """See amqtask.execution.contract.ChordStore; `retrying(work)` calls `work(client)` while the server is away.

    `is_tagged` is for a cluster.
    """

    def __init__(self, options: BackendOptions, retrying: Retrying, *, is_tagged: bool) -> None:
        transport_options = dict(options.transport_options)
        expires = options.chord_expires or options.expires
        self._codec = Codec(options)
        self._retrying = retrying
        self._prefix = f"{key_prefix(transport_options)}celery-taskset-meta-"
        self._expires = max(1, int(expires)) if expires else 0
        self._is_ordered = bool(transport_options.get("result_chord_ordered", True))
        self._is_tagged = is_tagged

    def set_chord_size(self, group_id: str, size: int, body_id: str = "") -> None:
        """Open a chord: a header of `size` members is about to be published. Raises: BackendUnreachable."""

        def write(client: Any) -> None:
            pipeline = client.pipeline(transaction=False)
            pipeline.delete(self._key(group_id, ".c"))
            pipeline.set(self._key(group_id, ".s"), size, ex=self._expires or None)
            if body_id:
                pipeline.set(self._key(group_id, ".b"), body_id, ex=self._expires or None)
            else:
                pipeline.delete(self._key(group_id, ".b"))
            pipeline.execute()

        self._retrying(write)

    def add_chord_part(
        self, group_id: str, index: int | None, part: ResultMessage, body_id: str = ""
    ) -> list[object] | None:
        """Add the part of a member that has ended; all parts when it completes the chord.

        Raises: EncodeError, BackendUnreachable."""
        try:
            value = dumps([1, part.task_id, part.status, part.result], self._codec.serializer).body
        except EncodeError as error:
            raise EncodeError(
                f"the result of task {part.task_id}, {described(part.result)}, cannot go to its chord: {error}"
            ) from error
        score = str(index) if index.__class__ is int else "+inf"  # the index of a later step is what its sender wrote
        keys = [self._key(group_id, suffix) for suffix in (".j", ".t", ".s", ".d", ".b", ".c")]
        arguments = [
            f"{part.task_id}:{score}",
            value,
            score if self._is_ordered else "",
            self._expires,
            CLAIM_SECONDS,
            part.task_id,
            body_id,
        ]
        raw_parts = self._retrying(lambda client: client.eval(ADD_PART, len(keys), *keys, *arguments))
        if raw_parts is None:
            return None
        parts = [self._read(raw_part) for raw_part in raw_parts]
        return self._shaped(group_id, parts)

    def add_to_chord(self, group_id: str, task_id: str) -> None:
        """Add a member to the chord. Raises: BackendUnreachable."""
        keys = [self._key(group_id, ".a"), self._key(group_id, ".t")]
        self._retrying(lambda client: client.eval(ADD_MEMBER, 2, *keys, task_id, self._expires))

    def end_chord(self, group_id: str, body_id: str = "") -> None:
        """The body has run: delete the parts. Raises: BackendUnreachable."""

        def write(client: Any) -> None:
            stored_body_id = client.get(self._key(group_id, ".b"))
            if stored_body_id is not None and stored_body_id != body_id.encode():
                return  # some other message that bears this group's id
            pipeline = client.pipeline(transaction=False)
            for suffix in (".j", ".t", ".s", ".d", ".a", ".b"):  # one by one: a cluster's pipeline takes no list
                pipeline.delete(self._key(group_id, suffix))
            pipeline.set(self._key(group_id, ".c"), "done", ex=DONE_SECONDS)
            pipeline.execute()

        self._retrying(write)

    # -- groups

    def save_group(self, group_id: str, members: object) -> None:
        """Keep a group's results (their ids). Raises: EncodeError, BackendUnreachable."""
        body = self._codec.value({"result": members}, f"group {group_id}")
        self._retrying(lambda client: client.set(self._key(group_id), body, ex=self._expires or None))

    def restore_group(self, group_id: str) -> Any:
        """What `save_group`, ours or Celery's, kept; None when there is nothing. Raises: BackendUnreachable."""
        body = self._retrying(lambda client: client.get(self._key(group_id)))
        return None if body is None else self._codec.read(body)["result"]

    def delete_group(self, group_id: str) -> None:
        """Forget it. Raises: BackendUnreachable."""
        self._retrying(lambda client: client.delete(self._key(group_id)))

    def _key(self, group_id: str, suffix: str = "") -> str:
        # A cluster keeps the keys of one group together by what is in braces, as its scripts need it.
        return f"{self._prefix}{{{group_id}}}{suffix}" if self._is_tagged else f"{self._prefix}{group_id}{suffix}"

    def _read(self, part: bytes) -> ResultMessage:
        _, task_id, state, result = self._codec.read(part)
        return ResultMessage(task_id, state, result)

    def _shaped(self, group_id: str, parts: list[ResultMessage]) -> list[Any]:
        """Celery saves the shape of a header whose members end in groups: their parts are lists in the body's argument."""
        saved = self.restore_group(group_id)
        if saved is None:
            return parts
        by_id: Mapping[str, ResultMessage] = {part.task_id: part for part in parts}
        _, members = saved
        return [_in_shape(member, by_id) for member in members or ()]


def _in_shape(member: Any, parts: Mapping[str, ResultMessage]) -> object:
    (task_id, _), children = member
    if children is None:
        return parts[task_id]
    return [_in_shape(child, parts) for child in children]


logger = bounded_logger("amqtask.backends")
PREFIX = "celery-task-meta-"
# What is there is returned, and only written over when it is what the caller has seen (ARGV[3]): Redis cannot read it. A value of
# another type is no result: it is written over, as with SET alone.
STORE = """
local known = redis.pcall('GET', KEYS[1])
if type(known) == 'string' and known ~= ARGV[3] then return known end
if ARGV[2] == '0' then redis.call('SET', KEYS[1], ARGV[1]) else redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2]) end
local told = redis.pcall('PUBLISH', KEYS[1], ARGV[1])
return type(told) == 'table' and 1 or 0
"""
# Its answer when the user may not publish to the channel: a new user of Redis 7 may not.
UNTOLD = 1
# Seconds: sentinels need a while to make a replica the master.
FAIL_OVER = 30.0
# Keys per MGET, so that no single command keeps the server from others for long.
AT_ONCE = 1_000
# More results than that are waited for over a subscription.
MOST_WATCHED = 50
# Watches that are kept for the next who waits.
IDLE_WATCHES = 10


class RedisBackend(RedisChords, PatientStore):
    """See amqtask.backends.contract.ResultBackend, and amqtask.execution.contract.ChordStore.

    `transport_options`: `global_keyprefix`, `result_chord_ordered` (Celery's), `retry_for`, how many seconds the server
    may be away before callers get BackendUnreachable (5; 30 behind sentinels), the client's own
    (redis_places.CLIENT_OPTIONS), and for sentinels `master_name`, `min_other_sentinels`, `sentinel_kwargs`.
    """

    # Event loops call `store` in a thread (amqtask.execution.contract.ResultStore).
    blocks = True
    keeps_runs = True
    stores_together = True
    supports_autoexpire = True

    def __init__(self, options: BackendOptions) -> None:
        self._options = options
        self.always_retry = options.always_retry
        transport_options = dict(options.transport_options)
        self._result_prefix = key_prefix(transport_options) + PREFIX
        self._deployment = deployment_of(options.url, transport_options, options.connect_timeout, options.settings)
        self._retry_for = float(
            transport_options.get("retry_for", FAIL_OVER if isinstance(self._deployment, SentinelMaster) else RETRY_FOR)
        )
        self._patience = RetryPolicy(seconds=self._retry_for, first_pause=FIRST_PAUSE, longest_pause=LONGEST_PAUSE)
        self._result_expires = max(1, int(options.expires)) if options.expires else None
        super().__init__(
            options,
            lambda work: self._connections.get().server.retrying(work),
            is_tagged=isinstance(self._deployment, Cluster),
        )
        self._connections = ByProcess(self._connect)
        self._has_said_untold = False
        self._waiters: WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncWaiters] = WeakKeyDictionary()

    # -- the worker's end

    def keep(self, result: ResultMessage, policy: RetryPolicy | None) -> None:
        """SET with expiry and PUBLISH in one round trip; a result that is SUCCESS already stays."""
        self._keep(self._question(result.task_id, self._codec.result(result)), policy)

    def _keep(self, question: Question, policy: RetryPolicy | None, stored: Any = None) -> None:
        """`stored`: what is there, where that is known already."""
        _, key, (body, expires, _) = question
        connections = self._connections.get()
        while True:
            if stored is not None:
                if stored == UNTOLD:
                    self._say_untold()
                    return
                if stored == WELL or self._decode(key, stored).status == states.SUCCESS:
                    return
                question = question._replace(arguments=(body, expires, stored))
            stored = connections.server.retrying(
                lambda _: connections.lines.ask(question.script, key, *question.arguments),  # noqa: B023 - called here
                policy,
            )

    def _say_untold(self) -> None:
        if not self._has_said_untold:
            self._has_said_untold = True
            logger.warning(
                "Redis at %s keeps results, but its user may not PUBLISH them: who waits for one sees it late. The user "
                "needs the channels, `&*`, too",
                self._deployment.name,
            )

    def packed(self, result: ResultMessage) -> bytes:
        """See ResultBackend."""
        return self._codec.result(result)

    def store_packed(self, results: Sequence[tuple[str, bytes]]) -> None:
        """See ResultBackend."""
        questions = [self._question(task_id, body) for task_id, body in results]
        connections = self._connections.get()
        answers = connections.server.retrying(lambda _: connections.lines.ask_all(questions), self.always_retry)
        for question, stored in zip(questions, answers, strict=True):
            if stored != WELL:
                self._keep(question, self.always_retry, stored)

    def _question(self, task_id: str, body: bytes) -> Question:
        return Question(STORE, self._result_key(task_id), (body, b"%d" % (self._result_expires or 0), b""))

    # -- the caller's end

    def find(self, task_id: str) -> ResultMessage | None:
        """The stored result, or None."""
        key = self._result_key(task_id)
        body = self._retrying(lambda client: client.get(key))
        return None if body is None else self._decode(key, body)

    def wait(self, task_id: str, *, timeout: float | None) -> ResultMessage:
        """Block until the result is stored."""
        with contextlib.closing(self.iter_ready([task_id], timeout=timeout)) as found:
            return next(found)[1]

    def iter_ready(
        self, task_ids: Sequence[str], *, timeout: float | None
    ) -> Generator[tuple[str, ResultMessage], None, None]:
        """Each result as it is stored: few over a watch, many over one subscription."""
        missing = {self._result_key(task_id): task_id for task_id in task_ids}
        deadline = end_of(timeout)
        if len(missing) <= MOST_WATCHED:
            yield from self._watched(missing, deadline)
        else:
            yield from self._stored(missing)
        while missing:
            if deadline is not None and time.monotonic() >= deadline:
                raise too_late(task_ids, len(missing), timeout)
            try:
                yield from self._published(missing, deadline)
            except TRANSIENT as error:
                let_through(error)
                # What is stored meanwhile is found by the look at the keys that follows each subscription.
                self._retrying(lambda client: client.ping())
            except ERRORS as error:
                let_through(error)
                raise unreachable(self._deployment.name, error) from error

    def _watched(self, missing: dict[str, str], deadline: float | None) -> Iterator[tuple[str, ResultMessage]]:
        """Those that come over a watch until the deadline; not all where there is none, or it breaks."""
        watches = self._connections.get().watches
        watch = watches.take() if missing else None
        if watch is None:
            yield from self._stored(missing)
            watch = watches.open() if missing else None
        if watch is None:
            return
        is_sound = False
        try:
            watch.begin(list(missing))
            while missing and not (watch.has_looked and deadline is not None and time.monotonic() >= deadline):
                for key, value in self._next_values(watch, deadline):
                    result = self._decode(key, value) if key in missing else None
                    if result is not None and result.is_ready:
                        yield missing.pop(key), result
            is_sound = True
        except GeneratorExit:
            is_sound = True
            raise
        except (OSError, ValueError) as error:
            watches.drop(watch, error)
            let_through(error)
            return  # the ordinary client finds out what is wrong
        finally:
            if is_sound:
                watches.put(watch)
            else:
                watch.close()

    def _next_values(self, watch: Watch, deadline: float | None) -> Sequence[tuple[str, bytes]]:
        if not watch.has_looked:
            seconds = self._options.connect_timeout
        else:
            seconds = SLICE if deadline is None else min(SLICE, deadline - time.monotonic())
        values = watch.values(seconds)
        if values is None and (deadline is None or time.monotonic() < deadline):
            watch.look()
        return values or ()

    def _published(self, missing: dict[str, str], deadline: float | None) -> Iterator[tuple[str, ResultMessage]]:
        server = self._connections.get().server
        subscription = server.subscription()
        is_sound = False
        try:
            self._subscribe(subscription, missing)
            yield from self._stored(missing)
            while missing and (deadline is None or time.monotonic() < deadline):
                event = subscription.next(SLICE if deadline is None else min(SLICE, deadline - time.monotonic()))
                if event is None or event.key not in missing:
                    continue
                if event.value is None:
                    raise redis.ConnectionError("subscribed again: what was published in between was missed")
                result = self._decode(event.key, event.value)
                if result.is_ready:
                    yield missing.pop(event.key), result
            is_sound = True
        except GeneratorExit:
            is_sound = True
            raise
        finally:
            server.release(subscription, is_sound=is_sound)

    def _subscribe(self, subscription: Subscription, keys: dict[str, str]) -> None:
        """Returns when the server has confirmed all."""
        unconfirmed = set(keys)
        subscription.add(unconfirmed)
        while unconfirmed:
            event = subscription.next(self._options.connect_timeout)
            if event is None:
                raise redis.TimeoutError("the subscription was not confirmed")
            if event.value is None:  # a value is looked at when all are confirmed: it is stored already
                unconfirmed.discard(event.key)

    def _stored(self, missing: dict[str, str]) -> Iterator[tuple[str, ResultMessage]]:
        keys = list(missing)
        for start in range(0, len(keys), AT_ONCE):
            batch = keys[start : start + AT_ONCE]
            values = self._retrying(lambda client, batch=batch: self._deployment.get_many(client, batch))  # type: ignore[misc]
            for key, value in zip(batch, values, strict=True):
                result = None if value is None else self._decode(key, value)
                if result is not None and result.is_ready:
                    yield missing.pop(key), result

    async def await_result(self, task_id: str, *, timeout: float | None) -> ResultMessage:
        """`wait` for an event loop."""
        loop = asyncio.get_running_loop()
        waiters = self._waiters.get(loop)
        if waiters is None:
            waiters = self._waiters[loop] = AsyncWaiters(self._deployment, self._decode, self._retry_for)
        try:
            return await waiters.wait(self._result_key(task_id), timeout)
        except asyncio.TimeoutError:
            raise too_late([task_id], 1, timeout) from None

    def add_callback(self, task_id: str, callback: Callable[[ResultMessage], None]) -> None:
        """Call once when the result is stored, from a thread that waits for all such results."""
        self._connections.get().callbacks.add(self._result_key(task_id), callback)

    def forget(self, task_id: str) -> None:
        """Delete the result."""
        self._retrying(lambda client: client.delete(self._result_key(task_id)))

    def close(self) -> None:
        """Close idle connections; they open again when they are needed."""
        connections = self._connections.pop()
        if connections is not None:
            for part in (connections.callbacks, connections.watches, connections.lines, connections.server):
                part.close()

    # -- the server

    def _result_key(self, task_id: str) -> str:
        return f"{self._result_prefix}{task_id}"

    def _decode(self, key: str, value: bytes) -> ResultMessage:
        return self._codec.read_result(key.removeprefix(self._result_prefix), value)

    def _connect(self) -> _Connections:
        server, timeout = RedisServer(self._deployment, self._patience), self._options.connect_timeout
        return _Connections(
            server,
            Callbacks(server, self._decode),
            Lines((STORE,), lambda question: run_script(server.client, question), lambda: server.client, timeout),
            LinePool(lambda: server.client, lambda place: Watch(place, timeout), most=IDLE_WATCHES),
        )


class _Connections(NamedTuple):
    """Those of one process: the ordinary ones, one for callbacks, and the short ways to store and to wait."""

    server: RedisServer
    callbacks: Callbacks
    lines: Lines
    watches: LinePool[Watch]


__getattr__ = others_names(__name__)
