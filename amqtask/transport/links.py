"""Links: the connections of one process, and which call has which link, without a lock.

A call has a link from the moment in which `_held` maps the link to the call's frame. One dictionary method does that, which
nothing can interrupt; so a signal handler, a finalizer or another thread that comes in between takes another link. A call need
not clean up either: when its frame has ended (an exception was raised at any line, even in a `finally`), its link is free to be
dropped. A link that was dropped is never given out again, so dropping it twice does no harm.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Generic, TypeVar

from amqtask.ground.by_process import ByProcess
from amqtask.transport.link import Link

L = TypeVar("L", bound=Link)
# Pauses between looks for a link that has become free (seconds). Every kind of thread can sleep.
FIRST_PAUSE, LONGEST_PAUSE = 0.0005, 0.01


class Links(Generic[L]):
    """At most `limit` links, made by `make`."""

    def __init__(self, limit: int, make: Callable[[], L]) -> None:
        self.pid = os.getpid()
        self._limit = limit
        self._make = make
        # In the order in which they were made.
        self._all: dict[L, None] = {}
        # The frame of the call that has the link.
        self._held: dict[L, FrameType] = {}

    def __len__(self) -> int:
        return len(self._all)

    def take(self, frame: FrameType, deadline: float, suits: Callable[[L], bool] = lambda link: True) -> L | None:
        """A free link, or a new one that is not open, for the call of this frame; None when the deadline passes before.

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
        """Like `take`, without waiting."""
        return self.take_free(frame, suits) or self._take_new(frame)

    def take_free(self, frame: FrameType, suits: Callable[[L], bool] = lambda link: True) -> L | None:
        """A link that no call has: the first one, so that the others stay idle when few are needed."""
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
        # Of several calls that come at once, only as many as there is room for keep their link.
        if list(self._all).index(link) < room:
            return link
        self.drop(link)
        return None

    def _held_up_stack(self, frame: FrameType | None) -> int:
        """How many links are held by calls further up this stack: they cannot give them back while this call waits."""
        holders = list(self._held.values())
        count = 0
        while frame is not None:
            count += sum(holder is frame for holder in holders)
            frame = frame.f_back
        return count

    def give_back(self, link: L) -> None:
        """Free a link that is in the state in which the next call may use it."""
        if len(self._all) > self._limit:
            self.drop(link)
        else:
            self._held.pop(link, None)

    def drop(self, link: L) -> None:
        """Discard a link that must not be used again."""
        link.discard()
        self._all.pop(link, None)
        self._held.pop(link, None)

    def reclaim(self) -> None:
        """Drop the links of calls that have ended."""
        for link, frame in list(self._held.items()):
            try:
                frame.clear()
            except RuntimeError:
                continue  # it runs
            # Since `items`, the call may have given its link back and ended, and another call may have taken it.
            if self._held.get(link) is frame:
                self.drop(link)

    def is_held_here(self) -> bool:
        """Whether a call further up the stack of the calling thread has a link."""
        return bool(self._held) and self._held_up_stack(sys._getframe(1)) > 0

    def close(self, timeout: float) -> None:
        """Close the free links, within `timeout` seconds."""
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
    """At the end of the program: close the connections properly, so that the broker does not log a lost client."""
    links = by_process.peek()
    if links is not None:
        links.close(timeout)
