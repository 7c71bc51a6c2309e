"""Requests that the store of limits has refused, and whose turn may come within moments: they wait here and not in the broker.

From the broker they would come back through two queues, later than they were told, and with runs of a tenth of a second places
would be empty meanwhile. So those that are next stay here: unacknowledged, beside the prefetch window, and in no slot. Those that
wait for the same places stand in line, by their tickets, and only the first one asks: when a run ends here that had a place (the
run of one that has waited here itself, so it is known which), or at the time that it was told, as others may have the places.

Nothing is decided here: each of them asks the store again, in a slot.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from amqtask.ground.loop import OneTimer

if TYPE_CHECKING:
    from amqtask.execution.request import Request
    from amqtask.pool import Loop

# None waits here for longer (seconds), nor more than there are slots, within these bounds.
LONGEST_SECONDS, LEAST, MOST = 0.5, 8, 64
# So many times as many as wait here have room beside the prefetch window: more may come.
ROOM = 2
# While a run here has a place, its end is waited for, and others' ends are looked for no more often (seconds).
LOOK_SECONDS = 0.05


class _Waiting(NamedTuple):
    ticket: int
    request: Request
    # When it may ask (monotonic).
    due: float


class _Line(dict[int, _Waiting]):
    """Those that wait for the same places, by their numbers."""

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self.timer = OneTimer(loop)
        self.asks_at = 0.0

    @property
    def first(self) -> _Waiting:
        """The one with the lowest ticket."""
        return min(self.values(), key=lambda waiting: waiting.ticket)


class NextInLine:
    """`ready` is called with a request that should ask now. `slots` is how many the worker has, `has_run` whether a run here has
    (or asks for) a place of a limit's key."""

    def __init__(
        self,
        loop: Loop,
        ready: Callable[[Request], None],
        slots: Callable[[], int],
        has_run: Callable[[str], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._loop = loop
        self._ready = ready
        self._slots = slots
        self._has_run = has_run
        self._clock = clock
        # By the limit's key; a request that waits for no place is alone in its line.
        self._lines: dict[str | int, _Line] = {}
        self._most = 0

    def __iter__(self) -> Iterator[Request]:
        for line in self._lines.values():
            for waiting in line.values():
                yield waiting.request

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def takes(self, seconds: float, room: int) -> bool:
        """Whether one that is to ask again in so many seconds may wait here, where there is room for so many."""
        return seconds <= LONGEST_SECONDS and len(self) < min(room, MOST, max(LEAST, self._slots()))

    def look_for_room(self) -> int:
        """For how many there should be room, by the most that were here since the last look."""
        most, self._most = max(self._most, len(self)), 0
        return ROOM * most

    def add(self, request: Request, seconds: float, ticket: int) -> None:
        """Keep it until it may ask: in so many seconds, or when a place of its limit (see `request.places`) is free."""
        key = _line_of(request)
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = _Line(self._loop)
        now = self._clock()
        line[request.number] = _Waiting(ticket, request, now + seconds)
        self._most = max(self._most, len(self))
        at = now + (max(seconds, LOOK_SECONDS) if isinstance(key, str) and self._has_run(key) else seconds)
        if not line.timer.is_set or at < line.asks_at:
            self._set(key, line, at, now)

    def _set(self, key: str | int, line: _Line, at: float, now: float) -> None:
        line.asks_at = at
        line.timer.set(at - now, partial(self._ask, key))

    def freed(self, places: Iterable[str]) -> None:
        """A run here has ended that had one of each of these."""
        for place in places:
            if place in self._lines:
                self._ask(place)

    def _ask(self, key: str | int) -> None:
        line = self._lines[key]
        request = line.first.request
        self._remove(key, request)
        if line:
            now = self._clock()
            self._set(key, line, max(now + LOOK_SECONDS, line.first.due), now)
        self._ready(request)

    def _remove(self, key: str | int, request: Request) -> None:
        line = self._lines[key]
        del line[request.number]
        if not line:
            line.timer.cancel()
            del self._lines[key]

    def take(self, allowed: Callable[[Request], bool]) -> list[Request]:
        """Remove and return those."""
        taken = [request for request in self if allowed(request)]
        for request in taken:
            self._remove(_line_of(request), request)
        return taken


def _line_of(request: Request) -> str | int:
    """The key of the limit for whose places it waits; its own number where it waits for something else."""
    return request.places[0] if request.places else request.number
