"""Watch: looks every few seconds, fires and resolves alerts, and tells who is to be told. A thread in the console's process.

An alert fires once its problem has been there for the rule's time, and is resolved once the problem has been gone for a minute.
What fired is in the index (alerts.log), so a console that starts anew goes on with it, and of several consoles one tells."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from amqtask.console.alerts.destinations import Destination, NoAnswer, NotTold, destinations
from amqtask.console.alerts.facts import FactFinder
from amqtask.console.alerts.log import AlertLog, note_depths
from amqtask.console.alerts.rules import Facts, Problem, problems, rules, unknown
from amqtask.exceptions import ConfigurationError, line_of
from amqtask.ground.printable import bounded_logger

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.ground.shapes import JsonObject

logger = bounded_logger("amqtask.console")
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
