"""State: keeps the state of workers and tasks by their events, under the names of celery.events.state.

Events of one task may come in another order than they happened: each worker's own events come in order, but not those of a
producer (task-sent) compared to those of workers. A task's state therefore never goes back to an earlier one; only RETRY begins
anew.

Timestamps are Unix times and taken as they are; `local_received` is the receiver's own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from amqtask import states
from amqtask.ground.printable import bounded_logger

if TYPE_CHECKING:
    from amqtask.ground.shapes import JsonObject

logger = bounded_logger(__name__)

T = TypeVar("T")
Event = Mapping[str, Any]

# A worker counts as gone when no heartbeat came for so many heartbeat intervals.
HEARTBEATS_MISSED = 2.0
HEARTBEATS_KEPT = 4
# When a worker's clock and ours differ by more seconds, that is logged once.
MOST_DRIFT = 16
# The state of a task after an event; other events are states of their own (task-progress: PROGRESS).
STATE_OF_EVENT = {
    "sent": states.PENDING,
    "received": states.RECEIVED,
    "started": states.STARTED,
    "failed": states.FAILURE,
    "retried": states.RETRY,
    "succeeded": states.SUCCESS,
    "revoked": states.REVOKED,
    "rejected": states.REJECTED,
}
# From the last to the first of a task's life; custom states stand after FAILURE (celery/states.py).
_ORDER = (states.SUCCESS, states.FAILURE, None, states.REVOKED, states.STARTED, states.RECEIVED, states.REJECTED,
          states.RETRY, states.PENDING)  # fmt: skip
_RANK = {state: rank for rank, state in enumerate(_ORDER)}
# The latest Unix time, and the longest heartbeat interval (seconds), that an event may have.
_END_OF_TIME = 1e11
# Attributes that no event may set.
_OURS = frozenset({"heartbeats", "children", "cluster_state", "state", "worker", "client"})


def _rank(state: str) -> int:
    return _RANK.get(state, _RANK[None])


class Worker:
    """One worker, as its events describe it."""

    _fields = (
        "hostname", "pid", "freq", "heartbeats", "clock", "active", "processed", "loadavg", "sw_ident", "sw_ver", "sw_sys",
    )  # fmt: skip

    def __init__(
        self, hostname: str, pid: int | None = None, freq: float = 60, clock: int = 0, **fields: object
    ) -> None:
        self.hostname = hostname
        self.pid = pid
        self.freq = freq
        self.clock = clock
        # Our times of its last heartbeats, the latest at the end.
        self.heartbeats: list[float] = []
        self.active: int | None = None
        self.processed: int | None = None
        self.loadavg: list[float] | None = None
        self.sw_ident: str | None = None
        self.sw_ver: str | None = None
        self.sw_sys: str | None = None
        self._is_drifting = False
        self.update(fields)

    def event(
        self,
        type_: str | None,
        timestamp: float | None = None,
        local_received: float | None = None,
        fields: Event | None = None,
    ) -> None:
        """Apply one of its events; `type_` is "online", "heartbeat", "offline", None for an event about a task."""
        self.update(fields or {})
        if type_ == "offline":
            self.heartbeats.clear()
        elif local_received and timestamp:
            self._look_at_clocks(timestamp, local_received)
            self.heartbeats.append(local_received)
            self.heartbeats.sort()
            del self.heartbeats[:-HEARTBEATS_KEPT]

    def _look_at_clocks(self, timestamp: float, local_received: float) -> None:
        drift = abs(local_received - timestamp)
        if drift > MOST_DRIFT and not self._is_drifting:
            self._is_drifting = True
            logger.warning(
                "events of %s are %.0f s away from the time here: are both clocks right?", self.hostname, drift
            )

    def update(self, fields: Event) -> None:
        """Set the fields of an event."""
        self.__dict__.update(_settable(fields, Worker))

    @property
    def heartbeat_expires(self) -> float:
        """When it counts as gone (Unix time)."""
        return self.heartbeats[-1] + float(self.freq) * HEARTBEATS_MISSED if self.heartbeats else 0.0

    @property
    def alive(self) -> bool:
        """Whether a heartbeat came recently."""
        return bool(self.heartbeats) and time.time() < self.heartbeat_expires

    @property
    def status_string(self) -> str:
        return "ONLINE" if self.alive else "OFFLINE"

    @property
    def id(self) -> str:
        return f"{self.hostname}.{self.pid}"

    def __eq__(self, other: object) -> bool:
        return self.hostname == other.hostname if isinstance(other, Worker) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.hostname)

    def __repr__(self) -> str:
        return f"<Worker: {self.hostname} ({self.status_string} clock:{self.clock})>"


class Task:
    """One task, as its events describe it. Times are Unix times of the event that the attribute is named after."""

    _fields = (
        "uuid", "name", "state", "received", "sent", "started", "rejected", "succeeded", "failed", "retried", "revoked",
        "args", "kwargs", "eta", "expires", "retries", "worker", "result", "exception", "timestamp", "runtime",
        "traceback", "exchange", "routing_key", "clock", "client", "root_id", "parent_id",
    )  # fmt: skip
    _info_fields = (
        "args", "kwargs", "retries", "result", "eta", "runtime", "expires", "exception", "exchange", "routing_key",
        "root_id", "parent_id",
    )  # fmt: skip

    def __init__(self, uuid: str, cluster_state: State | None = None) -> None:
        self.uuid = uuid
        self.cluster_state = cluster_state
        self.state: str = states.PENDING
        self.clock = 0
        self.timestamp: float | None = None
        self.worker: Worker | None = None
        self.children: set[Task] = set()
        for name in self._fields:
            self.__dict__.setdefault(name, None)

    # Fields of events are set by name.
    name: str | None
    client: str | None
    parent_id: str | None
    root_id: str | None

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the events told no {name!r} of this task")

    def event(
        self,
        type_: str,
        timestamp: float | None = None,
        local_received: float | None = None,
        fields: Event | None = None,
    ) -> None:
        """Apply one of its events; `type_` is "received", "succeeded" …"""
        new_fields = _settable(fields or {}, Task)
        state = STATE_OF_EVENT.get(type_)
        if state is None:
            state = type_.upper()
        else:
            setattr(self, type_, timestamp)
        if states.RETRY not in (state, self.state) and _rank(state) > _rank(self.state):
            # The event is older than the present state, and only fills gaps.
            new_fields = {name: value for name, value in new_fields.items() if getattr(self, name, None) is None}
        else:
            new_fields.update(state=state, timestamp=timestamp)
        self.__dict__.update(new_fields)

    def info(self, fields: Iterable[str] | None = None, extra: Iterable[str] = ()) -> JsonObject:
        """The fields to show that have a value."""
        names = [*(self._info_fields if fields is None else fields), *extra]
        shown = {name: getattr(self, name, None) for name in names}
        return {name: value for name, value in shown.items() if value is not None}

    def as_dict(self) -> JsonObject:
        """All fields; `root`, `parent` and `children` as ids."""
        own_fields = {name: getattr(self, name) for name in self._fields}
        return {
            **own_fields,
            "root": self.root_id,
            "parent": self.parent_id,
            "children": [child.uuid for child in self.children],
        }

    @property
    def id(self) -> str:
        return self.uuid

    @property
    def ready(self) -> bool:
        return self.state in states.READY_STATES

    @property
    def origin(self) -> str | None:
        """The worker that has the task, else the sender."""
        return self.client if self.worker is None else self.worker.id

    @property
    def parent(self) -> Task | None:
        return self._task_with(self.parent_id)

    @property
    def root(self) -> Task | None:
        return self._task_with(self.root_id)

    def _task_with(self, uuid: str | None) -> Task | None:
        return self.cluster_state.tasks.get(uuid) if uuid and self.cluster_state is not None else None

    def __eq__(self, other: object) -> bool:
        return self.uuid == other.uuid if isinstance(other, Task) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.uuid)

    def __repr__(self) -> str:
        return f"<Task: {self.name}({self.uuid}) {self.state} clock:{self.clock}>"


class TaskIndex(dict[str, set[Task]]):
    """Tasks by a name; called with one, (id, task) pairs, the latest first."""

    def __init__(self, by_time: Callable[[], Iterable[tuple[str, Task]]]) -> None:
        super().__init__()
        self._by_time = by_time

    def __missing__(self, key: str) -> set[Task]:
        return set()

    def __call__(self, key: str, limit: int | None = None, reverse: bool = True) -> Iterator[tuple[str, Task]]:
        members = self[key]
        pairs = list(self._by_time())
        matching = (pair for pair in (pairs if reverse else reversed(pairs)) if pair[1] in members)
        return islice(matching, limit)

    def add(self, key: str, task: Task) -> None:
        self.setdefault(key, set()).add(task)

    def discard(self, key: str | None, task: Task) -> None:
        members = self.get(key) if key is not None else None
        if members is not None and key is not None:
            members.discard(task)
            if not members:
                del self[key]


class Bounded(dict[str, "Task"]):
    """Tasks by id; `limit` is how many are kept, for monitors that read it."""

    limit: int = 0


class State:
    """The state of the cluster after the last event. Safe to read in one thread while another one feeds it events.

    `callback(state, event)` is called before each event is applied; `on_node_join(worker)` and `on_node_leave(worker)`
    when workers come and go. When there are more than `max_tasks_in_memory` tasks the oldest are forgotten.
    """

    def __init__(
        self,
        callback: Callable[[State, Event], object] | None = None,
        max_workers_in_memory: int = 5000,
        max_tasks_in_memory: int = 10_000,
        on_node_join: Callable[[Worker], object] | None = None,
        on_node_leave: Callable[[Worker], object] | None = None,
    ) -> None:
        self.event_callback = callback
        self.max_workers_in_memory = max_workers_in_memory
        self.max_tasks_in_memory = max_tasks_in_memory
        self.on_node_join = on_node_join
        self.on_node_leave = on_node_leave
        # Handlers of groups other than "task" and "worker": group → handler(subject, event).
        self.handlers: dict[str, Callable[[str, Event], object]] = {}
        self.workers: dict[str, Worker] = {}
        self.tasks = Bounded()
        self.tasks.limit = max_tasks_in_memory
        self.tasks_by_type = TaskIndex(self.tasks_by_time)
        self.tasks_by_worker = TaskIndex(self.tasks_by_time)
        self.event_count = 0
        self.task_count = 0
        self._seen_types: set[str] = set()
        self._orphans: dict[str, set[str]] = {}
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[object, ...]:
        """Monitors pickle a state into a file; callbacks are not in it, and have to be set again."""
        with self._lock:
            limits = (self.max_workers_in_memory, self.max_tasks_in_memory)
            workers = [dict(vars(worker)) for worker in self.workers.values()]
            tasks = [
                {**vars(task), **_LINKS, "worker": task.worker and task.worker.hostname} for task in self.tasks.values()
            ]
            return _restored, (type(self), limits, workers, tasks, (self.event_count, self.task_count))

    # -- applying events

    def event(self, event: Event) -> tuple[object, str] | None:
        """Apply one event: ((worker or task, whether it is new), subject), or None for an event that is ignored.

        Fields of the wrong type are left out: anybody may publish events.
        """
        with self._lock:
            self.event_count += 1
            if self.event_callback is not None:
                self.event_callback(self, event)
            group, _, subject = str(event.get("type", "")).partition("-")
            handler = self.handlers.get(group)
            if handler is not None:
                return handler(subject, event), subject
            sound_fields = {name: value for name, value in event.items() if _is_sound(name, value)}
            hostname = sound_fields.get("hostname")
            if hostname is None:
                return None
            if group == "worker":
                return self._worker_event(subject, hostname, sound_fields), subject
            if group == "task" and "uuid" in sound_fields:
                return self._task_event(subject, hostname, sound_fields), subject
            return None

    def _worker_event(self, subject: str, hostname: str, event: Event) -> tuple[Worker, bool]:
        is_offline = subject == "offline"
        worker = self.workers.get(hostname)
        created = worker is None and not is_offline
        if worker is None:
            worker = Worker(hostname)
        if created:
            self._keep(self.workers, hostname, worker, self.max_workers_in_memory)
        worker.event(subject, event.get("timestamp"), event.get("local_received"), event)
        if self.on_node_join is not None and (created or subject == "online"):
            self.on_node_join(worker)
        if is_offline:
            if self.on_node_leave is not None:
                self.on_node_leave(worker)
            self.workers.pop(hostname, None)
        return worker, created

    def _task_event(self, subject: str, hostname: str, event: Event) -> tuple[Task, bool]:
        task, created = self.get_or_create_task(event["uuid"])
        timestamp, received = event.get("timestamp"), event.get("local_received")
        if subject == "sent":
            task.client = hostname
        else:
            self._now_at(task, hostname, timestamp, received, event)
        if subject == "received":
            self.task_count += 1
        known_as = task.name
        task.event(subject, timestamp, received, event)
        if task.name is not None and task.name != known_as:
            self.tasks_by_type.discard(known_as, task)
            self.tasks_by_type.add(task.name, task)
            self.note_type(task.name)
        self._link(task)
        return task, created

    def _now_at(self, task: Task, hostname: str, timestamp: float | None, received: float | None, event: Event) -> None:
        """A worker sent an event of the task."""
        worker, _ = self.get_or_create_worker(hostname)
        if task.worker is not worker:
            if task.worker is not None:
                self.tasks_by_worker.discard(task.worker.hostname, task)
            self.tasks_by_worker.add(hostname, task)
            task.worker = worker
        worker.event(None, timestamp, received, {"pid": event.get("pid", worker.pid)})

    def _link(self, task: Task) -> None:
        """Link a task to its parent and children, whichever came first."""
        if task.parent_id:
            parent = self.tasks.get(task.parent_id)
            if parent is not None:
                parent.children.add(task)
            else:
                if task.parent_id not in self._orphans:
                    self._keep(self._orphans, task.parent_id, set[str](), self.max_tasks_in_memory)
                self._orphans[task.parent_id].add(task.uuid)
        for uuid in self._orphans.pop(task.uuid, ()):
            if uuid in self.tasks:
                task.children.add(self.tasks[uuid])

    def get_or_create_worker(self, hostname: str, **fields: Any) -> tuple[Worker, bool]:
        """(worker, whether it is new)."""
        worker = self.workers.get(hostname)
        if worker is not None:
            worker.update(fields)
            return worker, False
        worker = Worker(hostname, **fields)
        self._keep(self.workers, hostname, worker, self.max_workers_in_memory)
        return worker, True

    def get_or_create_task(self, uuid: str) -> tuple[Task, bool]:
        """(task, whether it is new)."""
        task = self.tasks.get(uuid)
        if task is not None:
            return task, False
        task = Task(uuid, cluster_state=self)
        if len(self.tasks) >= self.max_tasks_in_memory:
            self._forget(next(iter(self.tasks)))
        self.tasks[uuid] = task
        return task, True

    def _keep(self, kept: dict[str, T], key: str, value: T, limit: int) -> None:
        if len(kept) >= limit and key not in kept:
            del kept[next(iter(kept))]
        kept[key] = value

    def _forget(self, uuid: str) -> None:
        task = self.tasks.pop(uuid)
        self.tasks_by_type.discard(task.name, task)
        if task.worker is not None:
            self.tasks_by_worker.discard(task.worker.hostname, task)
        parent = task.parent
        if parent is not None:
            parent.children.discard(task)
        orphans = self._orphans.get(task.parent_id or "")
        if orphans is not None:
            orphans.discard(uuid)

    # -- reading

    def freeze_while(self, function: Callable[..., T], *args: object, clear_after: bool = False, **kwargs: object) -> T:
        """Call a function while no event is applied."""
        with self._lock:
            try:
                return function(*args, **kwargs)
            finally:
                if clear_after:
                    self.clear()

    def itertasks(self, limit: int | None = None) -> Iterator[tuple[str, Task]]:
        """(id, task) pairs in the order of their first events."""
        return islice(list(self.tasks.items()), limit)

    def tasks_by_time(self, limit: int | None = None, reverse: bool = True) -> Iterator[tuple[str, Task]]:
        """(id, task) pairs by their last event, the latest first."""
        with self._lock:
            pairs = sorted(self.tasks.items(), key=lambda pair: _moment(pair[1]), reverse=reverse)
        return islice(pairs, limit)

    tasks_by_timestamp = tasks_by_time

    def note_type(self, name: str) -> None:
        """A task of that name had events."""
        if len(self._seen_types) < self.max_tasks_in_memory:
            self._seen_types.add(name)

    def task_types(self) -> list[str]:
        """The names of all tasks that had events."""
        return sorted(self._seen_types)

    def alive_workers(self) -> Iterator[Worker]:
        """Workers with a recent heartbeat."""
        return (worker for worker in list(self.workers.values()) if worker.alive)

    # -- clearing

    def clear_tasks(self, ready: bool = True) -> None:
        """Forget tasks: those that have ended, or all."""
        with self._lock:
            for uuid, task in list(self.tasks.items()):
                if task.ready or not ready:
                    self._forget(uuid)

    def clear(self, ready: bool = True) -> None:
        """Forget workers and tasks, and reset the counts; with `ready` tasks that have not ended stay."""
        with self._lock:
            self.workers.clear()
            self.clear_tasks(ready)
            self.event_count = 0
            self.task_count = 0

    def __repr__(self) -> str:
        return f"<State: events={self.event_count} tasks={self.task_count}>"


def _is_sound(name: str, value: object) -> bool:
    """Whether a field that this module uses has the right type; anybody may publish events."""
    match name:
        case "name" | "uuid" | "hostname" | "parent_id" | "root_id":
            return isinstance(value, str)
        case "timestamp" | "local_received" | "freq":
            return isinstance(value, (int, float)) and 0 <= value < _END_OF_TIME
        case "clock":
            return isinstance(value, int)
        case _:
            return True


def _moment(task: Task) -> tuple[int, float]:
    return task.clock, task.timestamp or 0.0


def _settable(fields: Event, record_class: type) -> dict[str, object]:
    """The fields without those that would hide a method or break our own bookkeeping."""
    return {
        name: value
        for name, value in fields.items()
        if name not in _OURS and not name.startswith("_") and not hasattr(record_class, name)
    }


# A task's links to others, which are made anew.
_LINKS: dict[str, object] = {"cluster_state": None, "children": None}


def _restored(
    state_class: type[State], limits: tuple[int, int], workers: list[Event], tasks: list[Event], counts: tuple[int, int]
) -> State:
    state = state_class(max_workers_in_memory=limits[0], max_tasks_in_memory=limits[1])
    state.event_count, state.task_count = counts
    for fields in workers:
        worker = state.workers[fields["hostname"]] = Worker(fields["hostname"])
        worker.__dict__.update(fields)
    for fields in tasks:
        hostname = fields["worker"]
        task = state.tasks[fields["uuid"]] = Task(fields["uuid"])
        worker_of_it = None if hostname is None else state.workers.get(hostname) or Worker(hostname)
        task.__dict__.update(fields, worker=worker_of_it, cluster_state=state, children=set())
        if hostname is not None:
            state.tasks_by_worker.add(hostname, task)
        if task.name is not None:
            state.tasks_by_type.add(task.name, task)
            state.note_type(task.name)
    for task in state.tasks.values():
        parent = state.tasks.get(task.parent_id or "")
        if parent is not None:
            parent.children.add(task)
    return state
