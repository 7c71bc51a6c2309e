"""Control: the object that a worker's remote commands work on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from amqtask.ground.lamport_clock import LamportClock

if TYPE_CHECKING:
    from amqtask.ground.shapes import CommandArguments, JsonFields, SettingValues
    from amqtask.protocol.entities import Queue
    from amqtask.protocol.message import Delivery
    from amqtask.services.autoscale import Autoscale
    from amqtask.services.elections import Elections
    from amqtask.services.events import EventSender
    from amqtask.topology.delays import Address
    from amqtask.worker.operations import Operations
    from amqtask.worker.worker import Worker


@dataclass(slots=True)
class Control:
    """The worker and its parts, for commands. `settings()` is the app's configuration; `make_queue` makes a queue for
    `add_consumer`, `report()` is the text for a bug report, `accept` has the content types that may be decoded,
    `reload(modules, again)` imports modules and returns the names of tasks that changed; None: the pool must not be restarted.
    """

    worker: Worker
    operations: Operations
    autoscale: Autoscale | None
    settings: Callable[[bool], SettingValues]
    make_queue: Callable[[CommandArguments], tuple[Queue, Queue | None]]
    broker_info: JsonFields
    events: EventSender
    # The worker's one logical clock, which is also in its events.
    lamport: LamportClock = field(default_factory=LamportClock)
    accept: frozenset[str] = frozenset({"application/json"})
    report: Callable[[], str] = str
    reload: Callable[[Iterable[str] | None, bool], set[str]] | None = None
    elections: Elections | None = None
    # Delayed messages that this worker holds until their time, the soonest first.
    delayed: Callable[[int], Sequence[tuple[float, Delivery]]] = lambda limit: ()
    # How many of them are to go to an address; and deleting those.
    count_delayed: Callable[[Address], int] = lambda address: 0
    drop_delayed: Callable[[Address], int] = lambda address: 0
    # `state.app` of custom commands.
    app: Any = None
    memory_samples: deque[str] = field(default_factory=lambda: deque(maxlen=1000))

    @property
    def clock(self) -> int:
        """The logical time."""
        return self.lamport.value
