"""gevent: a slot is a greenlet of gevent's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import gevent
from gevent import monkey
from gevent.hub import set_hub, set_loop

from amqtask_pools._green import GreenPool

if TYPE_CHECKING:
    from selectors import DefaultSelector

    from amqtask.pool import Timer
    from amqtask_pools._hub import Hub


class GeventHub:
    """See amqtask_pools._hub.Hub. It belongs to the thread that makes it."""

    patch_line: ClassVar[str] = "from gevent import monkey; monkey.patch_all()"

    def __init__(self) -> None:
        hub = self._hub = gevent.get_hub()
        # gevent raises these in the main greenlet, which is the worker's: a greenlet that a task has left would end all others.
        hub.SYSTEM_ERROR = (KeyboardInterrupt,)
        self.call_soon: Callable[..., Any] = hub.loop.run_callback
        self.current: Callable[[], object] = gevent.getcurrent
        self.wait: Callable[[], Any] = hub.switch
        self.sleep: Callable[[float], Any] = gevent.sleep
        self.spawn: Callable[[Callable[[], None]], Any] = gevent.spawn_raw

    @staticmethod
    def patch() -> None:
        """Patch all that gevent patches by default."""
        monkey.patch_all()

    @staticmethod
    def is_patched() -> bool:
        """Whether the modules that waiting tasks need are patched."""
        return bool(monkey.is_module_patched("socket") and monkey.is_module_patched("time"))

    def make(self, function: Callable[..., None], argument: object) -> tuple[object, tuple[object, ...]]:
        """A greenlet that is not started: the first switch starts it."""
        return gevent.Greenlet(function, argument), ()

    def wait_readable(self, fileno: int, seconds: float | None) -> None:
        """By a watcher and, with a timeout, a timer."""
        loop, switch = self._hub.loop, gevent.getcurrent().switch
        watchers = [loop.io(fileno, 1)]
        if seconds is not None:
            watchers.append(loop.timer(seconds))
        try:
            for watcher in watchers:
                watcher.start(switch)
            self._hub.switch()
        finally:
            for watcher in watchers:
                watcher.stop()
                watcher.close()

    def native_selector(self) -> DefaultSelector:
        """The unpatched selectors.DefaultSelector."""
        selector: DefaultSelector = monkey.get_original("selectors", "DefaultSelector")()
        return selector

    def timeout(self, seconds: float, error: BaseException) -> Timer:
        """gevent's own timeout."""
        started: Timer = gevent.Timeout.start_new(seconds, error)
        return started

    def start_native_thread(self, function: Callable[[], None]) -> None:
        """A daemon thread, as all threads that are started like this."""
        monkey.get_original("_thread", "start_new_thread")(function, ())

    def native_ident(self) -> int:
        """The unpatched threading.get_ident."""
        return int(monkey.get_original("_thread", "get_ident")())

    def native_sleep(self, seconds: float) -> None:
        """The unpatched time.sleep."""
        monkey.get_original("time", "sleep")(seconds)

    def begin_anew(self) -> None:
        """By another hub with another loop. Not Hub.destroy, which returns to the thread's main greenlet."""
        if gevent.get_hub() is self._hub:
            self._hub.loop.destroy()
            set_hub(None)
            set_loop(None)


class GeventPool(GreenPool):
    """See amqtask.pool.Pool."""

    name: ClassVar[str] = "gevent"
    hub_class: ClassVar[type[Hub]] = GeventHub
