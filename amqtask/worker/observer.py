"""Observer: is told what a worker does (for metrics, events …); a method that no observer overrides costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from amqtask.execution.outcome import Outcome
    from amqtask.execution.request import Request


class Observer:
    """Override the methods that you need; `Worker.observe` and `Worker.unobserve` begin and end it, at any time.

    All methods are called on the worker's I/O loop and must not block. An exception is logged, and changes nothing.
    """

    def on_received(self, request: Request) -> None:
        """A task message came, perhaps for the second time (`redelivered`); whether it will run is not known yet."""

    def on_started(self, request: Request) -> None:
        """The pool has the request. A prefork child may begin a moment later, when its last short task has ended."""

    def on_ended(self, request: Request, outcome: Outcome) -> None:
        """The request has an outcome: it ran, or was refused, revoked, expired or lost. It has not been acked yet."""

    def on_terminating(self, request: Request, signum: int) -> None:
        """A remote command ends the request while it runs, with this signal; a pool that cannot do that lets it run on."""

    def on_cancelled(self, request: Request) -> None:
        """The worker ends at once while the request runs: it has no outcome here."""

    def on_dead_lettered(self, request: Request) -> None:
        """The broker has confirmed the request's copy in the dead-letter queue."""

    def on_consuming(self, epoch: int) -> None:
        """All queues are consumed on channel number `epoch`; called again with the same number when a queue is added."""


def seen_by(observers: Iterable[Observer], point: str) -> tuple[Callable[..., None], ...]:
    """The methods of the observers that override `point`."""
    default: object = getattr(Observer, point)
    return tuple(getattr(observer, point) for observer in observers if getattr(type(observer), point) is not default)
