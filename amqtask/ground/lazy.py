"""What is made when it is first asked for, without a lock: once for an object, or once for each process."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")
# What is being made, by whose frame and thread. Making imports, and a child that is forked meanwhile would wait for the locks of
# modules, which nobody holds there.
_making: dict[FrameType, int] = {}
_is_guarded: list[bool] = []
# Seconds that a fork waits for it at most.
PATIENCE = 5.0


class lazy(Generic[T]):
    """A property that is worked out once, as functools.cached_property, which up to Python 3.11 has one lock for all objects: a
    process that is forked while another thread holds it, or a signal handler that comes in between, waits for ever.

    Threads that come first at once each make one, and all get the same.
    """

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make = make
        self.__doc__ = make.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> lazy[T]: ...

    @overload
    def __get__(self, instance: object, owner: type) -> T: ...

    def __get__(self, instance: object | None, owner: type) -> lazy[T] | T:
        if instance is None:
            return self
        frame = sys._getframe()
        _making[frame] = threading.get_ident()
        try:
            if not _is_guarded:
                _is_guarded.append(True)
                os.register_at_fork(before=_finish_making)
            value: T = instance.__dict__.setdefault(self.name, self._make(instance))
        finally:
            _making.pop(frame, None)
        return value


def _finish_making() -> None:
    """Before a fork: let other threads finish what they are making."""
    until = time.monotonic() + PATIENCE
    for frame, thread in list(_making.items()):
        while frame in _making and thread != threading.get_ident() and time.monotonic() < until:
            try:
                frame.clear()
            except RuntimeError:
                time.sleep(0.001)  # it runs
            else:
                _making.pop(frame, None)  # an exception struck as it ended


# -- ByProcess: one object per process, because a forked child must not use its parent's connections.


class ByProcess(Generic[T]):
    """One object per process: `make()` at its first use. Of threads that come first at the same time all get the same one.

    `forget` is called in a child for the object that it inherited; without it that is left alone, and kept, because its end would
    close the parent's connections. `surplus` is called for an object that another thread was faster to make.
    """

    def __init__(
        self,
        make: Callable[[], T],
        forget: Callable[[T], object] | None = None,
        *,
        surplus: Callable[[T], object] = lambda instance: None,
    ) -> None:
        self._make = make
        self._forget = forget
        self._surplus = surplus
        # By process id. A hot path looks here itself.
        self.made: dict[int, T] = {}

    def get(self) -> T:
        """This process's object."""
        pid = os.getpid()
        instance = self.made.get(pid)
        if instance is None:
            new = self._make()
            instance = self.made.setdefault(pid, new)
            if instance is not new:
                self._surplus(new)
            for other_pid in list(self.made) if self._forget is not None else ():
                inherited = self.made.pop(other_pid, None) if other_pid != pid else None
                if inherited is not None and self._forget is not None:
                    self._forget(inherited)
        return instance

    def pop(self) -> T | None:
        """Remove and return this process's object; None when there is none."""
        return self.made.pop(os.getpid(), None)

    def end(self, end: Callable[[T], object]) -> None:
        """Remove this process's object, and end it; nothing when there is none."""
        instance = self.pop()
        if instance is not None:
            end(instance)

    def peek(self) -> T | None:
        """This process's object; None when there is none."""
        return self.made.get(os.getpid())
