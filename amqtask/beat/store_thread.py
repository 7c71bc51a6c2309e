"""The clerk: calls a store of entries on a thread of its own, so that a slow database never holds up the I/O loop."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from amqtask.ground.printable import bounded_logger

if TYPE_CHECKING:
    from amqtask.beat.contract import ScheduleStore
    from amqtask.pool import Loop

logger = bounded_logger("amqtask.beat")
T = TypeVar("T")
CLOSE_SECONDS = 5.0

_Job = Callable[["ScheduleStore"], None]


class Clerk:
    """Opens the store with the first question and answers all in their order. `ask` and `close` on the loop's thread."""

    def __init__(self, open_store: Callable[[], ScheduleStore], loop: Loop) -> None:
        self._open = open_store
        self._loop = loop
        self._jobs: queue.SimpleQueue[tuple[_Job, Callable[[Exception], None]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._store: ScheduleStore | None = None
        self._is_closed = False

    def ask(
        self,
        question: Callable[[ScheduleStore], T],
        on_answer: Callable[[T], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        """Call `question(store)` on the store's thread; `on_answer` or `on_error` follows on the loop."""

        def job(store: ScheduleStore) -> None:
            answer = question(store)
            self._tell(lambda: on_answer(answer))

        if self._is_closed:
            return
        self._jobs.put((job, on_error))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="beat store", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Answer what was asked, close the store; waits for that, but not for a store that hangs."""
        if self._is_closed:
            return
        self._is_closed = True
        self._jobs.put(None)
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)
            if self._thread.is_alive():
                logger.warning("beat: the schedule store does not answer; leaving it behind")

    def _run(self) -> None:
        while (queued := self._jobs.get()) is not None:
            job, on_error = queued
            try:
                if self._store is None:
                    self._store = self._open()
                job(self._store)
            except Exception as error:  # noqa: BLE001 - whatever a store raises is told to who asked
                self._tell(_bound(on_error, error))
        if self._store is not None:
            try:
                self._store.close()
            except Exception:
                logger.exception("beat: the schedule store could not be closed")

    def _tell(self, callback: Callable[[], None]) -> None:
        if not self._is_closed:
            self._loop.call_soon_threadsafe(callback)


def _bound(function: Callable[[Any], None], argument: object) -> Callable[[], None]:
    return lambda: function(argument)
