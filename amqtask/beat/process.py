"""A process that does nothing but beat: its loop, its signals, its end."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from amqtask.worker.shutdown import EX_FAILURE, EX_OK, SignalHandlers

if TYPE_CHECKING:
    from amqtask.beat.contract import BeatService
    from amqtask.pool import Loop

# Seconds that the end of the process waits for messages on their way to the broker.
STOP_SECONDS = 5.0


class RunnableLoop(Protocol):
    """A loop that this process turns."""

    def run(self) -> None: ...

    def stop(self) -> None: ...

    def close(self) -> None: ...


class Service(Protocol):
    """A service that runs on beat's loop, too."""

    def start(self) -> None: ...

    def stop(self) -> None: ...


class BeatProcess:
    """Runs one beat until TERM, INT or QUIT, or until it cannot go on. A second signal ends it on the spot."""

    def __init__(
        self,
        loop: Loop,
        runner: RunnableLoop,
        make_beat: Callable[[Callable[[Exception], None]], BeatService],
        companion: Service | None = None,
    ) -> None:
        self._companion = companion
        self._loop = loop
        self._runner = runner
        self.beat = make_beat(self._fail)
        self.exit_code = EX_OK
        self._is_ending = False
        self._handlers = SignalHandlers(loop, self._on_signal)

    def run(self, *, install_signals: bool = True) -> int:
        """Run beat until it ends; returns the exit code."""
        if install_signals:
            self._handlers.install()
        try:
            self.beat.start()
            if self._companion is not None:
                self._companion.start()
            self._runner.run()
        finally:
            self._handlers.restore()
            self._runner.close()
        return self.exit_code

    def stop(self) -> None:
        """End in good order; may be called from any thread."""
        self._loop.call_soon_threadsafe(lambda: self._on_signal(signal.SIGTERM))

    def _on_signal(self, signum: int) -> None:
        if self._is_ending:
            self._runner.stop()
            return
        self._is_ending = True
        if self._companion is not None:
            self._companion.stop()
        self.beat.stop(self._runner.stop)
        self._loop.call_later(STOP_SECONDS, self._runner.stop)

    def _fail(self, error: Exception) -> None:
        self.exit_code = EX_FAILURE
        self._on_signal(signal.SIGTERM)
