"""The worker's I/O loop: pika's, with timers that can be cancelled, readers, and an end of turn that costs no system call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pika.adapters.select_connection import IOLoop

Callback = Callable[[], None]


class LoopTimer:
    """A pending call of a PikaLoop."""

    __slots__ = ("_handle", "_loop")

    def __init__(self, loop: IOLoop, delay: float, callback: Callback) -> None:
        self._loop: IOLoop | None = loop

        def run() -> None:
            self._loop = None
            callback()

        self._handle = loop.call_later(delay, run)

    def cancel(self) -> None:
        """Forget it; harmless when it ran or was cancelled."""
        if self._loop is not None:
            self._loop.remove_timeout(self._handle)
            self._loop = None


class PikaLoop:
    """One loop for the broker's sockets, the children's pipes and all timers; see amqtask.pool.Loop.

    It runs unchanged when eventlet or gevent have patched `select`: pika then polls with what they left.
    """

    def __init__(self) -> None:
        self.pika = IOLoop()
        self._soon: list[Callback] = []
        self._is_stopping = False
        self._readers: dict[int, Callback] = {}
        self._writers: dict[int, Callback] = {}
        self._watched: set[int] = set()

    # -- timers and calls

    def call_later(self, delay: float, callback: Callback) -> LoopTimer:
        """Run `callback` after `delay` seconds."""
        return LoopTimer(self.pika, delay, callback)

    def call_soon(self, callback: Callback) -> None:
        """Run at the end of this loop turn; all such calls hang on one timer."""
        if not self._soon:
            self.pika.call_later(0, self._run_soon)
        self._soon.append(callback)

    def _run_soon(self) -> None:
        # Callbacks that ask for another turn get the next one, so that sockets are looked at in between.
        batch, self._soon = self._soon, []
        for callback in batch:
            callback()

    def call_soon_threadsafe(self, callback: Callback) -> None:
        """From any thread, greenlet or signal handler: wakes the loop up."""
        self.pika.add_callback_threadsafe(callback)

    # -- file descriptors

    def add_reader(self, fd: int, callback: Callback) -> None:
        """Call when `fd` has something to read (or its other end is gone)."""
        self._readers[fd] = callback
        self._watch(fd)

    def remove_reader(self, fd: int) -> None:
        """Stop watching; harmless when it was not watched."""
        if self._readers.pop(fd, None) is not None:
            self._watch(fd)

    def add_writer(self, fd: int, callback: Callback) -> None:
        """Call while `fd` takes writes."""
        self._writers[fd] = callback
        self._watch(fd)

    def remove_writer(self, fd: int) -> None:
        """Stop watching; harmless when it was not watched."""
        if self._writers.pop(fd, None) is not None:
            self._watch(fd)

    def _watch(self, fd: int) -> None:
        wanted = (IOLoop.READ | IOLoop.ERROR if fd in self._readers else 0) | (
            IOLoop.WRITE if fd in self._writers else 0
        )
        self._forget(fd)
        if wanted:
            self._watched.add(fd)
            self.pika.add_handler(fd, self._on_event, wanted)

    def _forget(self, fd: int) -> None:
        if fd in self._watched:
            self._watched.discard(fd)
            self.pika.remove_handler(fd)

    def _on_event(self, fd: int, events: int) -> None:
        # A hang-up (the other end of a pipe is closed) comes alone, without READ.
        if events & ~IOLoop.WRITE:
            reader = self._readers.get(fd)
            if reader is not None:
                reader()
        if events & IOLoop.WRITE:
            writer = self._writers.get(fd)
            if writer is not None:
                writer()

    # -- running

    def run(self) -> None:
        """Until `stop`; returns at once when it was stopped before."""
        if not self._is_stopping:
            self.pika.start()
        self._is_stopping = False

    def stop(self) -> None:
        """End `run` after the present turn; on the loop's thread."""
        self._is_stopping = True
        self.pika.stop()

    def run_once(self, timeout: float = 0.0) -> None:
        """Turn the loop for `timeout` seconds, from outside `run`."""
        self.pika.call_later(timeout, self.pika.stop)
        self.pika.start()

    def service(self) -> None:
        """One turn that waits for nothing, from inside a callback of `run` (a task that keeps the loop's thread)."""
        self.pika.call_later(0, _nothing)
        self.pika.poll()
        self.pika.process_timeouts()

    def close(self) -> None:
        """Release what the poller holds."""
        closing: Any = getattr(self.pika, "close", None)
        if closing is not None:
            closing()


def _nothing() -> None:
    """A timer that only keeps a poll from waiting."""
