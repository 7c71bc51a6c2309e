"""What the console's pages show, as plain data: the same for a browser and for JSON. Blocking; nothing of HTTP is known here."""

from __future__ import annotations

import ast
import contextlib
import json
import math
import re
from collections import Counter
from dataclasses import asdict, replace
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from amqtask.beat.operating import KeepsToItself, Schedules, call_text, described
from amqtask.console.workflow import Workflow, numbers
from amqtask.exceptions import ConfigurationError, QueueNotFound
from amqtask.ground.printable import moment
from amqtask.history.client import MOST_OF_WORKFLOW
from amqtask.protocol.message import Delivery
from amqtask.remote.kept import pause_of
from amqtask.services.delayed import MOST_COUNTED as MOST_LOOKED_AT
from amqtask.services.delayed import MOST_OF_A_QUEUE, Which, look
from amqtask.services.rerunning import as_entry
from amqtask.states import READY_STATES, REJECTED
from amqtask.topology.declarations import own_dead_letters

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from amqtask.app import AmqTask
    from amqtask.beat.contract import Entry
    from amqtask.beat.scheduler import Scheduler
    from amqtask.ground.shapes import JsonObject
    from amqtask.history.client import FailureGroup, PastTask, PastWorker, Search, TaskHistory
    from amqtask.protocol.entities import Queue
    from amqtask.remote.kept import Pause

PAGE_SIZE = 50
# Dead letters of a queue that are looked at.
MOST_DEAD = 500
# Seconds that workers have to answer.
ANSWER_SECONDS = 1.0
# The longest and the latest time (seconds) that a node may tell: anything may answer as one.
_LATEST = 1e10
# No text in JSON, nor in a page.
_SURROGATES = re.compile("[\ud800-\udfff]")
STATES = ("SUCCESS", "FAILURE", "RETRY", "STARTED", "RECEIVED", "PENDING", "REVOKED", "REJECTED")


def search(app: AmqTask, query: Mapping[str, str]) -> JsonObject:
    """Tasks that fit the fields of a form, and the cursor of the next page. Raises: ConfigurationError."""
    page = app.history.page(**asked(query), limit=PAGE_SIZE, is_whole=query.get("whole") == "yes")
    return {
        "query": {name: value for name, value in query.items() if value and name != "after"},
        "tasks": [as_row(one) for one in page.tasks],
        "next": page.next,
        "looked_to": page.looked_to,
    }


def asked(query: Mapping[str, str]) -> Search:
    """The search of a form's fields."""
    texts = {
        name: query.get(name, "").strip() or None for name in ("state", "task", "queue", "worker", "error", "text")
    }
    return {
        **texts,  # type: ignore[typeddict-item]  # of these names
        "root_id": query.get("root_id", "").strip() or None,
        "periodic": query.get("periodic", "").strip() or None,
        "stamp": _stamp(query.get("stamp", "")),
        "since": _moment(query.get("since", "")),
        "until": _moment(query.get("until", "")),
        "after": query.get("after") or None,
    }


def _moment(written: str) -> datetime | None:
    """A time as it is written in a form; "": no limit. What is none must not stand for all tasks."""
    try:
        return moment(written) if written.strip() else None
    except ValueError as error:
        raise ConfigurationError(str(error)) from None


def whole_number(form: Mapping[str, str], name: str) -> int | None:
    """The number that a field has; None where it has none."""
    written = form.get(name, "").strip()
    return int(written) if written.isascii() and written.isdigit() and len(written) < 10 else None


def _stamp(written: str) -> tuple[str, str] | None:
    name, separator, value = written.partition("=")
    if written.strip() and not separator:
        raise ConfigurationError(f"a stamp is asked for as name=value, not {written[:100]!r}")
    return (name, value) if separator else None


def as_row(task: PastTask) -> JsonObject:
    """A task without its message, which is nobody's to see."""
    fields = asdict(task)
    del fields["message"]
    return fields


def task(app: AmqTask, task_id: str) -> JsonObject | None:
    """One task with its family; None where nothing is known of it."""
    history = app.history.get(task_id)
    if history is None:
        return None
    return {
        "task": as_row(history.task),
        "editable": _editable(history.task),
        "is_in_workflow": _is_in_workflow(history),
        "parents": [as_row(one) for one in history.parents],
        "children": [as_row(one) for one in history.children],
        "reruns": [as_row(one) for one in app.history.reruns(task_id)],
    }


def _editable(task: PastTask) -> dict[str, str]:
    """The arguments as JSON, to be corrected: of those that are shown whole and are the same in JSON."""
    found = {}
    for name, shown in (("args", task.args), ("kwargs", task.kwargs)):
        try:
            # What is shortened has dots in it.
            value = None if not shown or "..." in shown or "…" in shown else ast.literal_eval(shown)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = None
        if isinstance(value, (list, tuple) if name == "args" else dict) and _is_json(value):
            found[name] = json.dumps(value, ensure_ascii=False)
    return found


def _is_json(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_json, value))
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_json(name) and _is_json(one) for name, one in value.items())
    if isinstance(value, str):
        return not _SURROGATES.search(value)
    return value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def _is_in_workflow(history: TaskHistory) -> bool:
    one = history.task
    belongs = one.group_id or one.joins or one.parent_id or history.children or (one.root_id and one.root_id != one.id)
    return bool(belongs or one.follows)


def workflow(app: AmqTask, some_id: str) -> JsonObject | None:
    """The workflow that an id belongs to (of its root, of any task or group); None where nothing is known of it."""
    tasks = app.history.workflow(some_id)
    if not tasks:
        return None
    first = next((task for task in tasks if task.id == some_id), tasks[0])
    return {
        "id": some_id,
        "root_id": first.root_id or first.id,
        "name": first.name,
        "count": len(tasks),
        "more": len(tasks) >= MOST_OF_WORKFLOW,
        "states_of": numbers(tasks),
        "lines": list(Workflow(tasks).lines()),
    }


def failures(app: AmqTask, since: str) -> JsonObject:
    """Failures in groups."""
    groups = app.history.failures(since=_moment(since or "1d"))
    return {"since": since or "1d", "groups": [as_group(group) for group in groups]}


def as_group(group: FailureGroup) -> JsonObject:
    """A group of failures, its example without its message."""
    return {**asdict(group), "example": as_row(group.example)}


def queues(app: AmqTask) -> JsonObject:
    """The application's queues, their depths, dead letters and pauses."""
    paused = app.control.pauses.read()
    rows: list[JsonObject] = []
    named = list(named_queues(app))
    with app.broker.admin() as admin:
        states = admin.states([queue.name for queue, _ in named])
        dead_states = admin.states([dead for _, dead in named if dead is not None])
    for queue, dead in named:
        # What is not there is made with its first message.
        ready, consumers = states.get(queue.name, (None, None))
        pause = pause_of(paused, queue.name)
        row: JsonObject = {"queue": queue.name, "ready": ready, "consumers": consumers, "dead": None, "paused": None}
        if dead in dead_states:
            row["dead"] = dead_states[dead].ready
        if pause is not None:
            row["paused"] = {"by": pause.by, "since": pause.began}
        rows.append(row)
    paused_elsewhere = [pause._asdict() for name, pause in paused.items() if name not in {row["queue"] for row in rows}]
    return {"queues": rows, "paused_elsewhere": paused_elsewhere}


def named_queues(app: AmqTask) -> Iterator[tuple[Queue, str | None]]:
    """The queues that the application consumes or routes tasks to, each with the name of its dead-letter queue."""
    app.load_tasks()
    names = dict.fromkeys(queue.name for queue in app.queues.consumed)
    for name in app.tasks.own:
        queue = app.tasks[name].queue
        if isinstance(queue, str):
            names[queue] = None
    for queue in app.queues.with_shards(app.queues[name] for name in names):
        if not queue.broadcast:
            yield queue, own_dead_letters(queue, app.queue_defaults)


def dead(app: AmqTask) -> JsonObject:
    """Dead letters of all queues, in groups of queue, task and reason; and the messages themselves."""
    messages: list[JsonObject] = []
    with app.broker.admin() as admin:
        states = admin.states([name for _, name in named_queues(app) if name is not None])
        totals = {name: state.ready for name, state in states.items()}
        for name in filter(totals.get, totals):
            with contextlib.suppress(QueueNotFound):
                messages += [as_entry(delivery) for delivery in admin.browse(name, MOST_DEAD)]
    counts = Counter((entry["queue"], entry["task"], entry["reason"]) for entry in messages)
    groups = [
        {"queue": queue, "task": name, "reason": reason, "count": number}
        for (queue, name, reason), number in counts.most_common()
    ]
    return {"queues": totals, "groups": groups, "messages": messages, "most": MOST_DEAD}


def is_dead_letter(delivery: Delivery, *, task_id: str | None, task: str | None, reason: str | None) -> bool:
    """Whether a dead letter is meant."""
    entry = as_entry(delivery)
    if task_id is not None:
        return bool(entry["id"] == task_id)
    return bool(entry["task"] == task and (reason is None or entry["reason"] == reason))


def workers(app: AmqTask) -> JsonObject:
    """What each worker is and runs."""
    return {"workers": worker_rows(app, ANSWER_SECONDS)}


def worker_rows(app: AmqTask, timeout: float) -> list[JsonObject]:
    """A row for each worker that answers; with task_history also for those that are there, or gone, without a word."""
    stats = app.control.ask("stats", {}, timeout=timeout)
    names = list(stats)
    active = app.control.ask("active", {"safe": True}, timeout=timeout, limit=len(names)) if names else {}
    consumed = app.control.ask("active_queues", {}, timeout=timeout, limit=len(names)) if names else {}
    rows = [_worker_row(name, stats[name], active.get(name), consumed.get(name)) for name in sorted(names)]
    if app.conf.task_history:
        rows += [_unheard(one) for one in app.history.workers() if one.is_online and one.hostname not in stats]
    return rows


def _worker_row(name: str, stats: Any, active: Any, queues: Any) -> JsonObject:
    """Of what a worker answers; Celery's have other numbers, and what is not there is None."""
    numbers = _mapping(stats)
    pool, total = _mapping(numbers.get("pool")), _mapping(numbers.get("total"))
    scaler = _mapping(numbers.get("autoscaler"))
    return {
        "worker": name,
        "state": "there",
        "is_celery": is_celery(stats),
        "pool": _pool_name(pool),
        "scales": {limit: scaler.get(limit) for limit in ("min", "max")} if scaler else None,
        "slots": _slots(pool),
        "running": len(active) if isinstance(active, list) else None,
        "done": sum(number for number in total.values() if isinstance(number, int)),
        "prefetch": numbers.get("prefetch_count"),
        "up": _seconds(numbers.get("uptime")),
        "pid": numbers.get("pid"),
        "queues": [queue.get("name") for queue in queues if isinstance(queue, dict)]
        if isinstance(queues, list)
        else [],
        "paused": paused if isinstance(paused := numbers.get("paused"), list) else [],
        "tasks": [_task(one) for one in active if isinstance(one, dict)] if isinstance(active, list) else [],
    }


def is_celery(stats: Any) -> bool:
    """Whether this is what a worker of Celery's tells of itself."""
    return str(_mapping(_mapping(stats).get("pool")).get("implementation")).startswith("celery.")


def _slots(pool: JsonObject) -> Any:
    """Celery's prefork tells its first size for ever, and its processes as they are."""
    processes = pool.get("processes") if is_celery({"pool": pool}) else None
    return len(processes) if isinstance(processes, list) and processes else pool.get("max-concurrency")


def _pool_name(pool: JsonObject) -> str | None:
    """A pool of Celery's tells its class, celery.concurrency.prefork:TaskPool."""
    name = pool.get("implementation")
    return f"celery {str(name).rpartition(':')[0].rpartition('.')[2]}" if is_celery({"pool": pool}) else name


def _task(told: JsonObject) -> JsonObject:
    """A task as a node tells of it; what is no id or no time is None."""
    task_id, since = told.get("id"), told.get("time_start")
    return {**told, "id": task_id if isinstance(task_id, str) else None, "time_start": _seconds(since)}


def _seconds(value: object) -> float | None:
    """A time that a node tells; None for what is none."""
    return value if isinstance(value, (int, float)) and 0 <= value < _LATEST else None


def _mapping(value: object) -> JsonObject:
    return value if isinstance(value, dict) else {}


def _unheard(worker: PastWorker) -> JsonObject:
    row = _worker_row(worker.hostname, {}, None, None)
    return row | {
        "state": "gone" if worker.is_gone else "silent",
        "done": worker.processed,
        "last_heard": worker.last_heard,
    }


# -- Delayed tasks, the soonest first; limits over all workers.

DELAYED_PAGE_SIZE = 100
# Keys of a limit that are shown.
MOST_KEYS = 10


def delayed(app: AmqTask, query: Mapping[str, str]) -> JsonObject:
    """A page of the delayed tasks that fit."""
    waiting = look(app, which_delayed(query))
    last = max(1, -(-len(waiting.tasks) // DELAYED_PAGE_SIZE))
    page = min(last, whole_number(query, "page") or 1)
    return {
        "query": {name: query[name] for name in ("id", "task", "queue") if query.get(name)},
        "tasks": [asdict(task) for task in waiting.tasks[(page - 1) * DELAYED_PAGE_SIZE : page * DELAYED_PAGE_SIZE]],
        "number": len(waiting.tasks),
        "total": waiting.total,
        "is_part": waiting.is_part,
        "most": MOST_LOOKED_AT,
        "most_of_a_queue": MOST_OF_A_QUEUE,
        "page": page,
        "pages": last,
    }


def which_delayed(form: Mapping[str, str]) -> Which:
    """Which delayed tasks a form means."""
    return Which(*(form.get(name, "").strip() or None for name in ("id", "task", "queue")))


def limits(app: AmqTask) -> JsonObject:
    """All limits of all tasks."""
    app.load_tasks()
    try:
        found = app.limits.read()
    except ConfigurationError as error:
        return {"limits": [], "problem": str(error)}
    rows = [asdict(limit) | {"keys": [use._asdict() for use in limit.keys[:MOST_KEYS]]} for limit in found]
    return {"limits": rows, "problem": None}


# -- Periodic tasks: what ran, what comes within a day, what is paused.
#
# Entries are read as beat reads them (beat_scheduler), but nothing is written. Where the store does not know when an entry ran
# (its file is on another machine, or it has none), the history does.

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
        row, following = _schedule_row(app, operated, entry, paused.get(entry.name), now)
        shown["entries"].append(row)
        ahead += following
    ahead.sort(key=lambda one: (one["due_at"], one["name"]))
    return shown | {"ahead": ahead[:MOST_IN_ALL], "is_cut": len(ahead) > MOST_IN_ALL}


def _schedule_row(
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


# -- The page before something is done to all tasks that a search has: how many they are.

# Tasks that are counted: of millions that would take seconds.
MOST_COUNTED = 10_000
ENDED = (*sorted(READY_STATES), REJECTED)
_FIELDS = ("state", "task", "queue", "worker", "error", "text", "root_id", "stamp", "since", "until")
_TITLES = {"rerun": "Run again", "revoke": "Revoke"}


def confirmation(app: AmqTask, action: str, query: Mapping[str, str]) -> JsonObject | None:
    """How many tasks fit the search, and of which states; `fields` say which, also when more have come. None: no such action.

    With `more` the numbers are those of the newest MOST_COUNTED and one, or of as many as were found soon, which is down to
    `looked_to`; older ones that fit are meant as well."""
    if action not in _TITLES:
        return None
    fields = {name: query[name] for name in _FIELDS if query.get(name)}
    fields["after"] = app.history.now()
    states = app.history.count(**asked(fields), most=MOST_COUNTED)
    meant = {state: number for state, number in states.items() if (state in ENDED) == (action == "rerun")}
    number = sum(meant.values())
    return {
        "action": action,
        "title": _TITLES[action],
        "number": number,
        "more": states.has_more,
        "looked_to": states.looked_to,
        "of": meant,
        "left_alone": states.total - number,
        "fields": fields,
    }
