"""Polaroid: takes a snapshot of a state periodically, for programs that need totals and not a stream."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from amqtask.exceptions import ConfigurationError
from amqtask.ground.printable import bounded_logger
from amqtask.signals import Signal

if TYPE_CHECKING:
    from amqtask.events.state import State

logger = bounded_logger(__name__)

_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


class Polaroid:
    """Calls `on_shutter(state)` every `freq` seconds from a thread, while it is installed; the state does not change meanwhile.

        class Camera(Polaroid):
            clear_after = True

            def on_shutter(self, state):
                print(state.event_count, "events since the last one")

    `maxrate` is the most shots per second (`"10/m"` is ten a minute), also for calls of `shutter` by the program.
    `on_cleanup` is called every `cleanup_freq` seconds. With `clear_after` the state begins anew after each shot.
    Exceptions of these are logged. At the end (`cancel`) a last shot is taken.
    """

    clear_after = False
    shutter_signal = Signal("shutter_signal", ("state",))
    cleanup_signal = Signal("cleanup_signal")

    def __init__(
        self, state: State, freq: float = 1.0, maxrate: str | float | None = None, cleanup_freq: float = 3600.0,
        app: Any = None,
    ) -> None:  # fmt: skip
        self.state = state
        self.freq = freq
        self.cleanup_freq = cleanup_freq
        self.app = app
        self._pause = _pause(maxrate)
        self._last_shot = float("-inf")
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    # -- to override

    def on_shutter(self, state: State) -> None:
        """Use the state."""

    def on_cleanup(self) -> None:
        """Delete old data."""

    # -- the timers

    def install(self) -> None:
        """Start the thread."""
        if not self._threads:
            self._stop.clear()
            self._threads = [
                threading.Thread(target=self._every, args=(seconds, call), daemon=True, name=name)
                for seconds, call, name in (
                    (self.freq, self.capture, "amqtask camera"),
                    (self.cleanup_freq, self.cleanup, "amqtask camera cleanup"),
                )
            ]
            for thread in self._threads:
                thread.start()

    def cancel(self) -> None:
        """Stop, after a last shot."""
        if self._threads:
            self._stop.set()
            for thread in self._threads:
                thread.join()
            self._threads.clear()
            self.capture()

    def shutter(self) -> None:
        """Take a shot, unless `maxrate` forbids it."""
        now = time.monotonic()
        if now - self._last_shot >= self._pause:
            self._last_shot = now
            self.shutter_signal.send(sender=self.state, state=self.state)
            self.on_shutter(self.state)

    def capture(self) -> None:
        """Take a shot; the state does not change meanwhile."""
        self.state.freeze_while(self.shutter, clear_after=self.clear_after)

    def cleanup(self) -> None:
        """Call `on_cleanup` now."""
        self.cleanup_signal.send(sender=self.state)
        self.on_cleanup()

    def _every(self, seconds: float, call: Callable[[], None]) -> None:
        while not self._stop.wait(seconds):
            try:
                call()
            except Exception:  # a user's camera
                logger.exception("the camera %s failed", type(self).__qualname__)

    def __enter__(self) -> Polaroid:
        self.install()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


def _pause(rate: str | float | None) -> float:
    """The least seconds between shots, for a rate per second or like "10/m". Raises: ConfigurationError."""
    if not rate:
        return 0.0
    number, _, per = str(rate).partition("/")
    try:
        return _SECONDS[per] / float(number)
    except (KeyError, ValueError, ZeroDivisionError):
        raise ConfigurationError(f"{rate!r} is not a rate: say a number, or 10/s, 10/m, 10/h") from None
