"""What the rules look at, from the broker, the index and the schedule. Blocking; what cannot be had is None."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from amqtask.beat.operating import KeepsToItself, Schedules
from amqtask.console.alerts.rules import Facts, QueueFacts
from amqtask.console.pages import named_queues, queues
from amqtask.exceptions import OperationalError
from amqtask.ground.printable import bounded_logger

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.beat.contract import Entry
    from amqtask.ground.shapes import JsonObject

logger = bounded_logger("amqtask.console")
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
