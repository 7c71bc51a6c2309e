"""eventlet: a slot is a green thread of eventlet's."""

from __future__ import annotations

import warnings
from collections.abc import Callable

# Now, before it is patched.
from selectors import DefaultSelector
from typing import TYPE_CHECKING, Any, ClassVar

from amqtask_pools._green import GreenPool

with warnings.catch_warnings():
    # It warns that it is in maintenance mode; with -P eventlet that was decided, and every worker start would repeat it.
    warnings.simplefilter("ignore")
    import eventlet
    from eventlet import hubs, patcher
    from eventlet.greenthread import GreenThread

if TYPE_CHECKING:
    from amqtask.pool import Timer
    from amqtask_pools._hub import Hub


class EventletHub:
    """See amqtask_pools._hub.Hub. It belongs to the thread that makes it."""

    patch_line: ClassVar[str] = "import eventlet; eventlet.monkey_patch()"

    def __init__(self) -> None:
        self._hub = hubs.get_hub()
        # eventlet leaves its hub with these, and the worker with it: a thread that a task has left would end all other tasks.
        self._hub.SYSTEM_EXCEPTIONS = (KeyboardInterrupt,)
        self.current: Callable[[], object] = eventlet.getcurrent
        self.wait: Callable[[], Any] = self._hub.switch
        self.sleep: Callable[[float], Any] = eventlet.sleep
        self.spawn: Callable[[Callable[[], None]], Any] = eventlet.spawn_n

    @staticmethod
    def patch() -> None:
        """Patch all that eventlet can patch."""
        eventlet.monkey_patch()

    @staticmethod
    def is_patched() -> bool:
        """Whether the modules that waiting tasks need are patched."""
        return bool(patcher.is_monkey_patched("socket") and patcher.is_monkey_patched("time"))

    def make(self, function: Callable[..., None], argument: object) -> tuple[object, tuple[object, ...]]:
        """A GreenThread takes its function with the first switch."""
        self._hub.ensure_greenlet()
        return GreenThread(self._hub.greenlet), (function, (argument,), {})

    def call_soon(self, callback: Callable[..., object], *arguments: object) -> None:
        """By a timer that is due."""
        self._hub.schedule_call_global(0, callback, *arguments)

    def wait_readable(self, fileno: int, seconds: float | None) -> None:
        """By a listener and, with a timeout, a timer."""
        hub, current = self._hub, eventlet.getcurrent()
        timer = None if seconds is None else hub.schedule_call_global(seconds, current.switch)
        listener = hub.add(hub.READ, fileno, current.switch, current.throw, None)
        try:
            hub.switch()
        finally:
            hub.remove(listener)
            if timer is not None:
                timer.cancel()

    def native_selector(self) -> DefaultSelector:
        """The selector from before the patch."""
        return DefaultSelector()

    def timeout(self, seconds: float, error: BaseException) -> Timer:
        """eventlet's own timeout."""
        started: Timer = eventlet.Timeout(seconds, error)
        return started

    def start_native_thread(self, function: Callable[[], None]) -> None:
        """A daemon thread, as all threads that are started like this."""
        patcher.original("_thread").start_new_thread(function, ())

    def native_ident(self) -> int:
        """The unpatched threading.get_ident."""
        return int(patcher.original("_thread").get_ident())

    def native_sleep(self, seconds: float) -> None:
        """The unpatched time.sleep."""
        patcher.original("time").sleep(seconds)

    def begin_anew(self) -> None:
        """By another hub: timers and listeners of the one before are never resumed."""
        hubs.use_hub(type(self._hub))


class EventletPool(GreenPool):
    """See amqtask.pool.Pool."""

    name: ClassVar[str] = "eventlet"
    hub_class: ClassVar[type[Hub]] = EventletHub
