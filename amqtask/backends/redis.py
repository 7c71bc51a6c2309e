"""`redis://`, `sentinel://`, `redis+cluster://`: results in Redis under Celery's keys, waited for by publish/subscribe
(celery/backends/redis.py).

`celery-task-meta-<id>` holds the encoded meta with an expiry; the same value is published on a channel of that name, by one
script. A stored SUCCESS is never overwritten. Who waits subscribes, has the subscription confirmed, and looks at
the key only then: a result is stored before or after that, and seen either way.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from weakref import WeakKeyDictionary

import redis

from amqtask import states
from amqtask.backends.codec import key_prefix
from amqtask.backends.contract import BackendOptions, KnownStore
from amqtask.backends.mailbox import too_late
from amqtask.backends.redis_async import AsyncWaiters
from amqtask.backends.redis_callbacks import SLICE, Callbacks
from amqtask.backends.redis_chords import RedisChords
from amqtask.backends.redis_server import (
    ERRORS,
    FIRST_PAUSE,
    LONGEST_PAUSE,
    RETRY_FOR,
    TRANSIENT,
    RedisServer,
    Subscription,
    unreachable,
)
from amqtask.backends.retrying import RetryPolicy
from amqtask.ground.lazy import ByProcess
from amqtask.ground.plugins import others_names
from amqtask.protocol.message import Message
from amqtask.protocol.result import ResultMessage, decode_result, encode_result
from amqtask.protocol.serialization import content_type, content_types
from amqtask.transport.redis.servers import Cluster, SentinelMaster, deployment_of

PREFIX = "celery-task-meta-"
# What is there is returned, and only written over when it is what the caller has seen (ARGV[3]): Redis cannot read it.
STORE = """
local known = redis.call('GET', KEYS[1])
if known and known ~= ARGV[3] then return known end
if ARGV[2] == '0' then redis.call('SET', KEYS[1], ARGV[1]) else redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2]) end
redis.call('PUBLISH', KEYS[1], ARGV[1])
return false
"""
# Seconds: sentinels need a while to make a replica the master.
FAIL_OVER = 30.0
# Keys per MGET, so that no single command keeps the server from others for long.
AT_ONCE = 1_000


class RedisBackend(RedisChords, KnownStore):
    """See amqtask.backends.contract.ResultBackend, and amqtask.execution.contract.ChordStore.

    `transport_options`: `global_keyprefix`, `result_chord_ordered` (Celery's), `retry_for`, how many seconds the server
    may be away before callers get BackendUnreachable (5; 30 behind sentinels), the client's own
    (redis_places.CLIENT_OPTIONS), and for sentinels `master_name`, `min_other_sentinels`, `sentinel_kwargs`.
    """

    # Event loops call `store` in a thread (amqtask.execution.contract.ResultStore).
    blocks = True
    keeps_runs = True
    supports_autoexpire = True

    def __init__(self, options: BackendOptions) -> None:
        self._options = options
        self._type = content_type(options.serializer)
        self._encoding = "utf-8" if self._type.endswith(("json", "yaml")) else "binary"
        self._accept = content_types(options.accept) | {self._type}
        transport_options = dict(options.transport_options)
        prefix = key_prefix(transport_options)
        self._result_prefix = prefix + PREFIX
        self._deployment = deployment_of(options.url, transport_options, options.connect_timeout, options.settings)
        self._retry_for = float(
            transport_options.get("retry_for", FAIL_OVER if isinstance(self._deployment, SentinelMaster) else RETRY_FOR)
        )
        self._patience = RetryPolicy(seconds=self._retry_for, first_pause=FIRST_PAUSE, longest_pause=LONGEST_PAUSE)
        self._result_expires = max(1, int(options.expires)) if options.expires else None
        super().__init__(
            lambda work: self._connections.get()[0].retrying(work),
            prefix=prefix,
            serializer=options.serializer,
            content_type=self._type,
            content_encoding=self._encoding,
            accept=self._accept,
            expires=options.chord_expires or options.expires,
            is_ordered=bool(transport_options.get("result_chord_ordered", True)),
            is_tagged=isinstance(self._deployment, Cluster),
        )
        self._connections = ByProcess(self._connect)
        self._waiters: WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncWaiters] = WeakKeyDictionary()

    # -- the worker's end

    def message_for(self, result: ResultMessage, reply_to: str | None, correlation_id: str | None) -> Message | None:
        """Nothing travels over AMQP."""
        return None

    def store(self, result: ResultMessage) -> None:
        """SET with expiry and PUBLISH in one round trip; a result that is SUCCESS already stays.

        Raises: EncodeError, BackendUnreachable.
        """
        self._keep(result, self._options.always_retry)

    def store_briefly(self, result: ResultMessage) -> None:
        """`store`, but it gives up after `retry_for` seconds even with `result_backend_always_retry`."""
        self._keep(result, None)

    def _keep(self, result: ResultMessage, policy: RetryPolicy | None) -> None:
        body = encode_result(result, self._options.serializer).body
        key = self._result_key(result.task_id)
        arguments = (body, self._result_expires or 0)
        expected: bytes | None = b""
        while True:
            stored = self._connections.get()[0].retrying(
                lambda client: client.eval(STORE, 1, key, *arguments, expected),  # noqa: B023 - called here
                policy,
            )
            if stored is None or self._decode(stored).status == states.SUCCESS:
                return
            expected = stored

    # -- the caller's end

    def reply_to(self) -> str:
        """None needed."""
        return ""

    def prepare(self, task_ids: Sequence[str], timeout: float | None = None) -> None:
        """Nothing: a waiter subscribes first and looks at the key then, so no result is missed."""

    def hold(self, task_id: str, holder: object) -> None:
        """Do nothing: the server keeps the result until it expires."""

    def find(self, task_id: str) -> ResultMessage | None:
        """The stored result, or None."""
        body = self._retrying(lambda client: client.get(self._result_key(task_id)))
        return None if body is None else self._decode(body)

    def wait(
        self, task_id: str, *, timeout: float | None, on_interval: Callable[[], None] | None = None
    ) -> ResultMessage:
        """Block until the result is stored."""
        return next(self.iter_ready([task_id], timeout=timeout))[1]

    def iter_ready(self, task_ids: Sequence[str], *, timeout: float | None) -> Iterator[tuple[str, ResultMessage]]:
        """Each result as it is stored, over one subscription."""
        missing = {self._result_key(task_id): task_id for task_id in task_ids}
        deadline = None if timeout is None else time.monotonic() + timeout
        yield from self._stored(missing)
        while missing:
            if deadline is not None and time.monotonic() >= deadline:
                raise too_late(task_ids, len(missing), timeout)
            try:
                yield from self._published(missing, deadline)
            except TRANSIENT:
                # What is stored meanwhile is found by the look at the keys that follows each subscription.
                self._retrying(lambda client: client.ping())
            except ERRORS as error:
                raise unreachable(self._deployment.name, error) from error

    def _published(self, missing: dict[str, str], deadline: float | None) -> Iterator[tuple[str, ResultMessage]]:
        server, _ = self._connections.get()
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
                result = self._decode(event.value)
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
                result = None if value is None else self._decode(value)
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
        self._connections.get()[1].add(self._result_key(task_id), callback)

    def forget(self, task_id: str) -> None:
        """Delete the result."""
        self._retrying(lambda client: client.delete(self._result_key(task_id)))

    def cleanup(self) -> None:
        """Nothing: the server drops keys when they expire."""

    def close(self) -> None:
        """Close idle connections; they open again when they are needed."""
        connections = self._connections.pop()
        if connections is not None:
            connections[1].close()
            connections[0].close()

    # -- the server

    def _result_key(self, task_id: str) -> str:
        return f"{self._result_prefix}{task_id}"

    def _decode(self, value: bytes) -> ResultMessage:
        return decode_result(value, self._type, self._encoding, self._accept)

    def _connect(self) -> tuple[RedisServer, Callbacks]:
        server = RedisServer(self._deployment, self._patience)
        return server, Callbacks(server, self._decode)


__getattr__ = others_names(__name__)
