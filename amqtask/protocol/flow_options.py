"""What a task may ask for: Unique, Concurrency, Rate, Fair, Batch and Breaker; checked when they are written down."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeAlias

from amqtask.exceptions import FlowGapWarning, TaskPredicate, WrongValue
from amqtask.ground.plugins import near_names
from amqtask.ground.printable import printable

# Names of arguments, or a function that gets the call's arguments and returns what makes its key.
By: TypeAlias = "str | Sequence[str] | Callable[..., Any] | None"
UNTIL = ("started", "success", "end", "ttl")
ON_CONFLICT = ("return", "drop", "replace", "raise")
# Places are counted one by one where all are taken.
MOST_PLACES = 10_000
# Seconds of a Breaker.
_LONGEST = 86_400.0
# Turns in a round of one key.
MOST_WEIGHT = 16
_RATE = r"(?i)\s*(\d+(?:\.\d+)?)\s*/\s*([smhd])\s*"
# Seconds between two runs, and runs at once, of a Rate.
_SLOWEST, _MOST_BURST = 366 * 86_400.0, 10**9
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


def _by(subject: str, by: By) -> By:
    if by is None or callable(by):
        return by
    names = (by,) if isinstance(by, str) else tuple(by) if isinstance(by, Iterable) else (by,)
    if not all(isinstance(name, str) and name for name in names):
        raise WrongValue(f"{subject}: by wants the name of an argument, several, or a function, not {by!r}")
    return names


def _check_whole(subject: str, value: object, most: int = MOST_PLACES) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise WrongValue(f"{subject} wants a whole number from 1 to {most}, not {value!r}")


def _seconds(subject: str, value: object, wants: str, low: float, high: float) -> float:
    """A number from `low` to `high`, or a timedelta; 0 is none."""
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not low <= seconds <= high or not seconds:
        raise WrongValue(f"{subject} wants {wants}, or a timedelta, not {value!r}")
    return float(seconds)


def _choice(subject: str, value: object, names: Sequence[str]) -> None:
    if value not in names:
        near = near_names(value, names) if isinstance(value, str) else []
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise WrongValue(f"{subject} wants {', '.join(map(repr, names[:-1]))} or {names[-1]!r}, not {value!r}.{hint}")


def label_of(by: By) -> str:
    """What a key is made from, in words: in logs and in the key itself."""
    if by is None:
        return ""
    return getattr(by, "__name__", "function") if callable(by) else ",".join(by)


@dataclass(frozen=True)
class Unique:
    """At most one call at a time with the same key.

    `by`: the arguments that make the key, by name, or a function of them; None: all of them, (): none, the task as a whole.
    `until`: when the next call may come: when this one has "started", has had "success" (a failure keeps the key until its
    `ttl`), has come to its "end", or when its `ttl` is over, whatever becomes of it. `ttl`: seconds for which a key is kept at
    most while its call waits; a running call keeps it. `on_conflict`, for a second call: "return" the first one's result, "drop"
    it, "replace" the first one while that waits, or "raise" AlreadyQueued.

    Raises: WrongValue. Warns (FlowGapWarning) of a policy that loses calls.
    """

    by: By = None
    until: str = "end"
    ttl: float = 3600.0
    on_conflict: str = "return"

    def __post_init__(self) -> None:
        object.__setattr__(self, "by", _by("Unique", self.by))
        _choice("Unique: until", self.until, UNTIL)
        _choice("Unique: on_conflict", self.on_conflict, ON_CONFLICT)
        ttl = _seconds("Unique: ttl", self.ttl, "a number of seconds from 1 on", 1, 4e8)
        object.__setattr__(self, "ttl", ttl)
        if self.on_conflict == "replace" and self.until in ("success", "end"):
            warnings.warn(
                f"Unique(until={self.until!r}, on_conflict='replace') replaces a call that waits, not one that runs: a call that "
                "comes meanwhile gets the running one's result, and its arguments are lost. until='started' keeps it",
                FlowGapWarning,
                stacklevel=3,
            )


@dataclass(frozen=True)
class Concurrency:
    """At most `limit` runs at once on all workers: of the task, or of each key. Raises: WrongValue."""

    limit: int
    by: By = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "by", _by("Concurrency", self.by))
        _check_whole("Concurrency", self.limit)


@dataclass(frozen=True)
class Rate:
    """At most so many runs begin in a time on all workers: `"500/m"` (s, m, h or d), of the task, or of each key. They are spread
    out; after a pause `burst` of them may begin at once (default: as many as come in a second). Raises: WrongValue."""

    rate: str
    by: By = None
    burst: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "by", _by("Rate", self.by))
        match = re.fullmatch(_RATE, self.rate) if isinstance(self.rate, str) else None
        interval = _SECONDS[match[2].lower()] / float(match[1]) if match is not None and float(match[1]) else 0.0
        if not 0 < interval <= _SLOWEST:
            raise WrongValue(
                f"Rate wants text like '10/s', '500/m', '5/h' or '1/d', not {printable(repr(self.rate), 50)}"
            )
        if self.burst is not None:
            _check_whole("Rate: burst", self.burst, _MOST_BURST)
        object.__setattr__(self, "interval", interval)
        object.__setattr__(self, "burst", self.burst or max(1, int(1 / interval)))

    # Seconds between two runs.
    interval: float = 0.0


# A batch waits for its calls no longer than that (seconds): meanwhile their messages are unanswered.
LONGEST_GATHERING = 600.0


@dataclass(frozen=True)
class Batch:
    """Call the task's function once with at most `size` calls, as soon as there are so many, or the first of them has waited for
    `seconds` (a number or a timedelta). Raises: WrongValue."""

    size: int = 100
    seconds: float = 1.0

    def __post_init__(self) -> None:
        _check_whole("Batch: size", self.size)
        wants = f"a number above 0, at most {LONGEST_GATHERING:g}"
        object.__setattr__(self, "seconds", _seconds("Batch: seconds", self.seconds, wants, 0, LONGEST_GATHERING))


Counts: TypeAlias = "type[BaseException] | tuple[type[BaseException], ...] | Callable[[BaseException], Any]"


@dataclass(frozen=True)
class Breaker:
    """After `failures` failed runs within `seconds`, on all workers, no call of the task begins for `pause` seconds. Then one
    tries: its success lets all others in, its failure begins the pause again.

    `counts`: the exceptions that are failures, or a function that says so of one. A retry that the task asks for, Ignore and
    Reject never are. Raises: WrongValue.
    """

    failures: int = 20
    seconds: float = 60.0
    pause: float = 30.0
    counts: Counts = Exception

    def __post_init__(self) -> None:
        _check_whole("Breaker: failures", self.failures)
        wants = "a number of seconds above 0, at most a day"
        for name in ("seconds", "pause"):
            object.__setattr__(self, name, _seconds(f"Breaker: {name}", getattr(self, name), wants, 0, _LONGEST))
        classes = self.counts if isinstance(self.counts, tuple) else (self.counts,)
        is_classes = all(isinstance(one, type) and issubclass(one, BaseException) for one in classes)
        if not is_classes and (isinstance(self.counts, tuple) or not callable(self.counts)):
            raise WrongValue(f"Breaker: counts wants exceptions, or a function of one, not {self.counts!r}")

    def is_failure(self, error: BaseException) -> bool:
        """Whether a run that raised this has failed. Raises: what a function `counts` raises."""
        if isinstance(error, TaskPredicate):
            return False
        if isinstance(self.counts, (type, tuple)):
            return isinstance(error, self.counts)
        return bool(self.counts(error))


def weighted_text(key: object) -> str:
    """The text by which a key has its weight: that of a list is that of a tuple."""
    return str(list(key) if isinstance(key, tuple) else key)


@dataclass(frozen=True)
class Fair:
    """Calls with different keys take turns, so that many calls with one key do not hold up the others.

    `by`: the arguments that make the key, by name, or a function of them. `weights`: how many turns some keys have in each round,
    by the key, or by it as text (several arguments: a tuple of them); the others have one. Raises: WrongValue.
    """

    by: By
    weights: Mapping[Any, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by", _by("fair_by", self.by))
        if not self.by:
            raise WrongValue("fair_by wants the name of an argument, several, or a function")
        if not isinstance(self.weights, Mapping):
            raise WrongValue(f"Fair: weights wants a dictionary of keys and numbers of turns, not {self.weights!r}")
        for key, weight in self.weights.items():
            _check_whole(f"Fair: the weight of {key!r}", weight, MOST_WEIGHT)
        by_text = {weighted_text(key): weight for key, weight in self.weights.items()}
        object.__setattr__(self, "weights", by_text)


Limit: TypeAlias = "Concurrency | Rate"


def as_unique(value: object) -> Unique:
    """The option `unique`: a Unique, or True for one with its defaults. Raises: TypeError."""
    if value is True:
        return Unique()
    if not isinstance(value, Unique):
        raise TypeError
    return value


def as_breaker(value: object) -> Breaker:
    """The option `breaker`: a Breaker, or True for one with its defaults. Raises: TypeError."""
    if value is True:
        return Breaker()
    if not isinstance(value, Breaker):
        raise TypeError
    return value


def as_limits(value: object) -> tuple[Limit, ...]:
    """The option `limits`: one limit, or several of different kinds or keys. Raises: TypeError, WrongValue."""
    limits = (value,) if isinstance(value, (Concurrency, Rate)) else tuple(value)  # type: ignore[arg-type]
    keys = set()
    for limit in limits:
        if not isinstance(limit, (Concurrency, Rate)):
            raise TypeError
        key = type(limit).__name__, label_of(limit.by)  # by which stores and operators tell them apart
        if key in keys:
            raise WrongValue(f"limits has {key[0]} twice with the same key ({key[1] or 'the task'})")
        keys.add(key)
    return limits


def as_fair(value: object) -> Fair:
    """The option `fair_by`: a Fair, or what its key is made of. Raises: WrongValue."""
    return value if isinstance(value, Fair) else Fair(value)  # type: ignore[arg-type]
