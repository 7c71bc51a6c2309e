"""ByProcess: one object per process, because a forked child must not use its parent's connections."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


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
        self._by_pid: dict[int, T] = {}

    def get(self) -> T:
        """This process's object."""
        pid = os.getpid()
        instance = self._by_pid.get(pid)
        if instance is None:
            new = self._make()
            instance = self._by_pid.setdefault(pid, new)
            if instance is not new:
                self._surplus(new)
            for other_pid in list(self._by_pid) if self._forget is not None else ():
                inherited = self._by_pid.pop(other_pid, None) if other_pid != pid else None
                if inherited is not None and self._forget is not None:
                    self._forget(inherited)
        return instance

    def pop(self) -> T | None:
        """Remove and return this process's object; None when there is none."""
        return self._by_pid.pop(os.getpid(), None)

    def peek(self) -> T | None:
        """This process's object; None when there is none."""
        return self._by_pid.get(os.getpid())
