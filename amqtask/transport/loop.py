"""The worker's I/O loop: pika's, with timers that can be cancelled, readers, and an end of turn that costs no system call.

A turn is: wait for sockets and call their handlers, then callbacks from other threads, then timers that are due, then `call_soon`
callbacks in order, then `call_last`, where connections write the frames of this turn.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable
from weakref import WeakSet

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


class _Turns(IOLoop):  # type: ignore[misc]  # pika is untyped here
    """pika's loop, which ends each turn for which that is asked with `end`. A timer for it would cost each turn more than most
    of what is done in it."""

    def __init__(self, end: Callback) -> None:
        super().__init__()
        self.is_end_due = False
        self._end = end

    def process_timeouts(self) -> None:
        """Timers that are due, then the end of the turn."""
        super().process_timeouts()
        if self.is_end_due:
            # Callbacks that are added at the end run in the next turn, so that sockets are polled in between.
            self.is_end_due = False
            self._end()

    def _get_remaining_interval(self) -> float | None:
        seconds: float | None = 0 if self.is_end_due else super()._get_remaining_interval()
        return seconds


class PikaLoop:
    """One loop for the broker's sockets, the children's pipes and all timers; see amqtask.pool.Loop.

    It runs unchanged when eventlet or gevent have patched `select`: pika then polls with the functions that they left.
    """

    def __init__(self) -> None:
        self.pika = _Turns(self._end_turn)
        self._soon: list[Callback] = []
        self._last: list[Callback] = []
        self._is_ending = False
        self._is_stopping = False
        self._is_closed = False
        self._readers: dict[int, Callback] = {}
        self._writers: dict[int, Callback] = {}
        self._watched: set[int] = set()
        # pika's own wake-up takes a lock. A signal handler must not do that: it may have interrupted the holder of the lock.
        self._from_threads: deque[Callback] = deque()
        self._is_woken = False
        # Sockets, because green libraries do not wait on non-blocking sockets, while their os.write waits first.
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self.add_reader(self._wake_reader.fileno(), self._on_woken)
        # Of connections that may still be open, or on their way, when the loop ends.
        self._sockets: WeakSet[socket.socket] = WeakSet()

    # -- timers and calls

    def call_later(self, delay: float, callback: Callback) -> LoopTimer:
        """Run `callback` after `delay` seconds."""
        return LoopTimer(self.pika, delay, callback)

    def call_soon(self, callback: Callback) -> None:
        """Run at the end of this loop turn."""
        self._soon.append(callback)
        self.pika.is_end_due = True

    def call_last(self, callback: Callback) -> None:
        """Run at the very end of this loop turn, after all `call_soon` callbacks."""
        self._last.append(callback)
        if not self._is_ending:
            self.pika.is_end_due = True

    def _end_turn(self) -> None:
        batch, self._soon = self._soon, []
        self._is_ending = True
        try:
            for callback in batch:
                callback()
            self._run_last()
        finally:
            self._is_ending = False

    def _run_last(self) -> None:
        while self._last:
            batch, self._last = self._last, []
            for callback in batch:
                callback()

    def call_soon_threadsafe(self, callback: Callback) -> None:
        """From any thread, greenlet or signal handler: wakes the loop up, once for all calls that come before it looks."""
        self._from_threads.append(callback)
        if not self._is_woken and not self._is_closed:
            self._is_woken = True
            try:
                self._wake_writer.send(b"\0")
            except BlockingIOError:
                pass  # the buffer is full, so the loop wakes up anyway

    def _on_woken(self) -> None:
        try:
            self._wake_reader.recv(4096)
        except BlockingIOError:
            pass  # a nested turn (`service`) was here before
        # Before the calls are taken: a call that is appended after that must wake the loop again.
        self._is_woken = False
        for _ in range(len(self._from_threads)):
            self._from_threads.popleft()()

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
        events = (IOLoop.READ | IOLoop.ERROR if fd in self._readers else 0) | (
            IOLoop.WRITE if fd in self._writers else 0
        )
        if fd not in self._watched:
            self._watched.add(fd)
            self.pika.add_handler(fd, self._on_event, events)
        elif events:
            self.pika.update_handler(fd, events)
        else:
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
        """Turn twice without waiting, from inside a callback of `run` (a task that keeps the loop's thread): the second turn
        sends the frames of the first, such as a heartbeat."""
        for _ in range(2):
            self.pika.call_later(0, _no_op)
            self.pika.poll()
            self.pika.process_timeouts()
            self._run_last()

    def own(self, sock: socket.socket) -> None:
        """Close this, too, when the loop is closed: nobody is there any more to do it."""
        self._sockets.add(sock)

    def close(self) -> None:
        """Release the descriptors; may be called twice."""
        if not self._is_closed:
            self._is_closed = True
            self.remove_reader(self._wake_reader.fileno())
            self._wake_reader.close()
            self._wake_writer.close()
            for sock in list(self._sockets):
                sock.close()
            self.pika.close()


def _no_op() -> None:
    """A timer that only keeps a poll from waiting."""
