"""What beat asks of a source of entries: a settings mapping with a state file, a database, or a plug-in's own.

A store is found by `beat_scheduler` or `-S`: a short name of the entry-point group `amqtask.schedule_stores`, or
`package.module:Class`. It is made as `Class(app, StoreOptions(…))`.

Beat calls a store from one thread, which is the store's alone, one call at a time: it may block (a database, a file), and
keep what belongs to its thread. What a call raises is logged and asked again later; what was due meanwhile by the
entries known so far is still sent.

Where an entry stands (its last due time) is kept twice: by the store, and in the broker by the beats themselves, so that
one can go on exactly where another ended. The later of the two counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from amqtask.schedules import BaseSchedule

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.ground.shapes import Keywords, Options
    from amqtask.pool import Loop


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A periodic task. All times are aware.

    `options` are those of `apply_async` (queue, exchange, routing_key, priority, expires, headers …); a value of `args` or
    `kwargs` that is callable (BeatLazyFunc) is called when the task is sent.
    """

    name: str
    task: str
    schedule: BaseSchedule
    args: Sequence[object] = ()
    kwargs: Keywords = field(default_factory=dict)
    options: Options = field(default_factory=dict)
    enabled: bool = True
    # Not due before `start_time`, nor at or after `expires`.
    start_time: datetime | None = None
    expires: datetime | None = None
    # Sent once in all; the store is told by `record` and disables it then. Enabled again, it is sent once more.
    one_off: bool = False
    # As the store remembers: when it was last due, when it was last sent, how often it was sent.
    last_due_at: datetime | None = None
    last_run_at: datetime | None = None
    total_run_count: int = 0

    @property
    def relative(self) -> bool:
        """Whether due times are rounded down to the interval's resolution."""
        return self.schedule.relative


@dataclass(frozen=True, slots=True)
class Run:
    """An entry was sent; the broker has confirmed the message."""

    name: str
    due_at: datetime
    sent_at: datetime
    # The deterministic id: the same for the same entry and due time, whichever beat sends it.
    task_id: str
    # Of this entry so far, this one included.
    total_run_count: int
    # Set when the entry was one_off, so that the store can disable it.
    is_last: bool = False


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """What the command line says: `filename` is `-s`, None where that was not given.

    `read_only`: somebody only looks (`beat --list`), so nothing is to be created or changed.
    """

    filename: str | None = None
    read_only: bool = False


class ScheduleStore(Protocol):
    """A source of entries. Every method may block, and may raise anything."""

    # How often (seconds) beat asks `has_changed`; a change takes effect no later than this.
    poll_seconds: ClassVar[float]

    def entries(self) -> Iterable[Entry]:
        """All entries as they are now; names are unique. Disabled ones may be left out."""

    def has_changed(self) -> bool:
        """Whether `entries()` would say something else than it last did, apart from what `record` was told. Cheap."""

    def record(self, runs: Sequence[Run]) -> None:
        """These were sent, in this order; called soon after, not before the broker's confirm. May be told twice."""

    def close(self) -> None:
        """Release what is open; called once, on the same thread as all else."""


@runtime_checkable
class KeepsTime(Protocol):
    """A class in place of a store that sends what is due itself, as schedulers written for Celery do (amqtask.compat.beat).

    It takes no part in the election of a leader: each beat that is told to use it does.
    """

    def make_beat(
        self,
        app: AmqTask,
        options: BeatOptions,
        loop: Loop,
        *,
        on_start: Callable[[Any], None],
        on_failed: Callable[[Exception], None],
    ) -> BeatService:
        """What lives on the loop in beat's place."""


class BeatService(Protocol):
    """What a process for beat, or a worker with `-B`, starts and stops on its loop."""

    name: str

    def start(self) -> None: ...

    def stop(self, on_stopped: Callable[[], None] | None = None) -> None:
        """`on_stopped` follows when nothing is on its way any more."""


@dataclass(frozen=True, slots=True)
class BeatOptions:
    """`schedule` is `-s`, `scheduler` is `-S`; None: as the settings say. `max_interval` is in seconds."""

    schedule: str | None = None
    scheduler: str | None = None
    max_interval: float | None = None
    # The node name for `inspect ping`, and whether to answer it; None: as beat_enable_remote_control says.
    hostname: str | None = None
    remote_control: bool | None = None
