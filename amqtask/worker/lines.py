"""Lines of the dispatcher that are no plain queue: of the shards of a queue, of the calls that are gathered for a batch, of
requests that are next for the places of a limit, and of those that wait for their task's rate limit (Throttle)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from amqtask.exceptions import ConfigurationError
from amqtask.execution.request import Calls, Request
from amqtask.ground.loop import OneTimer

if TYPE_CHECKING:
    from amqtask.pool import Loop
    from amqtask.worker.strategy import TaskStrategy


class SharedLine(deque[Request]):
    """The requests of all shards of a queue (see amqtask.topology.declarations): the shards take turns."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: dict[str, deque[Request]] = {}
        self._turns: deque[deque[Request]] = deque()

    def append(self, request: Request) -> None:
        line = self._lines.setdefault(request.queue, deque())
        if not line:
            self._turns.append(line)
        line.append(request)

    def extend(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.append(request)

    def popleft(self) -> Request:
        line = self._turns.popleft()
        request = line.popleft()
        if line:
            self._turns.append(line)
        return request

    def clear(self) -> None:
        self._lines.clear()
        self._turns.clear()

    def __getitem__(self, index: Any) -> Any:
        return self._turns[0][0] if index == 0 else list(self)[index]

    def __bool__(self) -> bool:
        return bool(self._turns)

    def __len__(self) -> int:
        return sum(map(len, self._turns))

    def __iter__(self) -> Iterator[Request]:
        for line in self._turns:
            yield from line


# -- Calls that a worker gathers for a task with `batch`, until there are enough of them or their time is up.
#
# It stands among the dispatcher's lines, so a batch waits for a slot and takes turns as any other request. While it waits, more
# calls join it. All of it is in memory only, as every request that waits here: the broker has the messages, which are unanswered.


class BatchLine(deque[Request]):
    """Calls of one task from one queue. It is true while a batch is due, and `popleft` takes a whole one; `on_due` is called when
    one becomes due."""

    def __init__(
        self, loop: Loop, on_due: Callable[[BatchLine], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._on_due = on_due
        self._clock = clock
        self._timer = OneTimer(loop)
        # When each of them came.
        self._times: deque[float] = deque()
        self._is_due = False
        self._size, self._seconds = 1, 0.0
        self._limits: tuple[float | None, float | None] = None, None

    def __bool__(self) -> bool:
        return self._is_due

    def gather(self, request: Request, strategy: TaskStrategy) -> None:
        """Append a call."""
        assert strategy.batch is not None
        self._size, self._seconds = strategy.batch.size, strategy.batch.seconds
        self._limits = strategy.soft_limit, strategy.hard_limit
        self.append(request)
        self._times.append(self._clock())
        self._look()

    def popleft(self) -> Request:
        """One request for the oldest calls. Its number is no other request's: slots make others below -2**32 for chains."""
        first = self[0]
        calls = Calls()
        while len(self) and len(calls) < self._size:
            calls.append(super().popleft())
            self._times.popleft()
        soft, hard = self._limits
        batch = Request(
            number=-first.number,
            id=f"batch of {len(calls)}",
            task=first.task,
            queue=first.queue,
            priority=first.priority,
            soft_limit=soft,
            hard_limit=hard,
        )
        batch.decoded = calls  # type: ignore[assignment] # see Request
        self._is_due = False
        self._look(is_in_turns=True)
        return batch

    @property
    def batches(self) -> int:
        """How many batches the calls that are here would make."""
        return -(-len(self) // self._size)

    def clear(self) -> None:
        """Take all calls out."""
        super().clear()
        self._times.clear()
        self._timer.cancel()
        self._is_due = False

    def _look(self, *, is_in_turns: bool = False) -> None:
        """Whether a batch is due now, or when. Who takes a batch looks for the next one by itself."""
        if self._is_due or not len(self):
            return
        wait = self._times[0] + self._seconds - self._clock()
        if len(self) >= self._size or wait <= 0:
            self._timer.cancel()
            self._is_due = True
            if not is_in_turns:
                self._on_due(self)
        elif not self._timer.is_set:
            self._timer.set(wait, self._look)


# -- Requests that the store of limits has refused, and whose turn may come within moments: they wait here and not in the broker.
#
# From the broker they would come back through two queues, later than they were told, and with runs of a tenth of a second
# places would be empty meanwhile. So those that are next stay here: unacknowledged, beside the prefetch window, and in no slot.
# Those that wait for the same places stand in line, by their tickets, and only the first one asks: when a run ends here that had
# a place (the run of one that has waited here itself, so it is known which), or at the time that it was told, as others may have
# the places.
#
# Nothing is decided here: each of them asks the store again, in a slot.

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


# -- The throttle: rate-limited requests over their limit leave the dispatcher's lines.
#
# A few of one task's requests are *held* here for their token (at most `most_held`, none for longer than about
# LONGEST_HOLD_SECONDS); the others are *sent away*, back to the broker's delay levels, each to return about
# when there will be a token for it (the returns are spread at the task's rate). So a backlog of one limited
# task fills neither the prefetch window nor the memory, and its tokens are taken only by requests that start.
#
# Rates are '10/s', '100/m', '5/h'; each limited task has a token bucket.

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def parse_rate(limit: str | float | None) -> float:
    """Runs per second; 0 means no limit. Raises: ConfigurationError."""
    if limit is None or limit == "":
        return 0.0
    if isinstance(limit, (int, float)):
        return float(limit)
    number, _, unit = str(limit).partition("/")
    try:
        return float(number) / _UNITS[(unit or "s").strip().lower()]
    except (KeyError, ValueError):
        raise ConfigurationError(f"rate limit {limit!r} is not like '10/s', '100/m' or '5/h'") from None


class TokenBucket:
    """A bucket of one token, which is full at first and gets `rate` tokens a second (Celery's rule: runs are spread out)."""

    __slots__ = ("_ready_at", "interval")

    def __init__(self, rate: float) -> None:
        self.interval = 1.0 / rate
        self._ready_at = 0.0

    def take(self, now: float) -> bool:
        """Take the token, if there is one."""
        if now < self._ready_at:
            return False
        # A loop that wakes up a little late must not lower the rate: the next token is due as if it had woken in time.
        due = self._ready_at + self.interval
        self._ready_at = due if due > now + self.interval / 2 else now + self.interval
        return True

    def wait(self, now: float) -> float:
        """Seconds until there is a token."""
        return max(0.0, self._ready_at - now)


MOST_HELD = 4
LONGEST_HOLD_SECONDS = 1.0
SHORTEST_AWAY_SECONDS = 0.25


class Throttle:
    """Token buckets by task name, and the requests that wait for their tokens; falsy while no task has a limit."""

    def __init__(
        self,
        send_away: Callable[[Request, float], None],
        *,
        on_limited: Callable[[Request], None] = lambda request: None,
        most_held: int = MOST_HELD,
    ) -> None:
        self._send_away = send_away
        self._on_limited = on_limited
        self.most_held = most_held
        self._buckets: dict[str, TokenBucket] = {}
        self._held: dict[str, deque[Request]] = {}
        self._returning_at: dict[str, float] = {}

    def set_rate(self, task: str, limit: str | float | None) -> None:
        """Raises: ConfigurationError."""
        rate = parse_rate(limit)
        if rate > 0:
            self._buckets[task] = TokenBucket(rate)
        else:
            self._buckets.pop(task, None)

    def limits(self, task: str) -> bool:
        """Whether this task has a limit."""
        return task in self._buckets

    def __bool__(self) -> bool:
        return bool(self._buckets or self._held)

    def lets_pass(self, request: Request, now: float) -> bool:
        """True: it may start now (its token is taken). False: it was held or sent away."""
        bucket = self._buckets.get(request.task)
        if bucket is None:
            return True
        held = self._held.get(request.task)
        if not held and bucket.take(now):
            return True
        self._on_limited(request)
        ahead = len(held) if held else 0
        wait = bucket.wait(now) + ahead * bucket.interval
        if ahead < self.most_held and wait <= LONGEST_HOLD_SECONDS:
            self._held.setdefault(request.task, deque()).append(request)
            return False
        earliest = now + max(wait, SHORTEST_AWAY_SECONDS)
        returning_at = max(self._returning_at.get(request.task, 0.0) + bucket.interval, earliest)
        self._returning_at[request.task] = returning_at
        self._send_away(request, returning_at - now)
        return False

    def next_ready(self, now: float, has_room: Callable[[Request], bool]) -> Request | None:
        """A held request for which there is a token and room; the token is taken."""
        for task, held in self._held.items():
            if not has_room(held[0]):
                continue
            bucket = self._buckets.get(task)
            if bucket is None or bucket.take(now):
                request = held.popleft()
                if not held:
                    del self._held[task]
                return request
        return None

    def wait(self, now: float, has_room: Callable[[Request], bool]) -> float | None:
        """Seconds until the next held request may start; None: none that has room is held."""
        waits = [
            self._buckets[task].wait(now) if task in self._buckets else 0.0
            for task, held in self._held.items()
            if has_room(held[0])
        ]
        return min(waits, default=None)

    def clear(self) -> list[Request]:
        """Remove and return all held requests."""
        requests = list(self)
        self._held.clear()
        return requests

    def __iter__(self) -> Iterator[Request]:
        for held in self._held.values():
            yield from held

    def __len__(self) -> int:
        return sum(map(len, self._held.values()))
