"""WorkerSetup: a worker's configuration, as plain data that `assembly` makes; and the contracts of a worker's parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from amqtask.pool import Loop
from amqtask.worker.revoked import MAX_IDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from amqtask.exceptions import WorkerLostError
    from amqtask.execution.chain_steps import SharedFlag
    from amqtask.execution.contract import TaskLike
    from amqtask.execution.request import Outcome, Request
    from amqtask.protocol.entities import Queue
    from amqtask.protocol.message import Message


class WorkQueue(NamedTuple):
    """A queue to consume, and its dead-letter queue (None: it has none)."""

    queue: Queue
    dead_letter: Queue | None


class WorkQueues(dict[str, WorkQueue]):
    """All queues that a worker consumes or has consumed, by name: requests of the latter may still be running."""

    def __init__(self, queues: Iterable[WorkQueue], delivery_limit: int | None) -> None:
        super().__init__((work.queue.name, work) for work in queues)
        self._delivery_limit = delivery_limit

    def dead_letter_queue(self, queue: str) -> Queue | None:
        """The dead-letter queue of a queue, None where there is none."""
        work = self.get(queue)
        return work.dead_letter if work is not None else None

    def delivery_limit(self, queue: str) -> int | None:
        """How often a message of a queue may be delivered: the queue's argument, else the setting."""
        work = self.get(queue)
        queue_limit = work.queue.argument_map.get("x-delivery-limit") if work is not None else None
        return queue_limit if isinstance(queue_limit, int) else self._delivery_limit


class RunnableLoop(Loop, Protocol):
    """The I/O loop, with the methods that only its owner calls."""

    def run(self) -> None:
        """Run until `stop`."""

    def stop(self) -> None: ...

    def close(self) -> None:
        """Release its descriptors, after it has stopped and when it is not called any more."""


class Delays(Protocol):
    """Makes messages for the broker's delay levels (topology.delays.DelayPlan)."""

    def delayed(self, message: Message, seconds: float) -> Message: ...


class Endings(Protocol):
    """Outcomes of requests that no slot ran (execution.executor.Executor)."""

    def refused(self, request: Request, error: Exception) -> Outcome: ...

    def lost_finally(self, request: Request, error: WorkerLostError) -> Outcome: ...

    def revoked(self, request: Request, reason: str) -> Outcome: ...

    def expired(self, request: Request) -> Outcome: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSetup:
    """Times are seconds. `prefetch` None lets the window adapt. The time limits are for tasks that set none.

    `most_slots` is autoscale's maximum: the windows are sized for it, so that the backlog can be seen.
    """

    hostname: str
    queues: tuple[WorkQueue, ...]
    tasks: Mapping[str, TaskLike]
    delays: Delays
    most_slots: int | None = None
    prefetch: int | None = None
    delivery_limit: int | None = 5
    # For so long the broker may take a connection that fell silent for alive, and deliver to it.
    silence_seconds: float = 180.0
    # Content types of protocol v1 bodies, which the worker itself has to decode (slots decode v2 bodies).
    accept: frozenset[str] = frozenset({"application/json"})
    time_limit: float | None = None
    soft_time_limit: float | None = None
    # Task name to rate limit ('10/s'), for tasks that have one.
    rate_limits: Mapping[str, str | float] = field(default_factory=dict)
    # For how many seconds a worker runs the steps of a chain without the broker; 0: each step goes through the broker.
    chain_seconds: float = 0.0
    # On while slots that are processes may do so, too.
    slot_steps: SharedFlag | None = None
    shutdown_timeout: float | None = None
    soft_shutdown_timeout: float = 0.0
    soft_shutdown_on_idle: bool = False
    term_is_quit: bool = False
    install_signals: bool = True
    # A file that keeps revoked ids and stamps from run to run (--statedb).
    statedb: str | None = None
    # How many revoked ids are remembered, and for how long (None: until there are too many).
    revokes_max: int = MAX_IDS
    revoke_expires: float | None = None


class Service(Protocol):
    """Started when the worker starts, stopped before its connections close; both may be called twice."""

    name: str

    def start(self) -> None: ...

    def stop(self) -> None: ...
