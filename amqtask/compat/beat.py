"""`celery.beat`: schedulers to derive from, that keep time themselves: with a store of their own, or a file.

Beat runs such a class (`-S module:Class`, `beat_scheduler`) in place of its own scheduler: on a thread, tick by tick, from beat's
start to its end. It does not take part in beat's elections: two beats both send, unless the class sees to that, as those do that
take a lock.
"""

from __future__ import annotations

import copy
import errno
import heapq
import shelve
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from amqtask.beat.sender import BEAT_HEADER, BeatLazyFunc, evaluated
from amqtask.beat.settings_store import CLEANUP
from amqtask.exceptions import AmqTaskError, line_of
from amqtask.ground.current import current_app
from amqtask.ground.printable import bounded_logger
from amqtask.schedules import crontab, maybe_schedule

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.beat.contract import BeatOptions
    from amqtask.ground.shapes import JsonFields, JsonObject
    from amqtask.pool import Loop

__all__ = [
    "DEFAULT_MAX_INTERVAL", "BeatLazyFunc", "PersistentScheduler", "ScheduleEntry", "Scheduler",
    "SchedulingError", "Service", "event_t",
]  # fmt: skip

logger = bounded_logger("amqtask.beat")
# The longest time between two looks at the schedule, in seconds.
DEFAULT_MAX_INTERVAL = 300


class SchedulingError(AmqTaskError):
    """An entry could not be sent."""


class event_t(NamedTuple):
    """An entry of a scheduler's heap: when to look at it."""

    time: float
    priority: int
    entry: Any


class ScheduleEntry:
    """A periodic task, as a scheduler knows it. `schedule` is seconds, a timedelta, or a schedule."""

    name: str | None = None
    schedule: Any = None
    args: Any = None
    kwargs: Any = None
    options: Any = None
    last_run_at: datetime | None = None
    total_run_count: int = 0

    def __init__(
        self,
        name: str | None = None,
        task: str | None = None,
        last_run_at: datetime | None = None,
        total_run_count: int | None = None,
        schedule: Any = None,
        args: Any = (),
        kwargs: Any = None,
        options: Any = None,
        relative: bool = False,
        app: Any = None,
    ) -> None:
        self.app = app
        self.name = name
        self.task = task
        self.args = args
        self.kwargs = kwargs or {}
        self.options = options or {}
        self.schedule = maybe_schedule(schedule, relative, app=app or current_app)
        self.last_run_at = last_run_at or self.default_now()
        self.total_run_count = total_run_count or 0

    def default_now(self) -> datetime:
        """The present time of its schedule, or of the application."""
        if self.schedule is not None:
            return self.schedule.now()  # type: ignore[no-any-return]
        return (self.app or current_app).now()  # type: ignore[no-any-return]

    _default_now = default_now

    def _next_instance(self, last_run_at: datetime | None = None) -> ScheduleEntry:
        """The entry after one more run."""
        after = {"last_run_at": last_run_at or self.default_now(), "total_run_count": self.total_run_count + 1}
        return type(self)(**{**dict(self), **after})

    __next__ = next = _next_instance

    def update(self, other: ScheduleEntry) -> None:
        """Take over what another one says, but for what it knows of its runs."""
        for name in ("task", "schedule", "args", "kwargs", "options"):
            setattr(self, name, getattr(other, name))

    def is_due(self) -> Any:
        """Whether to run now, and in how many seconds to look again."""
        return self.schedule.is_due(self.last_run_at)

    def editable_fields_equal(self, other: ScheduleEntry) -> bool:
        """Whether both say the same, apart from their runs."""
        names = ("task", "args", "kwargs", "options", "schedule")
        return all(getattr(self, name) == getattr(other, name) for name in names)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(vars(self).items())

    def __reduce__(self) -> Any:
        fields = (
            self.name, self.task, self.last_run_at, self.total_run_count, self.schedule, self.args, self.kwargs, self.options,
        )  # fmt: skip
        return type(self), fields

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ScheduleEntry) and self.editable_fields_equal(other)

    __hash__ = object.__hash__

    def __lt__(self, other: object) -> bool:
        """Any order: heaps compare entries that are due at the same time."""
        return isinstance(other, ScheduleEntry) and id(self) < id(other)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.name} {self.task}(*{self.args!r}, **{self.kwargs!r}) {self.schedule}>"


class Scheduler:
    """Keeps entries in memory and sends those that are due: `tick` looks once. Derive from it and say otherwise."""

    Entry: ClassVar[type[ScheduleEntry]] = ScheduleEntry
    #: Where the entries are, when `schedule` is not defined otherwise.
    data: JsonObject
    max_interval: float = DEFAULT_MAX_INTERVAL
    #: Seconds, or (when set) sent tasks, after which `sync` is called.
    sync_every: float = 180
    sync_every_tasks: int | None = None
    logger: Any = logger

    def __init__(
        self,
        app: AmqTask,
        schedule: Any = None,
        max_interval: float | None = None,
        Producer: Any = None,
        lazy: bool = False,
        sync_every_tasks: int | None = None,
        **kwargs: object,
    ) -> None:
        self.app = app
        self.data = {} if schedule is None else schedule
        self.max_interval = max_interval or app.conf.beat_max_loop_interval or self.max_interval
        self.Producer = Producer
        if sync_every_tasks is None:
            sync_every_tasks = app.conf.get("beat_sync_every")
        self.sync_every_tasks = sync_every_tasks
        self._last_sync: float | None = None
        self._tasks_since_sync = 0
        self._heap: list[object] | None = None
        self.old_schedulers: object = None
        if not lazy:
            self.setup_schedule()

    # -- the entries

    def setup_schedule(self) -> None:
        """Set the schedule up, once before the first tick."""
        self.install_default_entries(self.data)
        self.merge_inplace(self.app.conf.beat_schedule)

    def install_default_entries(self, data: JsonFields) -> None:
        """Add the entry that deletes old results, where the store does not do so itself."""
        backend = self.app.backend
        if backend is None or not self.app.conf.result_expires or backend.supports_autoexpire:
            return
        if CLEANUP not in data:
            self.update_from_dict(
                {CLEANUP: {"task": CLEANUP, "schedule": crontab("0", "4", "*"), "options": {"expires": 12 * 3600}}}
            )

    def get_schedule(self) -> Any:
        """The entries by name."""
        return self.data

    def set_schedule(self, schedule: Any) -> None:
        """Replace the entries."""
        self.data = schedule

    @property
    def schedule(self) -> Any:
        """The entries by name."""
        return self.get_schedule()

    @schedule.setter
    def schedule(self, schedule: Any) -> None:
        self.set_schedule(schedule)

    def add(self, **fields: Any) -> ScheduleEntry:
        """Add an entry."""
        entry = self.Entry(app=self.app, **fields)
        self.schedule[entry.name] = entry
        return entry

    def _maybe_entry(self, name: str, entry: Any) -> ScheduleEntry:
        if isinstance(entry, self.Entry):
            entry.app = self.app
            return entry
        return self.Entry(**{**entry, "name": name, "app": self.app})

    def update_from_dict(self, dict_: Mapping[str, Any]) -> None:
        """Take in entries, or what they are made from."""
        self.schedule.update({name: self._maybe_entry(name, entry) for name, entry in dict_.items()})

    def merge_inplace(self, b: Mapping[str, Any]) -> None:
        """Have the entries of `b`; those that are here already go on from their last runs."""
        schedule = self.schedule
        for name in [name for name in schedule if name not in b and name != CLEANUP]:
            del schedule[name]
        for name, fields in b.items():
            entry = self._maybe_entry(name, fields)
            if schedule.get(name):
                schedule[name].update(entry)
            else:
                schedule[name] = entry

    def schedules_equal(self, old_schedules: Any, new_schedules: Any) -> bool:
        """Whether nothing has changed, so that the heap still holds."""
        if old_schedules is None or new_schedules is None:
            return old_schedules is new_schedules
        return set(old_schedules) == set(new_schedules) and all(
            new_schedules[name] == entry for name, entry in old_schedules.items()
        )

    # -- time

    def is_due(self, entry: ScheduleEntry) -> Any:
        """Whether to send it now, and in how many seconds to look again."""
        return entry.is_due()

    def adjust(self, n: float | None, drift: float = -0.010) -> float | None:
        """A pause a little shorter, for the time that a look takes."""
        return n + drift if n and n > 0 else n

    def _when(
        self, entry: ScheduleEntry, next_time_to_run: float, mktime: Callable[[Any], float] = time.mktime
    ) -> float:
        now = entry.default_now()
        return now.timestamp() + (self.adjust(next_time_to_run) or 0)

    def populate_heap(self, event_t: Any = event_t, heapify: Callable[[Any], None] = heapq.heapify) -> None:
        """Look at every entry once."""
        heap = []
        for entry in self.schedule.values():
            is_due, seconds = entry.is_due()
            heap.append(event_t(self._when(entry, 0 if is_due else seconds) or 0, 5, entry))
        heapify(heap)
        self._heap = heap

    def tick(
        self,
        event_t: Any = event_t,
        min: Callable[..., Any] = min,
        heappop: Callable[[Any], Any] = heapq.heappop,
        heappush: Callable[[Any, Any], None] = heapq.heappush,
    ) -> float:
        """Send the entry that is first in time if it is due; the seconds until the next look."""
        if self._heap is None or not self.schedules_equal(self.old_schedulers, self.schedule):
            self.old_schedulers = copy.copy(self.schedule)
            self.populate_heap()
        heap: list[Any] = self._heap or []
        if not heap:
            return self.max_interval
        first = heap[0]
        is_due, seconds = self.is_due(first[2])
        if not is_due:
            pause = self.adjust(seconds)
            pause_seconds: float = min(self.max_interval if pause is None else pause, self.max_interval)
            return pause_seconds
        taken = heappop(heap)
        if taken is not first:
            heappush(heap, taken)
            return 0
        following = self.reserve(taken[2])
        self.apply_entry(taken[2], producer=self.producer)
        heappush(heap, event_t(self._when(following, seconds), taken[1], following))
        return 0

    def reserve(self, entry: ScheduleEntry) -> ScheduleEntry:
        """Note that the entry runs once more."""
        following = self.schedule[entry.name] = entry.next()
        return following

    # -- sending

    def apply_entry(self, entry: ScheduleEntry, producer: Any = None) -> None:
        """Send it, and say so; an entry that cannot be sent is told in a line, for as long as the same is wrong with it, and the
        others go on."""
        logger.info("Scheduler: Sending due task %s (%s)", entry.name, entry.task)
        wrong: dict[str | None, str] = vars(self).setdefault("_wrong", {})
        try:
            result = self.apply_async(entry, producer=producer, advance=False)
        except Exception as error:  # noqa: BLE001 - arguments and routers are the user's; the other entries go on
            if wrong.get(entry.name) != str(error):
                wrong[entry.name] = str(error)
                cause = error.__cause__ if isinstance(error, SchedulingError) else None
                text = line_of(cause if isinstance(cause, Exception) else error)
                logger.error("beat: %s (%s) cannot be sent: %s", entry.name, entry.task, text)
        else:
            wrong.pop(entry.name, None)
            logger.debug("%s sent. id->%s", entry.task, getattr(result, "id", None))

    def apply_async(self, entry: ScheduleEntry, producer: Any = None, advance: bool = True, **kwargs: object) -> Any:
        """Send an entry's task now. Raises: SchedulingError."""
        if advance:
            entry = self.reserve(entry)
        try:
            args, keywords = evaluated(entry.args or (), entry.kwargs or {})
            options = {**entry.options, "headers": {**(entry.options.get("headers") or {}), BEAT_HEADER: True}}
            task = self.app.tasks.get(entry.task or "")
            if task is not None:
                return task.apply_async(args, keywords, producer=producer, **options)
            return self.send_task(entry.task, args, keywords, producer=producer, **options)
        except Exception as error:  # one error for all, as in Celery
            raise SchedulingError(f"Couldn't apply scheduled task {entry.name}: {error}") from error
        finally:
            self._tasks_since_sync += 1
            if self.should_sync():
                self._do_sync()

    def send_task(self, *args: Any, **kwargs: Any) -> Any:
        """Send a task by its name."""
        return self.app.send_task(*args, **kwargs)

    @property
    def producer(self) -> Any:
        """Publishes go through the application's own connections."""
        return None

    @property
    def connection(self) -> Any:
        """A connection for whoever wants one."""
        return self.app.connection()

    # -- what lasts

    def should_sync(self) -> bool:
        """Whether it is time to write down what ran."""
        return (
            not self._last_sync
            or time.monotonic() - self._last_sync > self.sync_every
            or (bool(self.sync_every_tasks) and self._tasks_since_sync >= (self.sync_every_tasks or 0))
        )

    def _do_sync(self) -> None:
        try:
            logger.debug("beat: Synchronizing schedule...")
            self.sync()
        finally:
            self._last_sync = time.monotonic()
            self._tasks_since_sync = 0

    def sync(self) -> None:
        """Write down what ran."""

    def close(self) -> None:
        """Write down what ran, at the end."""
        self.sync()

    @property
    def info(self) -> str:
        """A line for people."""
        return ""

    @classmethod
    def make_beat(
        cls,
        app: AmqTask,
        options: BeatOptions,
        loop: Loop,
        *,
        on_start: Callable[[Any], None],
        on_failed: Callable[[Exception], None],
    ) -> Ticking:
        """How beat runs it: see amqtask.beat.contract.KeepsTime."""
        service = Service(app, options.max_interval, options.schedule, cls)
        return Ticking(service.run, loop, on_start=on_start, on_failed=on_failed)


class PersistentScheduler(Scheduler):
    """Remembers in a file (`-s`, `beat_schedule_filename`) when its entries ran."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.schedule_filename = kwargs.get("schedule_filename") or "celerybeat-schedule"
        self._store: Any = None
        super().__init__(*args, **kwargs)

    def setup_schedule(self) -> None:
        """Open the file and have the settings' entries. A file that cannot be read is put aside."""
        try:
            self._store = _opened(self.schedule_filename)
        except Exception as error:  # of dbm, of pickle, of a class that is not here any more
            if not _put_aside(self.schedule_filename, error):
                raise
            self._store = _opened(self.schedule_filename)
        entries = self._store["entries"]
        self.merge_inplace(self.app.conf.beat_schedule)
        self.install_default_entries(entries)
        self.sync()

    def get_schedule(self) -> Any:
        """The entries in the file."""
        return self._store["entries"]

    def set_schedule(self, schedule: Any) -> None:
        """Replace the entries."""
        self._store["entries"] = schedule

    def sync(self) -> None:
        """Write the file."""
        if self._store is not None:
            self._store.sync()

    def close(self) -> None:
        """Write and close it."""
        self.sync()
        if self._store is not None:
            self._store.close()
            self._store = None

    @property
    def info(self) -> str:
        """The file's path, for people."""
        return f"    . db -> {self.schedule_filename}"


# What dbm's kinds of files add to a name.
_SUFFIXES = ("", ".db", ".dat", ".bak", ".dir")
# The file is well, but somebody else's for now, or may not be used.
_IN_USE = frozenset({errno.EAGAIN, errno.EACCES, errno.EPERM, errno.ENOENT, errno.EROFS, errno.ENOSPC})


def _opened(filename: str) -> Any:
    """The file, with entries that can be read."""
    store = shelve.open(filename, writeback=True)  # noqa: SIM115 - until `close`
    try:
        store.setdefault("entries", {})
    except BaseException:
        store.close()
        raise
    return store


def _put_aside(filename: str, error: Exception) -> bool:
    """Rename what is under that name; whether there was anything that is to be renamed."""
    if isinstance(error, OSError) and error.errno in _IN_USE:
        return False
    files = [path for suffix in _SUFFIXES if (path := Path(filename + suffix)).is_file()]
    for path in files:
        aside = path.replace(f"{path}.unreadable-{time.time_ns()}")
        logger.warning("beat: %s cannot be read (%s): it is kept as %s, and a new one is begun", path, error, aside)
    return bool(files)


class Service:
    """Runs a scheduler: `start` ticks until `stop` is called elsewhere."""

    scheduler_cls: Any = PersistentScheduler

    def __init__(
        self,
        app: AmqTask,
        max_interval: float | None = None,
        schedule_filename: str | None = None,
        scheduler_cls: Any = None,
    ) -> None:
        self.app = app
        self.max_interval = max_interval or app.conf.beat_max_loop_interval
        self.schedule_filename = schedule_filename or app.conf.beat_schedule_filename
        self.scheduler_cls = scheduler_cls or self.scheduler_cls
        self._scheduler: object = None

    def get_scheduler(self, lazy: bool = False, extension_namespace: str = "celery.beat_schedulers") -> Any:
        """A new scheduler."""
        return self.scheduler_cls(
            app=self.app, schedule_filename=self.schedule_filename, max_interval=self.max_interval, lazy=lazy
        )

    @property
    def scheduler(self) -> Any:
        """The scheduler that it runs."""
        if self._scheduler is None:
            self._scheduler = self.get_scheduler()
        return self._scheduler

    def run(self, is_stopped: threading.Event, on_start: Callable[[Any], None]) -> None:
        """Tick until the event is set; whatever the scheduler raises ends it. Call from one thread."""
        scheduler = self.scheduler
        on_start(self)
        try:
            while not is_stopped.is_set():
                pause = scheduler.tick()
                if pause and pause > 0:
                    is_stopped.wait(pause)
                if scheduler.should_sync():
                    scheduler._do_sync()
        finally:
            scheduler.close()

    def sync(self) -> None:
        """Close the scheduler, which writes down what ran."""
        self.scheduler.close()


# -- A scheduler that keeps time itself, on a thread of its own beside beat's loop.


class Ticking:
    """Starts `run(is_stopped, on_start)` on a thread; whatever it raises ends beat. A thread that hangs (in a lock, a database)
    holds up nobody's end."""

    name = "beat"
    is_busy = False

    def __init__(
        self,
        run: Callable[[threading.Event, Callable[[Any], None]], None],
        loop: Loop,
        *,
        on_start: Callable[[Any], None],
        on_failed: Callable[[Exception], None],
    ) -> None:
        self._tick = run
        self._loop = loop
        self._on_start = on_start
        self._on_failed = on_failed
        self._is_stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._on_stopped: Callable[[], None] | None = None

    def start(self) -> None:
        """Begin."""
        if self._thread is None:
            logger.info("beat: Starting...")
            self._thread = threading.Thread(target=self._run, name="beat scheduler", daemon=True)
            self._thread.start()

    def stop(self, on_stopped: Callable[[], None] | None = None) -> None:
        """Send nothing more; `on_stopped` follows on the loop when the scheduler has closed."""
        if self._is_stopped.is_set():
            return
        logger.info("beat: Shutting down...")
        self._on_stopped = on_stopped
        self._is_stopped.set()
        if self._thread is None or not self._thread.is_alive():
            self._loop.call_soon(self._ended)

    def _run(self) -> None:
        try:
            self._tick(self._is_stopped, self._on_start)
        except Exception as error:  # a user's scheduler
            logger.critical("beat: the scheduler has ended: %s", error, exc_info=True)
            failure = error
            self._loop.call_soon_threadsafe(lambda: self._on_failed(failure))
        self._loop.call_soon_threadsafe(self._ended)

    def _ended(self) -> None:
        on_stopped, self._on_stopped = self._on_stopped, None
        if on_stopped is not None:
            on_stopped()
