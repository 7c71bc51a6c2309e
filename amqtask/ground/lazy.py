"""Parts that are made when they are first asked for, without a lock."""

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
