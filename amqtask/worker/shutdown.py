"""How a worker stops: warm, soft, cold; by signals, remote control, or because it cannot go on.

    running ──TERM, INT──► warm: no new deliveries; waiting requests are requeued, running ones end; exit code 0
       │                     │ end of worker_shutdown_timeout, or a second TERM or INT, or QUIT
       └──QUIT──► soft ◄─────┤ (only with worker_soft_shutdown_timeout, and only while something runs)
                    │        ▼
                    └─────► cold: running requests are ended and requeued; exit code 1; the next signal exits at once

HUP is warm, too, and then the worker starts anew (`restarts`), with the present code and configuration; TERM after it counts as
the first TERM, and the worker does not start anew. A worker on a terminal has lost it with HUP, and does not start anew. A
program that was started with HUP ignored (nohup) goes on ignoring it.

`REMAP_SIGTERM=SIGQUIT` makes TERM mean QUIT, as in Celery.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from amqtask import signals
from amqtask.ground.loop import OneTimer
from amqtask.ground.printable import bounded_logger

if TYPE_CHECKING:
    from amqtask.pool import Loop
    from amqtask.worker.options import WorkerSetup

logger = bounded_logger(__name__)

EX_OK = 0
EX_FAILURE = 1
# After a cold stop confirms of results are awaited for so many seconds.
LAST_CONFIRMS_SECONDS = 3.0


class Degree(IntEnum):
    """How far the shutdown has come; it only rises."""

    RUNNING = 0
    WARM = 1
    SOFT = 2
    COLD = 3
    CLOSING = 4


class Stoppable(Protocol):
    """The worker's methods that the shutdown calls."""

    @property
    def is_busy(self) -> bool:
        """Whether a request runs."""

    @property
    def is_settled(self) -> bool:
        """Whether no request runs, and none waits for confirms or its ack."""

    @property
    def waits_for(self) -> str:
        """Why it is not settled, for the log."""

    def quiet(self) -> None:
        """Take no more deliveries, requeue waiting requests."""

    def abandon(self) -> None:
        """End running requests now, and requeue them."""

    def close(self) -> None:
        """Flush and close connections, then end the loop."""

    def halt(self) -> None:
        """End the loop at once."""


class Shutdown:
    """Steps through the degrees of a shutdown."""

    def __init__(self, worker: Stoppable, loop: Loop, setup: WorkerSetup) -> None:
        self._worker = worker
        self._setup = setup
        self._timer = OneTimer(loop)
        self.degree = Degree.RUNNING
        self.exit_code = EX_OK
        # Whether the worker starts again once it has stopped.
        self.restarts = False

    def on_signal(self, signum: int) -> None:
        """TERM, INT, QUIT or HUP came."""
        name = signal.Signals(signum).name
        if signum == signal.SIGHUP:
            self._hang_up()
            return
        was_to_restart, self.restarts = self.restarts, False
        wants_quit = signum == signal.SIGQUIT or (signum == signal.SIGTERM and self._setup.term_is_quit)
        if self.degree >= Degree.COLD:
            self._worker.halt()
        elif not wants_quit and (was_to_restart or self.degree is Degree.RUNNING):
            if signum == signal.SIGINT:
                logger.warning("worker: Hitting Ctrl+C again will end all running tasks!")
            self.warm(name)
        else:
            self.quit(name)

    def _hang_up(self) -> None:
        if self.degree is Degree.RUNNING:
            self.restarts = not _has_terminal()
            logger.warning(
                "worker: SIGHUP: it starts anew when what runs has ended"
                if self.restarts
                else "worker: SIGHUP: its terminal is gone"
            )
        self.warm("SIGHUP")

    def warm(self, signal_name: str | None = None) -> None:
        """Let running requests end."""
        if signal_name != "SIGHUP":
            self.restarts = False
        if self.degree >= Degree.WARM:
            return
        self._begin(Degree.WARM, signal_name, "Warm", EX_OK)
        self._worker.quiet()
        if self._setup.shutdown_timeout is not None:
            self._timer.set(self._setup.shutdown_timeout, self._grace_is_over)
        if not self._worker.is_settled:
            logger.warning("worker: waits for %s", self._worker.waits_for)
        self.progress()

    def quit(self, signal_name: str | None = None) -> None:
        """Shut down cold, after the time of the soft shutdown if there is one and requests run."""
        if (
            self.degree >= Degree.SOFT
            or self._setup.soft_shutdown_timeout <= 0
            or not (self._worker.is_busy or self._setup.soft_shutdown_on_idle)
        ):
            self.cold(signal_name)
            return
        self._begin(Degree.SOFT, signal_name, "Soft", EX_FAILURE)
        self._worker.quiet()
        logger.warning("worker: running tasks have %g seconds to end", self._setup.soft_shutdown_timeout)
        self._timer.set(self._setup.soft_shutdown_timeout, self.cold)
        if not self._setup.soft_shutdown_on_idle:
            self.progress()

    def cold(self, signal_name: str | None = None) -> None:
        """End running requests and requeue them."""
        if self.degree >= Degree.COLD:
            return
        self._begin(Degree.COLD, signal_name, "Cold", EX_FAILURE)
        self._worker.quiet()
        self._worker.abandon()
        self._timer.set(LAST_CONFIRMS_SECONDS, self._close)
        self.progress()

    def fail(self, error: BaseException) -> None:
        """The worker cannot go on."""
        logger.critical("worker: cannot go on: %s", error)
        self.cold()

    def progress(self) -> None:
        """Called whenever a request has ended; closes the worker when all are settled."""
        if Degree.WARM <= self.degree < Degree.CLOSING and self._worker.is_settled:
            self._close()

    def _begin(self, degree: Degree, signal_name: str | None, how: str, exit_code: int) -> None:
        self._timer.cancel()
        self.degree = degree
        self.exit_code = max(self.exit_code, exit_code)
        logger.warning("worker: %s shutdown%s", how, f" ({signal_name})" if signal_name else "")
        if signals.worker_shutting_down:
            signals.worker_shutting_down.send(
                sender=self._setup.hostname, sig=signal_name, how=how, exitcode=self.exit_code
            )

    def _grace_is_over(self) -> None:
        logger.warning("worker: running tasks did not end within %g seconds", self._setup.shutdown_timeout)
        self.cold()

    def _close(self) -> None:
        if self.degree < Degree.CLOSING:
            self._timer.cancel()
            self.degree = Degree.CLOSING
            self._worker.close()


class SignalHandlers:
    """TERM, INT, QUIT and HUP to `on_signal` on the loop; USR1 prints all stacks. `restore` puts the old ones back.

    The stacks are printed by Python's handler: `faulthandler.register` would read the frames of threads that run on
    meanwhile, and its process dies when one of them has just ended.
    """

    SIGNALS = ("SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP")

    def __init__(self, loop: Loop, on_signal: Callable[[int], None]) -> None:
        self._loop = loop
        self._on_signal = on_signal
        self._previous: dict[int, Any] = {}
        self._process = 0
        self._received: list[int] = []

    def install(self) -> bool:
        """Install the handlers; False in any thread but the main one, where Python takes no handlers.

        Only a try shows that: under eventlet the main greenlet is not reported as the main thread."""
        self._process = os.getpid()
        for name in self.SIGNALS:
            signum = getattr(signal, name, None)
            if signum is not None and not (name == "SIGHUP" and signal.getsignal(signum) == signal.SIG_IGN):
                try:
                    self._previous[signum] = signal.signal(signum, self._note)
                except ValueError:
                    return False
        if hasattr(signal, "SIGUSR1") and (stream := _stream_with_file()) is not None:
            self._previous[signal.SIGUSR1] = signal.signal(
                signal.SIGUSR1, lambda signum, frame: faulthandler.dump_traceback(stream, all_threads=True)
            )
        return True

    def restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    def _note(self, signum: int, frame: object) -> None:
        # A forked child that has not installed its own handlers must not act on the parent's loop.
        if os.getpid() != self._process:
            # What a task has forked may be terminated. INT and QUIT of a terminal are for the worker, which lets tasks finish.
            if signum == signal.SIGTERM:
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
            return
        self._received.append(signum)
        self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        while self._received:
            self._on_signal(self._received.pop(0))


def _stream_with_file() -> TextIO | None:
    """Standard error, if it is a file of the system: a test's stream may be none."""
    try:
        return sys.stderr if sys.stderr.fileno() >= 0 else None
    except (AttributeError, OSError, ValueError):
        return None


def _has_terminal() -> bool:
    return any(os.isatty(number) for number in (0, 1, 2))
