"""Callbacks for results in Redis: one thread and one subscription for all that somebody waits for.

To subscribe to one more key the thread is woken by a message on a channel of its own, so that it never has to poll, and no
other thread touches its connection.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable

from amqtask.backends.redis_server import ERRORS, LONGEST_PAUSE, RedisServer, Subscription
from amqtask.exceptions import BackendUnreachable
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.result import ResultMessage

logger = bounded_logger("amqtask.backends")
OnResult = Callable[[ResultMessage], None]
# Seconds between looks at a silent connection (a dead one answers no ping).
SLICE = 15.0


class Callbacks:
    """`decode` reads a stored value. The thread starts with the first callback and ends with `close`."""

    def __init__(self, server: RedisServer, decode: Callable[[bytes], ResultMessage]) -> None:
        self._server = server
        self._decode = decode
        self._lock = threading.Lock()
        self._waiting: dict[str, list[OnResult]] = {}
        self._new: set[str] = set()
        self._channel = f"amqtask-wake-{uuid.uuid4()}"
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()

    def add(self, key: str, callback: OnResult) -> None:
        """Call once when the key holds a final result. Raises: BackendUnreachable."""
        with self._lock:
            self._waiting.setdefault(key, []).append(callback)
            self._new.add(key)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="amqtask results", daemon=True)
                self._thread.start()
        self._wake()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            try:
                self._wake()
            except BackendUnreachable:
                return  # it sees that we are closed at its next attempt
            self._thread.join(timeout=5.0)

    def _wake(self) -> None:
        self._server.retrying(lambda client: client.publish(self._channel, b""))

    def _run(self) -> None:
        while not self._closed.is_set():
            subscription = None
            try:
                subscription = self._server.subscription()
                with self._lock:
                    self._new.update(self._waiting)
                subscription.add([self._channel])
                while not self._closed.is_set():
                    self._turn(subscription)
            except (*ERRORS, BackendUnreachable) as error:
                if not self._closed.is_set():
                    logger.warning("results cannot be waited for, trying again: %s", error)
                    self._closed.wait(LONGEST_PAUSE)
            finally:
                if subscription is not None:
                    self._server.release(subscription, is_sound=False)

    def _turn(self, subscription: Subscription) -> None:
        event = subscription.next(SLICE)
        if event is None:
            return
        if event.key == self._channel:  # confirmed, or woken
            with self._lock:
                new, self._new = self._new, set()
            if new:
                subscription.add(new)
            return
        value = event.value
        if value is None:
            value = self._server.retrying(lambda client: client.get(event.key))
        if value is not None:
            self._arrived(subscription, event.key, value)

    def _arrived(self, subscription: Subscription, key: str, value: bytes) -> None:
        try:
            result = self._decode(value)
        except Exception:
            logger.exception("the value of %s in Redis is not a result", key)
            return
        if not result.is_ready:
            return
        with self._lock:
            callbacks = self._waiting.pop(key, [])
            is_wanted_again = key in self._new
        if not is_wanted_again:
            subscription.remove(key)
        for callback in callbacks:
            try:
                callback(result)
            except Exception:
                logger.exception("a callback for the result of task %s failed", result.task_id)
