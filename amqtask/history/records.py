"""What events tell of tasks and workers, as rows: pure, no database. An event may come twice, late, or from a stranger.

A row of a task is what all its events say together. Its state is that of the newest event by the workers' clocks; of two with the
same time the later one in a task's life. `task-sent` is no news of a task that somebody has received: producers' clocks differ.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING
from zlib import crc32

from amqtask import states
from amqtask.exceptions import EncodeError
from amqtask.protocol.event import RERUN_OF
from amqtask.protocol.serialization import dumps
from amqtask.protocol.task import saferepr

if TYPE_CHECKING:
    from amqtask.ground.shapes import EventFields, JsonObject

# Characters of a name or an id, of a text (arguments, result, exception), and of a traceback.
SHORT, LONG, LONGEST = 255, 10_000, 65_536
# Bytes of a name or an id: several of them are in one entry of an index, which has 2,700 at most in PostgreSQL.
_SHORT_BYTES = 2 * SHORT
# Steps of one task that are kept: one that is retried for ever has any number.
MOST_STEPS = 200
# Keys are the time in microseconds, and these bits by chance, so that tasks of one microsecond hardly ever have the same.
KEY_BITS = 10
# event type → (state, place in a task's life)
_STATES = {
    "task-sent": (states.PENDING, 0),
    "task-received": (states.RECEIVED, 1),
    "task-started": (states.STARTED, 2),
    "task-retried": (states.RETRY, 3),
    "task-rejected": (states.REJECTED, 4),
    "task-revoked": (states.REVOKED, 5),
    "task-failed": (states.FAILURE, 6),
    "task-succeeded": (states.SUCCESS, 6),
}
# For so many seconds after it was received a call may be said to be sent: clocks differ, and the confirm takes time.
SENT_LATE = 5.0
_KIND = re.compile(r"\s*([A-Za-z_][\w.]*)")
# Unix times that a database's and Python's calendars can hold. Seconds that a clock may be ahead: what it tells with a later time
# counts as of when it is heard, else it would be the newest for years.
_EARLIEST, _LATEST, _AHEAD = 1.0, 4e9, 86_400.0
# An event that has just come, and is so many seconds older than the last one of its worker: the clock was put back.
_CLOCK_PUT_BACK = 5.0
# Seconds between two heartbeats of a worker, at most; stamps of a task.
_RAREST_BEAT, _MOST_STAMPS = 3_600.0, 100


@dataclass(slots=True)
class TaskRow:
    """One task. Times are Unix times; `steps` are (time, event, worker). `key` orders rows by the time of their first event."""

    id: str
    key: int
    name: str | None = None
    state: str = states.PENDING
    # Of the event that the state is of, and its place in a task's life.
    state_at: float = 0.0
    state_rank: int = -1
    queue: str | None = None
    worker: str | None = None
    root_id: str | None = None
    parent_id: str | None = None
    rerun_of: str | None = None
    # The group that it is a member of, and where in it; the group whose results it gets (a chord's body).
    group_id: str | None = None
    group_index: int | None = None
    joins: str | None = None
    # The periodic task that beat sent it for.
    periodic: str | None = None
    # What follows it (events.dispatcher), as JSON.
    follows: str | None = None
    args: str | None = None
    kwargs: str | None = None
    retries: int = 0
    eta: str | None = None
    expires: str | None = None
    sent_at: float | None = None
    received_at: float | None = None
    started_at: float | None = None
    ended_at: float | None = None
    runtime: float | None = None
    result: str | None = None
    exception: str | None = None
    # The exception's class, by which failures are grouped.
    error: str | None = None
    traceback: str | None = None
    stamps: str | None = None
    # The whole message, as JSON, with task_history_arguments.
    message: str | None = None
    steps: str = "[]"

    @property
    def first_at(self) -> float:
        """The time of its first event."""
        return (self.key >> KEY_BITS) / 1e6


_compact = json.JSONEncoder(separators=(",", ":")).encode
COLUMNS = tuple(TaskRow.__dataclass_fields__)
_values = attrgetter(*COLUMNS)


def as_columns(row: TaskRow) -> JsonObject:
    """A row for the database."""
    return dict(zip(COLUMNS, _values(row), strict=True))


# The last moment of which there is a key: a database's integer has 63 bits. That is in the year 2255.
_LAST = 9e9


def key_at(moment: float) -> int:
    """The smallest key of that time, or of the first or last one that has keys."""
    return int(min(max(moment, 0.0), _LAST) * 1e6) << KEY_BITS


@dataclass(slots=True)
class WorkerRow:
    """One worker; `online` is what it said last. Unix times are of its clock, `heard_at` of that of who reads what it says."""

    hostname: str
    online: bool = True
    first_at: float = 0.0
    last_at: float = 0.0
    software: str | None = None
    processed: int | None = None
    active: int | None = None
    frequency: float | None = None
    heard_at: float = 0.0


class Minute(Counter[str]):
    """Numbers of one minute: sent, succeeded, failed, retried, revoked, started; runtime, waited (milliseconds)."""


_COUNTED = {
    "task-sent": "sent",
    "task-succeeded": "succeeded",
    "task-failed": "failed",
    "task-retried": "retried",
    "task-revoked": "revoked",
}


@dataclass(slots=True)
class Batch:
    """Rows that events change. `tasks` begins with those that the index has; `touched` is what is to be written; it is `now`.

    Where it `is_fresh` the events are read as they come: those of an hour ago say nothing of who is there now."""

    tasks: dict[str, TaskRow] = field(default_factory=dict)
    workers: dict[str, WorkerRow] = field(default_factory=dict)
    touched: set[str] = field(default_factory=set)
    # Whose text for searches has changed.
    texts: set[str] = field(default_factory=set)
    minutes: dict[int, Minute] = field(default_factory=dict)
    now: float = field(default_factory=time.time)
    is_fresh: bool = False
    # Events that are none of ours, or have no usable time or id.
    skipped: int = 0

    def add_all(self, events: Iterable[EventFields]) -> None:
        """Take events in."""
        steps: dict[str, list[list[object]]] = {}
        for event in events:
            moment, hostname = _moment(event.get("timestamp")), short(event.get("hostname")) or ""
            event_type = short(event.get("type")) or ""
            if moment is None:
                self.skipped += 1
            elif event_type.startswith("worker-"):
                # Of a clock that was ahead and is put right the next event is news, too.
                self._add_worker(event_type, event, min(moment, self.now), hostname)
            elif event_type.startswith("task-") and (task_id := short(event.get("uuid"))):
                heard = moment if moment < self.now + _AHEAD else self.now
                row = self.tasks.get(task_id)
                if row is None:
                    row = self.tasks[task_id] = TaskRow(task_id, key_at(heard) | random.getrandbits(KEY_BITS))
                if task_id not in steps:
                    steps[task_id] = json.loads(row.steps)
                if self._is_new(steps[task_id], event_type, moment, hostname):
                    self._add_task(row, event_type, event, heard, hostname)
            else:
                self.skipped += 1
        for task_id in self.touched & steps.keys():
            self.tasks[task_id].steps = _compact(_in_order(steps[task_id]))

    @staticmethod
    def _is_new(steps: list[list[object]], event_type: str, moment: float, hostname: str) -> bool:
        """Note a step; False where it was noted before: what was not acknowledged comes again."""
        step: list[object] = [moment, event_type.removeprefix("task-"), hostname]
        if step in steps:
            return False
        if len(steps) >= MOST_STEPS:
            steps.pop(MOST_STEPS // 2)  # the first ones and the last ones say most
        steps.append(step)
        return True

    def _add_task(self, row: TaskRow, event_type: str, event: EventFields, moment: float, hostname: str) -> None:
        self.touched.add(row.id)
        has_text = _fill(row, event)
        counter = _COUNTED.get(event_type)
        if counter is not None:
            minute = self.minutes.setdefault(int(moment // 60), Minute())
            minute[counter] += 1
        match event_type:
            case "task-sent":
                row.sent_at = moment if row.sent_at is None else min(row.sent_at, moment)
            case "task-received":
                _begin_again(row, moment)
                row.received_at, row.worker = moment, hostname
            case "task-started":
                row.started_at, row.worker = moment, hostname
                begun = row.received_at if row.sent_at is None else row.sent_at
                # What waited for its time has not waited for a worker.
                if begun is not None and row.eta is None:
                    minute = self.minutes.setdefault(int(moment // 60), Minute())
                    minute["started"] += 1
                    minute["waited"] += max(0, round((moment - begun) * 1000))
            case "task-succeeded":
                row.runtime, row.worker = _runtime(event.get("runtime")), hostname
                row.result = text(event.get("result"), LONG)
                if row.runtime is not None:
                    self.minutes[int(moment // 60)]["runtime"] += round(row.runtime * 1000)
            case "task-failed" | "task-retried":
                row.exception, row.worker = text(event.get("exception"), LONG), hostname
                row.traceback = text(event.get("traceback"), LONGEST)
                row.error = kind_of(row.exception)
                has_text = True
        _set_state(row, event_type, event, moment)
        if has_text:
            self.texts.add(row.id)

    def _add_worker(self, event_type: str, event: EventFields, moment: float, hostname: str) -> None:
        if not hostname:
            self.skipped += 1
            return
        row = self.workers.setdefault(hostname, WorkerRow(hostname, first_at=moment))
        is_put_back = self.is_fresh and moment < row.last_at - _CLOCK_PUT_BACK
        if moment < min(row.last_at, self.now) and not is_put_back:
            return
        if self.is_fresh:
            row.heard_at = self.now
        row.last_at, row.online = moment, event_type != "worker-offline"
        if event_type == "worker-online":
            row.first_at = moment
        software = " ".join(part for name in ("sw_ident", "sw_ver") if (part := short(event.get(name))))
        row.software = software[:SHORT] or row.software
        row.processed, row.active = _whole(event.get("processed")), _whole(event.get("active"))
        frequency = _number(event.get("freq"))
        row.frequency = frequency if frequency is not None and 0 < frequency <= _RAREST_BEAT else None


def _in_order(steps: list[list[object]]) -> list[list[object]]:
    """By time; a call is sent before anything else, though its event is made when the broker has confirmed it."""
    ordered = sorted(steps, key=_order)
    first = next((step for step in ordered if step[1] == "sent"), None)
    if first is not None and _seconds(first) < _seconds(ordered[0]) + SENT_LATE:
        ordered.remove(first)
        ordered.insert(0, first)
    return ordered


def _order(step: list[object]) -> tuple[float, int]:
    return _seconds(step), _STATES.get(f"task-{step[1]}", ("", 2))[1]


def _seconds(step: list[object]) -> float:
    return float(step[0])  # type: ignore[arg-type]  # as JSON has it


_NAMES = ("name", "queue", "root_id", "parent_id", RERUN_OF, "group_id", "joins", "periodic", "eta", "expires")
# Characters of what follows a task, and of a whole message, as JSON.
_LONGEST_FOLLOWS, _LONGEST_MESSAGE = 50_000, 1_000_000
# Seconds: no task runs longer, so that what minutes add up fits a database's integers.
_LONGEST_RUN = 1e9


def _fill(row: TaskRow, event: EventFields) -> bool:
    """What received and sent events tell of the call itself; whether its text for searches has changed."""
    before = row.name, row.queue, row.args, row.kwargs
    for name in _NAMES:
        if event.get(name) is not None:
            setattr(row, name, short(event[name]))
    if _whole(event.get("group_index")) is not None:
        row.group_index = event["group_index"]
    if isinstance(event.get("follows"), list):
        row.follows = _as_json(event["follows"], _LONGEST_FOLLOWS) or row.follows
    row.retries = max(row.retries, _whole(event.get("retries")) or 0)
    if isinstance(event.get("stamps"), Mapping):
        stamps = itertools.islice(event["stamps"].items(), _MOST_STAMPS)
        row.stamps = json.dumps({short(name) or "": _stamp_values(value) for name, value in stamps})
    if isinstance(event.get("message"), Mapping):
        row.message = _as_json(event["message"], _LONGEST_MESSAGE) or row.message
    for name in ("args", "kwargs"):
        if event.get(name) is not None:
            setattr(row, name, text(event[name], LONG))
    return (row.name, row.queue, row.args, row.kwargs) != before


def _as_json(value: object, limit: int) -> str | None:
    """As JSON with kombu's types (a message's headers may hold times); None for what has no such form, or a longer one."""
    try:
        written = dumps(value, "json").body.decode()
    except EncodeError:
        return None
    return written if len(written) <= limit else None


def _stamp_values(value: object) -> list[str]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [short(one) or "" for one in values[:20]]


def _begin_again(row: TaskRow, moment: float) -> None:
    """A task that had ended is received again: it was redelivered, retried or run again."""
    if row.state in (*states.READY_STATES, states.REJECTED, states.RETRY) and moment >= row.state_at:
        row.started_at = row.ended_at = row.runtime = row.result = None
        if row.state != states.RETRY:
            row.exception = row.error = row.traceback = None


def _set_state(row: TaskRow, event_type: str, event: EventFields, moment: float) -> None:
    state, rank = _STATES.get(event_type, ("", -1))
    if not state or (rank == 0 and row.state_rank > 0):
        return
    if row.state_rank > 0 and (moment, rank) < (row.state_at, row.state_rank):
        return
    if event_type == "task-rejected" and (event.get("requeue") or row.state == states.FAILURE):
        return  # it comes again; or the failure says why
    row.state, row.state_at, row.state_rank = state, moment, rank
    if state in states.READY_STATES or state == states.REJECTED:
        row.ended_at = moment


def kind_of(exception: str | None) -> str | None:
    """The class in the repr of an exception."""
    match = _KIND.match(exception or "")
    return short(match[1]) if match else None


def searchable(row: TaskRow) -> str:
    """The text that searches look in, with marks; nothing where there is no text."""
    parts = [part for part in (row.args, row.kwargs, row.exception) if part]
    if not parts:
        return ""
    marks = [FAILED_MARK] if row.exception else []
    marks += [mark(prefix, value) for prefix, value in (("n", row.name), ("q", row.queue)) if value]
    return "\n".join([*parts, *marks])


# Words that no text has: with them a search for words that many texts have reads only those of one task, queue or fate.
FAILED_MARK = "zqxfailed"


def mark(prefix: str, value: str) -> str:
    """The mark of a task's name (n) or queue (q)."""
    return f"zqx{prefix}{crc32(value.encode()):08x}"


def short(value: object) -> str | None:
    """A name or an id."""
    written = text(value, SHORT)
    if written is None or written.isascii() or len(encoded := written.encode()) <= _SHORT_BYTES:
        return written
    return f"{encoded[: _SHORT_BYTES - 3].decode(errors='ignore')}…"


def text(value: object, limit: int) -> str | None:
    """A text as any database takes it: not longer than this, without NUL and lone surrogates."""
    if value is None:
        return None
    if type(value) is str and len(value) <= limit and value.isascii() and "\0" not in value:
        return value
    if isinstance(value, str):
        written = value
    else:  # of lists within each other str() makes no text
        written = saferepr(value, limit) if isinstance(value, (list, tuple, Mapping)) else str(value)
    if len(written) > limit:
        written = f"{written[: limit - 1]}…"
    if not written.isascii():
        written = written.encode("utf-8", "replace").decode()
    return written.replace("\0", "\ufffd")


def _moment(value: object) -> float | None:
    moment = _number(value)
    return moment if moment is not None and _EARLIEST < moment < _LATEST else None


def _number(value: object) -> float | None:
    return (
        float(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and -1e12 < value < 1e12
        else None
    )


def _runtime(value: object) -> float | None:
    seconds = _number(value)
    return seconds if seconds is not None and 0 <= seconds < _LONGEST_RUN else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31 else None
