"""The rules, with their limits, and what they find in the facts. Pure.

A rule finds problems, each about one subject: a queue, a periodic task, or nothing in particular.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from amqtask.exceptions import ConfigurationError
from amqtask.ground.printable import count, duration


@dataclass(frozen=True, slots=True)
class Rule:
    """`above` is the limit; a problem must be there for `hold` seconds before it is told. `of` are other limits, by subject."""

    name: str
    about: str
    above: float
    hold: float
    of: Mapping[str, float] = field(default_factory=dict)

    def limit(self, subject: str) -> float:
        """The limit for this subject."""
        return self.of.get(subject, self.above)


DEFAULTS = (
    Rule("queue-wait", "seconds that the oldest message of a queue waits", 300.0, 60.0),
    Rule("dead-letters", "dead letters of a queue", 0.0, 0.0),
    Rule("failures", "failed tasks a minute, over five minutes", 10.0, 0.0),
    Rule("beat-late", "seconds that a periodic task is overdue", 120.0, 0.0),
    Rule("no-worker", "messages in a queue that no worker consumes", 0.0, 120.0),
    Rule("broker-away", "seconds that the broker does not answer", 60.0, 0.0),
)
_FIELDS = frozenset({"above", "for", "of"})


def rules(setting: Mapping[str, object]) -> dict[str, Rule]:
    """The rules that `console_alerts` leaves or changes. Raises: ConfigurationError."""
    defaults = {rule.name: rule for rule in DEFAULTS}
    for name in setting:
        if name not in defaults:
            raise ConfigurationError(f"console_alerts: there is no rule {name!r}; there are {', '.join(defaults)}")
    return {
        name: _changed(rule, setting.get(name, {})) for name, rule in defaults.items() if setting.get(name) is not False
    }


def _changed(rule: Rule, change: object) -> Rule:
    if change is True or change is None:
        return rule
    where = f"console_alerts[{rule.name!r}]"
    if not isinstance(change, Mapping) or not set(change) <= _FIELDS:
        raise ConfigurationError(f"{where} is False, or a mapping with {', '.join(sorted(_FIELDS))}, not {change!r}")
    limits = change.get("of", {})
    if not isinstance(limits, Mapping):
        raise ConfigurationError(f"{where}['of'] is a mapping of subjects to limits, not {limits!r}")
    return Rule(
        rule.name,
        rule.about,
        _number(f"{where}['above']", change.get("above", rule.above)),
        _number(f"{where}['for']", change.get("for", rule.hold)),
        {str(subject): _number(f"{where}['of'][{subject!r}]", limit) for subject, limit in limits.items()},
    )


def _number(where: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ConfigurationError(f"{where} is a number from 0 on, not {value!r}")
    return float(value)


@dataclass(frozen=True, slots=True)
class QueueFacts:
    """A queue. `waits` is seconds, at least; None where nobody knows."""

    name: str
    ready: int | None
    consumers: int | None
    is_paused: bool
    dead_queue: str | None = None
    dead: int | None = None
    waits: float | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """What there is now. What could not be found out is None: then its rules neither fire nor resolve anything."""

    queues: tuple[QueueFacts, ...] | None = None
    failures_per_minute: float | None = None
    # Seconds by which periodic tasks are overdue.
    late: Mapping[str, float] | None = None
    # Seconds since the broker last answered.
    broker_silent: float = 0.0


class Problem(NamedTuple):
    """What a rule has found."""

    rule: str
    subject: str
    text: str
    value: float
    limit: float

    @property
    def key(self) -> tuple[str, str]:
        """One problem is one alert, however its numbers change."""
        return self.rule, self.subject


def problems(active_rules: Mapping[str, Rule], facts: Facts) -> Iterator[Problem]:
    """All problems there are now."""
    for rule, subject, value, text in _measured(facts):
        if rule in active_rules and value > (limit := active_rules[rule].limit(subject)):
            yield Problem(rule, subject, text, value, limit)


def unknown(facts: Facts) -> frozenset[str]:
    """The rules about which these facts say nothing."""
    of_queues = {"queue-wait", "dead-letters", "no-worker"} if facts.queues is None else set()
    of_failures = {"failures"} if facts.failures_per_minute is None else set()
    return frozenset(of_queues | of_failures | ({"beat-late"} if facts.late is None else set()))


def _measured(facts: Facts) -> Iterator[tuple[str, str, float, str]]:
    for queue in facts.queues or ():
        ready = queue.ready or 0
        if queue.dead is not None and queue.dead_queue:
            yield (
                "dead-letters",
                queue.dead_queue,
                queue.dead,
                f"{count(queue.dead, 'dead letter')} in {queue.dead_queue}",
            )
        if ready and queue.waits is not None and not queue.is_paused:
            yield (
                "queue-wait",
                queue.name,
                queue.waits,
                f"{queue.name}: the oldest message waits since {duration(queue.waits)}",
            )
        if ready and queue.consumers == 0 and not queue.is_paused:
            yield "no-worker", queue.name, ready, f"{queue.name}: {count(ready, 'message')}, and no worker consumes it"
    if facts.failures_per_minute is not None:
        text = f"{facts.failures_per_minute:.1f} tasks a minute fail"
        yield "failures", "", facts.failures_per_minute, text
    for name, seconds in (facts.late or {}).items():
        yield "beat-late", name, seconds, f"the periodic task {name} is overdue since {duration(seconds)}"
    yield "broker-away", "", facts.broker_silent, f"the broker has not answered for {duration(facts.broker_silent)}"
