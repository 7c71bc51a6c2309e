"""The throttle: rate-limited requests over their limit leave the dispatcher's lines.

A few of one task's requests are *held* here for their token (at most `most_held`, none for longer than about
LONGEST_HOLD_SECONDS); the others are *sent away*, back to the broker's delay levels, each to return about
when there will be a token for it (the returns are spread at the task's rate). So a backlog of one limited
task fills neither the prefetch window nor the memory, and its tokens are taken only by requests that start.

Rates are '10/s', '100/m', '5/h'; each limited task has a token bucket.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from amqtask.exceptions import ConfigurationError

if TYPE_CHECKING:
    from amqtask.execution.request import Request

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


def _always(request: Request) -> bool:
    return True


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

    def next_ready(self, now: float, has_room: Callable[[Request], bool] = _always) -> Request | None:
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

    def wait(self, now: float, has_room: Callable[[Request], bool] = _always) -> float | None:
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
