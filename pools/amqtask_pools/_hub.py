"""What eventlet and gevent have in common, as the green pools use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from selectors import DefaultSelector


class Cancellable(Protocol):
    """A timeout that has been started."""

    def cancel(self) -> object: ...


class Hub(Protocol):
    """The functions that the pool needs of a library. `patch_line` is the line with which a program patches by itself."""

    patch_line: ClassVar[str]

    @staticmethod
    def patch() -> None:
        """Monkey-patch the standard library."""

    @staticmethod
    def is_patched() -> bool:
        """Whether it is patched, by us or by the program."""

    def current(self) -> object:
        """The green thread that runs."""

    def make(self, function: Callable[..., None], argument: object) -> tuple[object, tuple[object, ...]]:
        """A green thread that has not run, and the arguments for its first `switch`."""

    def spawn(self, function: Callable[[], None]) -> None:
        """Run a function in a green thread of its own, soon."""

    def call_soon(self, callback: Callable[..., object], *arguments: object) -> None:
        """Run a callback in the hub, soon. It must not wait."""

    def wait(self) -> None:
        """Leave the current green thread until another one switches to it."""

    def sleep(self, seconds: float) -> None: ...

    def wait_readable(self, fileno: int, seconds: float | None) -> None:
        """Leave the current green thread until the descriptor is readable, the time is over or another one switches to it."""

    def native_selector(self) -> DefaultSelector:
        """The system's best selector, unpatched; it has a file descriptor of its own."""

    def timeout(self, seconds: float, error: BaseException) -> Cancellable:
        """Raise `error` in the current green thread unless it is cancelled before."""

    def start_native_thread(self, function: Callable[[], None]) -> None:
        """Start a thread of the operating system, unpatched."""

    def native_ident(self) -> int:
        """The id of the running operating system thread, as in sys._current_frames."""

    def native_sleep(self, seconds: float) -> None: ...

    def begin_anew(self) -> None:
        """In a process that was just forked: only the current green thread goes on, the parent's others are its own."""
