"""Pausing: looks which queues are paused, when orders may have been missed: at the start, and after a lost connection."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from amqtask.exceptions import AccessRefused, OperationalError
from amqtask.ground.loop import OneTimer
from amqtask.ground.printable import bounded_logger
from amqtask.remote.pauses import NotOurs

if TYPE_CHECKING:
    from amqtask.pool import Loop
    from amqtask.remote.pauses import Pauses
    from amqtask.worker.operations import Operations

logger = bounded_logger("amqtask.worker")

# Seconds before another look, when the broker could not be asked.
RETRY_SECONDS = 1.0
# Before one after orders may have been missed: a worker that starts, or connects again, has tasks to see to first.
LOOK_SECONDS = 0.2


class Pausing:
    """The broker is asked in a thread: the worker goes on meanwhile. Until the first answer nothing may be consumed: with
    `knows` the worker was started with one already."""

    name = "pausing"

    def __init__(self, operations: Operations, *, loop: Loop, pauses: Pauses, knows: bool) -> None:
        self._operations = operations
        self._loop = loop
        self._pauses = pauses
        self._knows = knows
        self._is_looking = False
        self._is_stopped = False
        self._timer = OneTimer(loop)

    def start(self) -> None:
        if not self._knows:
            logger.warning("worker: consumes nothing before the broker has told which queues are paused")
            self._look()

    def stop(self) -> None:
        self._is_stopped = True
        self._timer.cancel()

    def look(self) -> None:
        """Ask soon, and do what the answer says."""
        if not self._is_stopped:
            self._timer.set(LOOK_SECONDS, self._look)

    def _look(self) -> None:
        if not self._is_looking and not self._is_stopped:
            self._is_looking = True
            threading.Thread(target=self._ask, name="amqtask pauses", daemon=True).start()

    def _ask(self) -> None:
        try:
            paused = read_pauses(self._pauses, knows=self._knows)
        except Exception:
            logger.exception("worker: the paused queues cannot be read")
            paused = None
        if not self._is_stopped:
            self._loop.call_soon_threadsafe(lambda: self._answered(paused))

    def _answered(self, paused: frozenset[str] | None) -> None:
        self._is_looking = False
        if self._is_stopped:
            return
        if paused is not None:
            self._knows = True
            self._operations.keep_paused(paused)
        elif not self._knows:
            self._timer.set(RETRY_SECONDS, self._look)


def read_pauses(pauses: Pauses, *, knows: bool = False) -> frozenset[str] | None:
    """The paused queues; None when the broker cannot be asked now. Who may not ask is told that, and none is paused.

    What somebody else has written there is nothing new to who `knows`, else none is paused: no worker would ever consume.
    """
    try:
        return frozenset(pauses.read())
    except AccessRefused as error:
        logger.warning("worker: the paused queues cannot be read, so none is taken for paused: %s", error)
        return frozenset()
    except NotOurs as error:
        logger.warning("worker: which queues are paused now is not known: %s", error)
        return None if knows else frozenset()
    except OperationalError as error:
        logger.debug("worker: the paused queues cannot be read now: %s", error)
        return None
