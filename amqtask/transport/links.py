"""Links: the connections of one process, and which call has which, without a lock.

A call has a link from the moment in which `held` names the call's frame for it. One dictionary method does that, which nothing
can interrupt; so a signal handler, a finalizer or another thread that comes in between takes another link. Nor must a call
clean up: when its frame has ended (an exception struck at any line, even in a `finally`), what it had is free to be
dropped. A link that was dropped is never given out again, so dropping it twice is the same as once.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Generic, TypeVar

from amqtask.transport.link import Link

L = TypeVar("L", bound=Link)
T = TypeVar("T")
# Pauses between looks for a link that has become free (seconds). Sleeping is what every kind of thread can do.
FIRST_PAUSE, LONGEST_PAUSE = 0.0005, 0.01


class Links(Generic[L]):
    """At most `limit` links, made by `make`."""

    def __init__(self, limit: int, make: Callable[[], L]) -> None:
        self.pid = os.getpid()
        self._limit = limit
        self._make = make
        # In the order in which they were made.
        self._all: dict[L, None] = {}
        self._held: dict[L, FrameType] = {}

    def __len__(self) -> int:
        return len(self._all)

    def take(self, frame: FrameType, deadline: float, suits: Callable[[L], bool] = lambda link: True) -> L | None:
        """A free link, or a new one that is not open, for the call of this frame; None when the deadline passed before.

        Free links that do not suit are dropped."""
        pause = FIRST_PAUSE
        while True:
            link = self.try_take(frame, suits)
            if link is not None:
                return link
            seconds_left = deadline - time.monotonic()
            if seconds_left <= 0:
                return None
            time.sleep(min(pause, seconds_left))
            pause = min(pause * 2, LONGEST_PAUSE)

    def try_take(self, frame: FrameType, suits: Callable[[L], bool] = lambda link: True) -> L | None:
        """The same without waiting."""
        return self.take_free(frame, suits) or self._take_new(frame)

    def take_free(self, frame: FrameType, suits: Callable[[L], bool] = lambda link: True) -> L | None:
        """A link that nobody has; the first, so that the others are left alone when few are needed."""
        for link in list(self._all):
            if link not in self._held and self._held.setdefault(link, frame) is frame:
                if suits(link):
                    return link
                self.drop(link)
        return None

    def _take_new(self, frame: FrameType) -> L | None:
        self.reclaim()
        room = self._limit if len(self._all) < self._limit else self._limit + self._held_up_stack(frame)
        if len(self._all) >= room:
            return None
        link = self._make()
        self._held[link] = frame
        self._all[link] = None
        # Of several that come at once for the last place, the first has it.
        if list(self._all).index(link) < room:
            return link
        self.drop(link)
        return None

    def _held_up_stack(self, frame: FrameType | None) -> int:
        """How many links calls further up this very stack have: they cannot give them back while this one waits."""
        holders = list(self._held.values())
        count = 0
        while frame is not None:
            count += sum(holder is frame for holder in holders)
            frame = frame.f_back
        return count

    def give_back(self, link: L) -> None:
        """It is free, and in the state in which the next call may use it."""
        if len(self._all) > self._limit:
            self.drop(link)
        else:
            self._held.pop(link, None)

    def drop(self, link: L) -> None:
        """It is of no use any more."""
        link.discard()
        self._all.pop(link, None)
        self._held.pop(link, None)

    def reclaim(self) -> None:
        """Drop what calls have that have ended."""
        for link, frame in list(self._held.items()):
            try:
                frame.clear()
            except RuntimeError:
                continue  # it runs
            self.drop(link)

    def is_held_here(self) -> bool:
        """Whether the calling thread has one, further up its stack."""
        return bool(self._held) and self._held_up_stack(sys._getframe(1)) > 0

    def close(self, timeout: float) -> None:
        """Say goodbye on those that are free; not longer than `timeout` seconds."""
        deadline = time.monotonic() + timeout
        frame = sys._getframe()
        while (link := self.take_free(frame)) is not None:
            if self.pid == os.getpid():
                link.close(deadline - time.monotonic())
            self.drop(link)

    def forget(self) -> None:
        """In a forked child: the parent goes on with its links; only our copies of their sockets are closed."""
        for link in list(self._all):
            link.discard()


def say_goodbye(by_process: ByProcess[Links[L]], timeout: float) -> None:
    """At the end of the program: leave the broker properly, so that it does not log a lost client."""
    links = by_process.peek()
    if links is not None:
        links.close(timeout)


class ByProcess(Generic[T]):
    """What each process has of its own: `make()`, at its first use; a forked child calls `forget` with what it inherited."""

    def __init__(self, make: Callable[[], T], forget: Callable[[T], object]) -> None:
        self._make = make
        self._forget = forget
        self._by_pid: dict[int, T] = {}

    def get(self) -> T:
        """This process's; of threads that come first at once, each gets the same one."""
        pid = os.getpid()
        instance = self._by_pid.get(pid)
        if instance is None:
            instance = self._by_pid.setdefault(pid, self._make())
            for other_pid in list(self._by_pid):
                inherited = self._by_pid.pop(other_pid, None) if other_pid != pid else None
                if inherited is not None:
                    self._forget(inherited)
        return instance

    def pop(self) -> T | None:
        """This process's, which is its no more; None where there is none."""
        return self._by_pid.pop(os.getpid(), None)

    def peek(self) -> T | None:
        """This process's, where it has one."""
        return self._by_pid.get(os.getpid())
