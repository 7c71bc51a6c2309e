"""Observer: what looks on while a worker works (metrics, events …); a point that nobody looks at costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amqtask.execution.outcome import Outcome
    from amqtask.execution.request import Request


class Observer:
    """Override what is to be seen; `Worker.observe` and `Worker.unobserve` begin and end it, at any time.

    Everything is called on the worker's I/O loop and must not block. What is raised is logged, and changes nothing.
    """

    def on_received(self, request: Request) -> None:
        """A task message came, perhaps for the second time (`redelivered`); whether it will run is not known yet."""

    def on_started(self, request: Request) -> None:
        """The pool has it. A prefork child may begin a moment later, while its last short task ends."""

    def on_ended(self, request: Request, outcome: Outcome) -> None:
        """It has an outcome: it ran, or was refused, revoked, expired or lost. The broker has not been answered yet."""

    def on_terminating(self, request: Request, signum: int) -> None:
        """Somebody wants it ended while it runs, in the way of this signal; a pool that cannot do that lets it run on."""

    def on_cancelled(self, request: Request) -> None:
        """The worker ends at once and takes this one, which ran, with it: it has no outcome here."""

    def on_dead_lettered(self, request: Request) -> None:
        """The broker has confirmed its copy in the dead-letter queue."""

    def on_consuming(self, epoch: int) -> None:
        """All queues are consumed on channel number `epoch`; comes again with the same one when a queue is added."""


def seen_by(observers: Iterable[Observer], point: str) -> tuple[Callable[..., None], ...]:
    """The methods of those that really override `point`."""
    unseen: Any = getattr(Observer, point)
    return tuple(getattr(observer, point) for observer in observers if getattr(type(observer), point) is not unseen)
