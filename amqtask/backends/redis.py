"""`redis://`: results in Redis under Celery's keys, waited for by publish/subscribe (celery/backends/redis.py).

`celery-task-meta-<id>` holds the encoded meta with an expiry; the same value is published on a channel of that name, in one
pipeline. A stored SUCCESS is never overwritten.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import redis
import redis.asyncio

from amqtask import states
from amqtask.backends.contract import BackendOptions
from amqtask.exceptions import BackendUnreachable, TimeoutError
from amqtask.message import Message
from amqtask.protocol.result import ResultMessage, decode_result, encode_result
from amqtask.serialization import content_type

PREFIX = "celery-task-meta-"
# Attempts before BackendUnreachable, and the pauses between them (seconds).
ATTEMPTS, FIRST_PAUSE = 4, 0.1


class RedisBackend:
    """See amqtask.backends.contract.ResultBackend."""

    def __init__(self, options: BackendOptions) -> None:
        self._options = options
        self._type = content_type(options.serializer)
        self._encoding = "utf-8" if self._type.endswith(("json", "yaml")) else "binary"
        prefix = str(dict(options.transport_options).get("global_keyprefix") or "")
        if prefix and prefix[-1] not in ":_-.":
            prefix += "_"
        self._prefix = prefix + PREFIX
        self._pid = -1
        self._client_of_process: Any = None

    # -- the worker's end

    def message_for(self, result: ResultMessage, reply_to: str | None, correlation_id: str | None) -> Message | None:
        """Nothing travels over AMQP."""
        return None

    def store(self, result: ResultMessage) -> None:
        """SETEX and PUBLISH in one pipeline; a result that is SUCCESS already stays."""
        body = encode_result(result, self._options.serializer).body
        key = self._key(result.task_id)
        if result.status != states.SUCCESS:
            known = self._retrying(lambda client: client.get(key))
            if known is not None and self._decode(known).status == states.SUCCESS:
                return

        def write(client: Any) -> None:
            pipeline = client.pipeline(transaction=False)
            if self._options.expires:
                pipeline.setex(key, int(self._options.expires), body)
            else:
                pipeline.set(key, body)
            pipeline.publish(key, body)
            pipeline.execute()

        self._retrying(write)

    # -- the caller's end

    def reply_to(self) -> str:
        """None needed."""
        return ""

    def prepare(self, task_ids: Sequence[str]) -> None:
        """Nothing: a waiter subscribes first and looks at the key then, so no result is missed."""

    def get(self, task_id: str) -> ResultMessage | None:
        """What is stored."""
        found = self._retrying(lambda client: client.get(self._key(task_id)))
        return None if found is None else self._decode(found)

    def wait(
        self, task_id: str, *, timeout: float | None, on_interval: Callable[[], None] | None = None
    ) -> ResultMessage:
        """Block until the result is stored."""
        for _, result in self.iter_ready([task_id], timeout=timeout):
            return result
        raise TimeoutError(f"no result of task {task_id}")

    def iter_ready(self, task_ids: Sequence[str], *, timeout: float | None) -> Iterator[tuple[str, ResultMessage]]:
        """Each as it is stored, over one subscription; `timeout` is for the next one."""
        left = {self._key(task_id): task_id for task_id in task_ids}
        while left:
            try:
                yield from self._subscribed(left, timeout)
            except redis.ConnectionError as error:
                # What was stored meanwhile is found by the look at the keys that begins a subscription.
                self._wait_for_server(error)

    def _subscribed(self, left: dict[str, str], timeout: float | None) -> Iterator[tuple[str, ResultMessage]]:
        total = len(left)
        ready = self._stored(left)
        yield from ready
        if not left:
            return
        with self._client().pubsub() as pubsub:
            pubsub.subscribe(*left)
            yield from self._stored(left)
            while left:
                found = self._next(pubsub, left, timeout)
                if found is None:
                    raise TimeoutError(f"{len(left)} of {total} results did not come within {timeout:g} s")
                yield found

    def _next(self, pubsub: Any, left: dict[str, str], timeout: float | None) -> tuple[str, ResultMessage] | None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            wait = 1.0 if deadline is None else min(1.0, deadline - time.monotonic())
            if wait <= 0:
                return None
            message = pubsub.get_message(ignore_subscribe_messages=True, timeout=wait)
            if message is None or message["type"] != "message":
                continue
            result = self._decode(message["data"])
            key = message["channel"].decode()
            if result.is_ready and key in left:
                return left.pop(key), result

    def _stored(self, left: dict[str, str]) -> list[tuple[str, ResultMessage]]:
        keys = list(left)
        values = self._retrying(lambda client: client.mget(keys))
        found = []
        for key, value in zip(keys, values, strict=True):
            if value is not None:
                result = self._decode(value)
                if result.is_ready:
                    found.append((left.pop(key), result))
        return found

    async def await_result(self, task_id: str, *, timeout: float | None) -> ResultMessage:
        """The same for an event loop."""
        key = self._key(task_id)
        deadline = None if timeout is None else time.monotonic() + timeout
        async with redis.asyncio.Redis.from_url(self._options.url, **self._arguments()) as client:  # noqa: SIM117
            async with client.pubsub() as pubsub:
                await pubsub.subscribe(key)
                found = await client.get(key)
                while True:
                    if found is not None:
                        result = self._decode(found)
                        if result.is_ready:
                            return result
                    wait = 1.0 if deadline is None else min(1.0, deadline - time.monotonic())
                    if wait <= 0:
                        raise TimeoutError(f"no result of task {task_id} within {timeout:g} s")
                    message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=wait)
                    found = message["data"] if message is not None else None

    def add_callback(self, task_id: str, callback: Callable[[ResultMessage], None]) -> None:
        """Call once when the result is stored, from a thread that waits for it."""

        def wait() -> None:
            callback(self.wait(task_id, timeout=None))

        threading.Thread(target=wait, name=f"amqtask result {task_id}", daemon=True).start()

    def forget(self, task_id: str) -> None:
        """Delete it."""
        self._retrying(lambda client: client.delete(self._key(task_id)))

    def close(self) -> None:
        """Close idle connections."""
        if self._client_of_process is not None and self._pid == os.getpid():
            self._client_of_process.close()
        self._client_of_process = None

    # -- the server

    def _key(self, task_id: str) -> str:
        return f"{self._prefix}{task_id}"

    def _decode(self, value: Any) -> ResultMessage:
        return decode_result(value, self._type, self._encoding, self._options.accept | {self._type})

    def _arguments(self) -> dict[str, Any]:
        return {
            "socket_connect_timeout": self._options.connect_timeout,
            "socket_keepalive": True,
            "health_check_interval": 25,
        }

    def _client(self) -> Any:
        """One client (a pool of connections) per process."""
        if self._client_of_process is None or self._pid != os.getpid():
            self._pid = os.getpid()
            self._client_of_process = redis.Redis.from_url(self._options.url, **self._arguments())
        return self._client_of_process

    def _retrying(self, work: Callable[[Any], Any]) -> Any:
        pause = FIRST_PAUSE
        for attempt in range(ATTEMPTS):
            try:
                return work(self._client())
            except (redis.ConnectionError, redis.TimeoutError) as error:
                if attempt == ATTEMPTS - 1:
                    raise BackendUnreachable(f"Redis at {self._safe_url} does not answer: {error}") from error
                time.sleep(pause)
                pause *= 2
        raise AssertionError("unreachable")

    def _wait_for_server(self, error: Exception) -> None:
        try:
            self._retrying(lambda client: client.ping())
        except BackendUnreachable as unreachable:
            raise unreachable from error

    @property
    def _safe_url(self) -> str:
        split = urlsplit(self._options.url)
        return f"{split.scheme}://{split.hostname}:{split.port or 6379}{split.path}"
