"""A scheduler that keeps time itself, on a thread of its own beside beat's loop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from amqtask.ground.printable import bounded_logger

if TYPE_CHECKING:
    from amqtask.pool import Loop

logger = bounded_logger("amqtask.beat")


class Ticking:
    """Starts `run(is_stopped, on_start)` on a thread; whatever it raises ends beat. A thread that hangs (in a lock, a database)
    holds up nobody's end."""

    name = "beat"
    is_busy = False

    def __init__(
        self,
        run: Callable[[threading.Event, Callable[[Any], None]], None],
        loop: Loop,
        *,
        on_start: Callable[[Any], None],
        on_failed: Callable[[Exception], None],
    ) -> None:
        self._tick = run
        self._loop = loop
        self._on_start = on_start
        self._on_failed = on_failed
        self._is_stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._on_stopped: Callable[[], None] | None = None

    def start(self) -> None:
        """Begin."""
        if self._thread is None:
            logger.info("beat: Starting...")
            self._thread = threading.Thread(target=self._run, name="beat scheduler", daemon=True)
            self._thread.start()

    def stop(self, on_stopped: Callable[[], None] | None = None) -> None:
        """Send nothing more; `on_stopped` follows on the loop when the scheduler has closed."""
        if self._is_stopped.is_set():
            return
        logger.info("beat: Shutting down...")
        self._on_stopped = on_stopped
        self._is_stopped.set()
        if self._thread is None or not self._thread.is_alive():
            self._loop.call_soon(self._ended)

    def _run(self) -> None:
        try:
            self._tick(self._is_stopped, self._on_start)
        except Exception as error:  # a user's scheduler
            logger.critical("beat: the scheduler has ended: %s", error, exc_info=True)
            failure = error
            self._loop.call_soon_threadsafe(lambda: self._on_failed(failure))
        self._loop.call_soon_threadsafe(self._ended)

    def _ended(self) -> None:
        on_stopped, self._on_stopped = self._on_stopped, None
        if on_stopped is not None:
            on_stopped()
