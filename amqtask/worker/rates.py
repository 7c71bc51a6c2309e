"""Rate limits: '10/s', '100/m', '5/h' as token buckets; no clock inside."""

from __future__ import annotations

from amqtask.exceptions import ConfigurationError

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def parse_rate(limit: str | float | None) -> float:
    """Runs per second; 0 means no limit. Raises: ConfigurationError."""
    if limit is None or limit == "":
        return 0.0
    if isinstance(limit, (int, float)):
        return float(limit)
    number, _, unit = limit.partition("/")
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
