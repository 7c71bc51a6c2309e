"""What a service manager is told: systemd's notifications (sd_notify(3)), for units with `Type=notify` and `WatchdogSec=`."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from amqtask.ground.loop import Ticker
from amqtask.ground.printable import bounded_logger

if TYPE_CHECKING:
    from amqtask.ground.loop import Loop

logger = bounded_logger("amqtask.systemd")

# Seconds between two looks, at most.
LOOK_EVERY = 1.0


def is_asked() -> bool:
    """Whether a service manager listens."""
    return bool(os.environ.get("NOTIFY_SOCKET"))


def notify(message: str, environment: Mapping[str, str] = os.environ) -> None:
    """Send one notification, such as READY=1, without waiting; nothing where nobody listens."""
    address = environment.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        try:
            # An @ stands for the NUL of an abstract address.
            sender.sendto(message.encode(), "\0" + address[1:] if address.startswith("@") else address)
        except OSError as error:
            logger.warning("the service manager was not told %s: %s", message, error)


def watchdog_seconds(environment: Mapping[str, str] = os.environ) -> float | None:
    """WatchdogSec of this process' unit; None: it has none."""
    microseconds, process = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
    if not microseconds.isdigit() or (process and process != str(os.getpid())):
        return None
    return int(microseconds) / 1e6 or None


class Notifier:
    """A service of an event loop: READY=1 when it is ready, WATCHDOG=1 while it is healthy, STOPPING=1 when it begins to end.

    It runs on the loop, so that a loop that does not turn is not healthy either.
    """

    name = "systemd"

    def __init__(
        self,
        loop: Loop,
        *,
        is_ready: Callable[[], bool] = lambda: True,
        is_healthy: Callable[[], bool] = lambda: True,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._is_ready, self._is_healthy, self._is_stopping = is_ready, is_healthy, is_stopping
        self._is_watched = watchdog_seconds()
        self._told: set[str] = set()
        self._ticker = Ticker(loop, min(LOOK_EVERY, (self._is_watched or LOOK_EVERY) / 3), self.look)

    def start(self) -> None:
        self._ticker.start()

    def stop(self) -> None:
        self._ticker.stop()
        self._tell_once("STOPPING=1")

    def look(self) -> None:
        """Tell what there is to tell."""
        if self._is_stopping():
            self._tell_once("STOPPING=1")
        elif self._is_ready():
            self._tell_once("READY=1")
        if self._is_watched and self._is_healthy():
            notify("WATCHDOG=1")

    def _tell_once(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            notify(message)
