"""Alerts: rules, the facts that they look at, and Watch, which looks every few seconds, fires and resolves alerts, and tells who
is to be told. A thread in the console's process.

An alert fires once its problem has been there for the rule's time, and is resolved once the problem has been gone for a minute.
What fired is in the index (notices), so a console that starts anew goes on with it, and of several consoles one tells."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from amqtask.beat.operating import KeepsToItself, Schedules
from amqtask.console.notices import AlertLog, Destination, NoAnswer, NotTold, Problem, destinations, note_depths
from amqtask.console.pages import named_queues, queues
from amqtask.exceptions import ConfigurationError, OperationalError, line_of
from amqtask.ground.printable import bounded_logger, count, duration

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.beat.contract import Entry
    from amqtask.ground.shapes import JsonObject

logger = bounded_logger("amqtask.console")

# -- The rules, with their limits, and what they find in the facts. Pure.
#
# A rule finds problems, each about one subject: a queue, a periodic task, or nothing in particular.


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


# -- What the rules look at, from the broker, the index and the schedule. Blocking; what cannot be had is None.

# Minutes over which failures are counted.
MINUTES = 5
# Of an entry that has not run since its alert.
STILL_LATE = 1e9
Firing = Mapping[tuple[str, str], Mapping[str, Any]]


class FactFinder:
    """Looks at an application. It remembers since when it has seen an entry of the schedule: what was due before is not late."""

    def __init__(self, app: AmqTask) -> None:
        self._app = app
        self._seen: dict[str, tuple[object, datetime]] = {}
        self._answered_at = time.monotonic()

    def find(self, firing: Firing, now: float) -> Facts:
        """The facts; `firing` are the alerts that are open. Raises: IndexUnreachable."""
        minutes = self._app.history.minutes(timedelta(minutes=MINUTES))
        failures = sum(minute.failed for minute in minutes) / MINUTES
        try:
            queues: tuple[QueueFacts, ...] | None = self._queues()
            late: dict[str, float] | None = self._late(firing, datetime.fromtimestamp(now, timezone.utc))
            self._answered_at = time.monotonic()
        except OperationalError as error:
            logger.debug("alerts: the broker does not answer: %s", error)
            queues = late = None
        return Facts(queues, failures, late, self._silence(firing, now, is_there=queues is not None))

    def _silence(self, firing: Firing, now: float, *, is_there: bool) -> float:
        """Seconds since the broker answered; a console that is started meanwhile knows it from the alert."""
        alert = firing.get(("broker-away", ""))
        alert_age = now - alert["began_at"] if alert is not None and not is_there else 0.0
        return max(alert_age + STILL_LATE if alert_age else 0.0, time.monotonic() - self._answered_at)

    def _queues(self) -> tuple[QueueFacts, ...]:
        app = self._app
        dead = {queue.name: name for queue, name in named_queues(app)}
        return tuple(self._queue(row, dead.get(row["queue"])) for row in queues(app)["queues"])

    def _queue(self, row: JsonObject, dead_queue: str | None) -> QueueFacts:
        waits = self._app.history.waits(row["queue"]) if row["ready"] else None
        return QueueFacts(
            row["queue"], row["ready"], row["consumers"], row["paused"] is not None, dead_queue, row["dead"], waits
        )

    def _late(self, firing: Firing, now: datetime) -> dict[str, float] | None:
        operated = Schedules(self._app)
        try:
            entries = operated.entries()
        except KeepsToItself:
            return {}
        except OperationalError:
            raise
        except Exception as error:  # noqa: BLE001 - a store of the user's own
            logger.warning("alerts: the schedule cannot be read: %s", error)
            return None
        paused = operated.pauses.read() if entries else {}
        late = {}
        schedules: dict[str, tuple[object, datetime]] = {}
        for entry in entries:
            if not entry.enabled or entry.name in paused:
                continue
            schedule, since = self._seen.get(entry.name, (entry.schedule, now))
            schedules[entry.name] = entry.schedule, now if schedule != entry.schedule else since
            late[entry.name] = self._overdue(operated, entry, schedules[entry.name][1], firing, now)
        self._seen = schedules
        return late

    def _overdue(self, operated: Schedules, entry: Entry, since: datetime, firing: Firing, now: datetime) -> float:
        """Seconds by which an entry is overdue; 0.0 where nothing is known of any run."""
        runs = self._app.history.find(periodic=entry.name, limit=1) if self._app.conf.task_history else []
        run_times = [moment for moment in (runs[0].first if runs else None, entry.last_due_at) if moment is not None]
        alert = firing.get(("beat-late", entry.name))
        if alert is not None:
            began = datetime.fromtimestamp(alert["began_at"], timezone.utc)
            if not run_times or max(run_times) <= began:
                return STILL_LATE
        if not run_times and not self._app.conf.task_history:
            return 0.0
        last = max([*run_times, since])
        due = operated.scheduler([replace(entry, last_due_at=last, one_off=False)], last).next_of(entry.name)
        return max(0.0, (now - due).total_seconds()) if due is not None else 0.0


# Seconds between looks; that a problem must be gone before its alert is resolved; between looks at what is too old.
LOOK_SECONDS, CALM_SECONDS, FORGET_SECONDS = 15.0, 60.0, 3600.0
# Between notes of how deep queues are.
NOTE_SECONDS = 50.0
Find = Callable[[Mapping[tuple[str, str], Mapping[str, Any]], float], Facts]


class Watch:
    """`turn()` is one look; `run()` looks until `stop()`. `find` tells the facts, `clock` is Unix time."""

    def __init__(self, app: AmqTask, *, find: Find | None = None, clock: Callable[[], float] = time.time) -> None:
        """Raises: ConfigurationError for settings that are wrong."""
        self._app = app
        self.rules = rules(app.conf.console_alerts)
        self.destinations = destinations(app)
        self._find = find or FactFinder(app).find
        self._clock = clock
        self.log = AlertLog(app.history.index)
        self._there_since: dict[tuple[str, str], float] = {}
        self._gone_since: dict[tuple[str, str], float] = {}
        self._forget_at = self._note_at = 0.0
        self._problem = ""
        self._stop = threading.Event()

    def run(self) -> None:
        """Look until `stop`."""
        while not self._stop.is_set():
            try:
                self.turn()
                self._problem = ""
            except Exception as error:  # noqa: BLE001 - it is told, and the next look may succeed
                self._complain(error)
            self._stop.wait(LOOK_SECONDS)

    def _complain(self, error: Exception) -> None:
        """One line for as long as the same goes wrong."""
        problem = line_of(error)
        if problem != self._problem:
            self._problem = problem
            logger.warning("alerts: %s; trying again", problem)

    def stop(self) -> None:
        """End `run`, from another thread."""
        self._stop.set()

    def turn(self) -> None:
        """Look once, and tell what is to be told. Raises: IndexUnreachable."""
        now = self._clock()
        firing = self.log.firing()
        facts = self._find(firing, now)
        open_problems = {problem.key: problem for problem in problems(self.rules, facts)}
        self._fire(open_problems, firing, now)
        self._resolve(open_problems, firing, unknown(facts), now)
        self._tell(now)
        if facts.queues is not None and now >= self._note_at:
            self._note_at = now + NOTE_SECONDS
            note_depths(self._app.history.index, {queue.name: queue.ready or 0 for queue in facts.queues}, now)
        if now >= self._forget_at:
            self._forget_at = now + FORGET_SECONDS
            self.log.forget(now - self._app.conf.history_max_age)

    def _fire(
        self, open_problems: Mapping[tuple[str, str], Problem], firing: Mapping[tuple[str, str], JsonObject], now: float
    ) -> None:
        self._there_since = {key: self._there_since.get(key, now) for key in open_problems}
        for key, problem in open_problems.items():
            is_old_enough = now - self._there_since[key] >= self.rules[problem.rule].hold
            if key not in firing and is_old_enough:
                body = self._body("firing", problem.rule, problem.subject, problem.text, now)
                if self.log.fire(problem, now, list(self.destinations), body):
                    logger.warning("alerts: %s: %s", problem.rule, problem.text)

    def _resolve(
        self,
        open_problems: Mapping[tuple[str, str], Problem],
        firing: Mapping[tuple[str, str], JsonObject],
        unsaid: frozenset[str],
        now: float,
    ) -> None:
        gone = {key for key in firing if key not in open_problems and key[0] not in unsaid}
        self._gone_since = {key: self._gone_since.get(key, now) for key in gone}
        for key in gone:
            if now - self._gone_since[key] >= CALM_SECONDS or key[0] not in self.rules:
                alert = firing[key]
                body = self._body("resolved", *key, alert["text"], alert["began_at"], now)
                if self.log.resolve(alert["id"], now, list(self.destinations), body):
                    logger.warning("alerts: resolved: %s: %s", key[0], alert["text"])

    def _body(
        self, state: str, rule: str, subject: str, text: str, since: float, until: float | None = None
    ) -> JsonObject:
        base = str(self._app.conf.console_url or "").rstrip("/")
        return {
            "app": self._app.main or "amqtask",
            "state": state,
            "rule": rule,
            "subject": subject,
            "text": text,
            "since": _iso(since),
            "until": None if until is None else _iso(until),
            "url": f"{base}/alerts" if base else None,
        }

    def _tell(self, now: float) -> None:
        # Who does not answer is asked once at a look: the others, and the next look, do not wait for each of many alerts.
        silent: dict[str, str] = {}
        while not self._stop.is_set() and (notice := self.log.claim(now)) is not None:
            destination = self.destinations.get(notice.destination)
            if destination is None:
                self.log.told(notice, now)  # the settings have it no longer
                continue
            if notice.destination in silent:
                self.log.failed(notice, now, silent[notice.destination])
                continue
            try:
                destination.tell(notice.body)
            except NotTold as error:
                logger.warning("alerts: %s is not told, trying again: %s", notice.destination, error)
                self.log.failed(notice, now, str(error))
                if isinstance(error, NoAnswer):
                    silent[notice.destination] = str(error)
            else:
                self.log.told(notice, now)

    def test(self) -> dict[str, str | None]:
        """Send a test to each destination: what is wrong with each, None for one that has it."""
        body = self._body("test", "test", "", "a test of the console's", self._clock())
        return {mark: _problem_with(destination, body) for mark, destination in self.destinations.items()}


def _problem_with(destination: Destination, body: Mapping[str, object]) -> str | None:
    try:
        destination.tell(body)
    except NotTold as error:
        return str(error)
    return None


def _iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, timezone.utc).isoformat(timespec="seconds")


# -- The page of alerts

MOST_PAST, MOST_UNTOLD = 100, 20


def alerts(app: AmqTask) -> JsonObject:
    """The rules, what fires, what fired, who is told, and what could not be told."""
    log = AlertLog(app.history.index)
    return {
        "rules": [asdict(rule) for rule in rules(app.conf.console_alerts).values()],
        "destinations": list(destinations(app)),
        "firing": sorted(log.firing().values(), key=lambda alert: -alert["began_at"]),
        "past": log.past(MOST_PAST),
        "untold": log.untold(MOST_UNTOLD),
    }


def send_test(app: AmqTask, form: Mapping[str, str], user: str) -> str:
    """Send a test to all destinations. Raises: ConfigurationError saying which does not take it, and why."""
    answers = Watch(app).test()
    if not answers:
        raise ConfigurationError("console_alert_to is empty: nobody is told")
    if wrong := {mark: problem for mark, problem in answers.items() if problem is not None}:
        raise ConfigurationError("; ".join(f"{mark}: {problem}" for mark, problem in wrong.items()))
    return f"a test was sent to {', '.join(answers)}"
