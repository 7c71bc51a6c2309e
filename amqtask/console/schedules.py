"""Periodic tasks in the console: what ran, what comes within a day, what is paused; and what can be done about them.

Entries are read as beat reads them (beat_scheduler), but nothing is written. Where the store does not know when an entry ran (its
file is on another machine, or it has none), the history does.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING

from amqtask.beat.operating import KeepsToItself, Schedules, call_text, described
from amqtask.exceptions import AmqTaskError, ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from amqtask.app import AmqTask
    from amqtask.beat.contract import Entry
    from amqtask.beat.scheduler import Scheduler
    from amqtask.ground.shapes import JsonObject
    from amqtask.remote.pauses import Pause

AHEAD = timedelta(days=1)
# Runs of one entry that are listed, of those to come and of those that were; and runs to come in all.
MOST_AHEAD, MOST_BEFORE, MOST_IN_ALL = 24, 5, 300


def schedules(app: AmqTask) -> JsonObject:
    """All entries, and what will be sent within a day."""
    now = datetime.now(timezone.utc)
    operated = Schedules(app)
    shown: JsonObject = {
        "source": operated.source,
        "zone": str(app.timezone),
        "problem": None,
        "entries": [],
        "ahead": [],
    }
    try:
        entries = operated.entries()
    except KeepsToItself as error:
        return shown | {"problem": str(error)}
    paused = operated.pauses.read()
    ahead: list[JsonObject] = []
    for entry in sorted(entries, key=lambda one: one.name):
        row, following = _row(app, operated, entry, paused.get(entry.name), now)
        shown["entries"].append(row)
        ahead += following
    ahead.sort(key=lambda one: (one["due_at"], one["name"]))
    return shown | {"ahead": ahead[:MOST_IN_ALL], "is_cut": len(ahead) > MOST_IN_ALL}


def _row(
    app: AmqTask, operated: Schedules, entry: Entry, pause: Pause | None, now: datetime
) -> tuple[JsonObject, list[JsonObject]]:
    runs = app.history.find(periodic=entry.name, limit=MOST_BEFORE) if app.conf.task_history else []
    if runs and entry.last_due_at is None:
        entry = replace(entry, last_due_at=runs[0].first, last_run_at=runs[0].first)
    is_sent = entry.enabled and pause is None
    scheduler = operated.scheduler([replace(entry, enabled=is_sent)], now)
    pass_over(scheduler, now)
    next_due_at = scheduler.next_of(entry.name)
    dues = []
    for due in scheduler.upcoming(now + AHEAD):
        dues.append({"due_at": due.due_at, "name": entry.name, "task": entry.task})
        if len(dues) == MOST_AHEAD:
            dues[-1]["goes_on"] = True
            break
    row: JsonObject = {
        "name": entry.name,
        "task": entry.task,
        "call": entry.options.get("argsrepr") or call_text(entry),
        "schedule": described(entry.schedule),
        "enabled": entry.enabled,
        "one_off": entry.one_off,
        "paused": None if pause is None else {"by": pause.by, "since": pause.began},
        "last_run_at": entry.last_run_at,
        "next_due_at": next_due_at,
        "total_run_count": entry.total_run_count,
        "runs": [{"id": run.id, "state": run.state, "at": run.first, "runtime": run.runtime} for run in runs],
    }
    return row, dues


def pass_over(scheduler: Scheduler, now: datetime) -> None:
    """Leave out what is due already: what has been sent meanwhile is not known here at once."""
    for due in scheduler.take(now):
        scheduler.advance(due)


# -- actions; see console.actions


def pause_schedule(app: AmqTask, form: Mapping[str, str], user: str) -> str:
    """Have no beat send an entry."""
    name = form["name"]
    return f"{name} is paused" if Schedules(app).pause(name, user) else f"{name} was paused already"


def resume_schedule(app: AmqTask, form: Mapping[str, str], user: str) -> str:
    """Have beat send it again."""
    name = form["name"]
    return f"{name} is resumed" if Schedules(app).resume(name) else f"{name} was not paused"


def run_schedule(app: AmqTask, form: Mapping[str, str], user: str) -> str:
    """Send the task of an entry now."""
    name = form["name"]
    try:
        return f"{name} is sent as {Schedules(app).run(name)}"
    except AmqTaskError:
        raise
    except Exception as error:  # arguments that are worked out, and routers, are the user's
        raise ConfigurationError(f"{name} cannot be sent: {type(error).__name__}: {error}") from error
