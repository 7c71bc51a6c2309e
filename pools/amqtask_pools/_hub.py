"""What eventlet and gevent have in common, as the green pools use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from selectors import DefaultSelector


class Cancellable(Protocol):
    """A timeout that has been started."""

    def cancel(self) -> object: ...


class Hub(Protocol):
    """What the two libraries have in common, under one name. `patch_line` is how a program patches by itself."""

    patch_line: ClassVar[str]

    @staticmethod
    def patch() -> None:
        """Monkey-patch the standard library."""

    @staticmethod
    def is_patched() -> bool:
        """Whether that was done, by whomever."""

    def current(self) -> Any:
        """The green thread that runs."""

    def make(self, function: Callable[..., None], argument: Any) -> tuple[Any, tuple[Any, ...]]:
        """A green thread that has not run, and what its first `switch` must be given."""

    def spawn(self, function: Callable[[], None]) -> None:
        """Run it in a green thread of its own, soon."""

    def call_soon(self, callback: Callable[..., Any], *arguments: Any) -> None:
        """Run it in the hub, soon. It must not wait."""

    def wait(self) -> None:
        """Leave the current green thread until somebody switches to it."""

    def sleep(self, seconds: float) -> None: ...

    def wait_readable(self, fileno: int, seconds: float | None) -> None:
        """Leave the current green thread until this can be read, the time is over or somebody switches to it."""

    def native_selector(self) -> DefaultSelector:
        """The best selector of the system, whatever is patched; it has a file descriptor of its own."""

    def timeout(self, seconds: float, error: BaseException) -> Cancellable:
        """Raise `error` in the current green thread unless it is cancelled before."""

    def start_native_thread(self, function: Callable[[], None]) -> None:
        """A thread of the operating system, whatever is patched."""

    def native_ident(self) -> int:
        """The operating system thread that runs, as sys._current_frames knows it."""

    def native_sleep(self, seconds: float) -> None: ...
