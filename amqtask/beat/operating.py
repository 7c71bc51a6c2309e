"""What operators do with periodic tasks: look at them, pause and resume them, run one now.

What is paused is in the broker's note (amqtask.remote.kept). Whoever changes it then puts an empty state into the leaders'
queue, which reaches the beat that leads, as the seed of a beat that comes does: it reads the note again.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from amqtask.beat.build import find_store, leader_name, make_scheduler, pauses_of, short_name
from amqtask.beat.contract import BeatOptions, KeepsTime, StoreOptions
from amqtask.beat.leader import leader_queue
from amqtask.beat.scheduler import Due, encode_positions
from amqtask.beat.sender import AppSender
from amqtask.exceptions import AlreadyQueued, ConfigurationError, PublishError
from amqtask.protocol.message import Message, Properties

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.beat.contract import Entry
    from amqtask.beat.scheduler import Scheduler
    from amqtask.ground.shapes import JsonObject
    from amqtask.remote.kept import Pauses


class KeepsToItself(ConfigurationError):
    """The scheduler is a class that keeps time itself."""


class Schedules:
    """The periodic tasks of an application; `options` are those of its beat (`-s`, `-S`)."""

    def __init__(self, app: AmqTask, options: BeatOptions | None = None) -> None:
        self._app = app
        self._options = options or BeatOptions()
        self._scheduler_name = self._options.scheduler or app.conf.beat_scheduler
        self.leader = leader_name(app, self._options.scheduler)

    @property
    def source(self) -> str:
        """Where entries come from: file, memory, django, or a class."""
        return short_name(self._scheduler_name)

    @property
    def pauses(self) -> Pauses:
        """What is paused."""
        return pauses_of(self._app, self.leader)

    def entries(self) -> list[Entry]:
        """The entries as their store remembers them; nothing is written. Raises: KeepsToItself; what a store raises."""
        self._app.load_tasks()
        make_store = find_store(self._scheduler_name)
        if isinstance(make_store, KeepsTime):
            raise KeepsToItself(
                f"{self._scheduler_name} keeps its entries and their times to itself: they can be neither listed nor paused"
            )
        store = make_store(self._app, StoreOptions(filename=self._options.schedule, read_only=True))
        try:
            return list(store.entries())
        finally:
            store.close()

    def scheduler(self, entries: Iterable[Entry], now: datetime) -> Scheduler:
        """When these are due, from what their store remembers."""
        scheduler = make_scheduler(self._app)
        scheduler.update(entries, now)
        scheduler.resume([], now)
        return scheduler

    def pause(self, name: str, by: str | None = None) -> bool:
        """Have no beat send this entry until `resume`, whatever restarts. False: it was paused already.

        Raises: ConfigurationError for an entry that there is not, OperationalError."""
        self._entry(name)
        is_new = self.pauses.pause(name, by)
        self._tell_beat()
        return is_new

    def resume(self, name: str) -> bool:
        """Have the leading beat send it again, from now on. False: it was not paused. Raises: OperationalError."""
        was_paused = self.pauses.resume(name)
        self._tell_beat()
        return was_paused

    def run(self, name: str) -> str:
        """Send the task of an entry now, beside its schedule; the task's id. Raises: ConfigurationError, PublishError,
        AlreadyQueued; what is wrong with the entry's task, arguments or options."""
        sender = AppSender(self._app, self.leader)
        due = Due(datetime.now(timezone.utc), self._entry(name))
        message = sender.compose(due)
        holder = sender.claim(message)
        if holder is not None:
            raise AlreadyQueued(f"{name} is not sent: call {holder}, which waits or runs, has its unique key", holder)
        try:
            self._app.publisher.publish(message)
        except PublishError as error:
            sender.claimed(message, error)
            raise
        sender.claimed(message, None)
        sender.settled(message, None)
        sender.published([message])
        return sender.task_id(due)

    def _entry(self, name: str) -> Entry:
        entries = {entry.name: entry for entry in self.entries()}
        if name not in entries:
            raise ConfigurationError(
                f"there is no periodic task {name!r}; there are {', '.join(sorted(entries)) or 'none'}"
            )
        return entries[name]

    def _tell_beat(self) -> None:
        queue = leader_queue(self.leader, queue_type=self._app.conf.task_default_queue_type)
        properties = Properties(content_type="application/json")
        self._app.publisher.publish(Message(encode_positions({}), properties, "", queue.name, (queue,)))


def as_row(entry: Entry, next_due_at: datetime | None) -> JsonObject:
    """An entry as data."""
    return {
        "name": entry.name,
        "task": entry.task,
        "schedule": described(entry.schedule),
        "args": list(entry.args),
        "kwargs": dict(entry.kwargs),
        "options": dict(entry.options),
        "enabled": entry.enabled,
        "one_off": entry.one_off,
        "last_due_at": entry.last_due_at,
        "last_run_at": entry.last_run_at,
        "next_due_at": next_due_at,
        "total_run_count": entry.total_run_count,
    }


def described(schedule: object) -> str:
    """A schedule in words."""
    text = repr(schedule)
    return text[1:-1] if text.startswith("<") else text


def call_text(entry: Entry) -> str:
    """The call that an entry makes."""
    arguments = [*map(repr, entry.args), *(f"{key}={value!r}" for key, value in entry.kwargs.items())]
    return f"{entry.task}({', '.join(arguments)})"
