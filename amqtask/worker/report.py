"""A worker's reports about its tasks: log lines in Celery's words, and signals; unused reports cost nothing.

That is decided beforehand, not per task: `sees_received`, `sees_started` and `sees_success` are False when no log level,
connected signal or observer needs them, and the worker then makes no call at all.

Observers are told what a worker does (for metrics, events …); a method that none of them overrides costs nothing, too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from amqtask import signals, states
from amqtask.execution.request import HELD, Answer
from amqtask.ground.printable import Lines, bounded_logger, printable
from amqtask.protocol.task import LONGEST_ID

if TYPE_CHECKING:
    from collections.abc import Callable

    from amqtask.execution.request import Outcome, Request
    from amqtask.ground.shapes import JsonObject


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


logger = bounded_logger("amqtask.worker")


class Report:
    """Log lines, signals and observers of deliveries. `sender` is the signals' sender (the worker)."""

    def __init__(self, sender: object = None) -> None:
        self.sender = sender
        self._info = logger.isEnabledFor(logging.INFO)
        self._observers: tuple[Observer, ...] = ()
        self._look()

    def add(self, observer: Observer) -> None:
        """Call the methods that this observer overrides; adding it twice changes nothing."""
        if observer not in self._observers:
            self._observers = (*self._observers, observer)
            self._look()

    def remove(self, observer: Observer) -> None:
        """Stop calling this observer; harmless when it was not added."""
        self._observers = tuple(registered for registered in self._observers if registered is not observer)
        self._look()

    def _look(self) -> None:
        self._on_received = seen_by(self._observers, "on_received")
        self._on_started = seen_by(self._observers, "on_started")
        self._on_ended = seen_by(self._observers, "on_ended")
        self._on_terminating = seen_by(self._observers, "on_terminating")
        self._on_cancelled = seen_by(self._observers, "on_cancelled")
        self._on_dead_lettered = seen_by(self._observers, "on_dead_lettered")
        self._on_consuming = seen_by(self._observers, "on_consuming")
        self.sees_received = self._info or bool(signals.task_received) or bool(self._on_received)
        self.sees_started = bool(self._on_started)
        self.sees_success = self._info or bool(self._on_ended)

    def received(self, request: Request, *, is_to_run: bool) -> None:
        """A message has come. Receivers of `task_received` are told of one that is to run, now or (see `accepted`) later."""
        if self._on_received:
            _notify(self._on_received, request)
        if self._info:
            logger.info("Task %s[%s] received", name_of(request), request.id, extra=fields(request))
        if is_to_run and signals.task_received:
            signals.task_received.send(sender=self.sender, request=request)

    def accepted(self, request: Request) -> None:
        """Called while `sees_received` for a request that was examined, and is neither unknown nor revoked nor too late."""
        if signals.task_received:
            signals.task_received.send(sender=self.sender, request=request)

    def started(self, request: Request) -> None:
        """Called only while `sees_started`."""
        _notify(self._on_started, request)

    def cancelled(self, request: Request, *, is_lost: bool) -> None:
        """A shutdown ended the request; `is_lost`: it was acked when it began."""
        outcome = "lost: it was acked when it started (acks_late=False)" if is_lost else "requeued"
        logger.warning("Task %s[%s] was ended by the shutdown and is %s", request.task, request.id, outcome)
        _notify(self._on_cancelled, request)

    def dead_lettered(self, request: Request) -> None:
        _notify(self._on_dead_lettered, request)

    def consuming(self, epoch: int) -> None:
        _notify(self._on_consuming, epoch)

    def ended(self, request: Request, outcome: Outcome) -> None:
        """One line for an outcome, by its state."""
        if self._on_ended:
            _notify(self._on_ended, request, outcome)
        state = outcome.state
        if state == states.SUCCESS and not self._info:
            return
        name, task_id, extra = name_of(request), request.id, {**fields(request), "state": state}
        if outcome.runtime > 0:
            extra["runtime"] = outcome.runtime
        if state == states.SUCCESS:
            logger.info(
                "Task %s[%s] succeeded in %.6gs: %s", name, task_id, outcome.runtime, outcome.summary, extra=extra
            )
        elif state == states.RETRY:
            logger.info("Task %s[%s] retry: %s", name, task_id, outcome.summary, extra=extra)
        elif state == states.REVOKED:
            logger.info("Task %s[%s] revoked: %s", name, task_id, outcome.reason or outcome.summary, extra=extra)
        elif state == HELD:
            logger.debug("Task %s[%s] does not begin: %s", name, task_id, outcome.reason)
        elif outcome.answer is Answer.DEAD_LETTER:
            # An error's repr often says no more than the reason.
            why = outcome.reason if outcome.reason in outcome.summary else f"{outcome.reason}: {outcome.summary}"
            logger.error("Task %s[%s] is dead-lettered: %s", name, task_id, why, extra=extra)
        elif outcome.answer is Answer.REQUEUE:
            logger.warning("Task %s[%s] is requeued: %s", name, task_id, outcome.reason or outcome.summary, extra=extra)
        elif state == states.FAILURE:
            self._failed(name, task_id, outcome, extra)
        else:
            logger.info("Task %s[%s] %s", name, task_id, _WORDS.get(state, state.lower()), extra=extra)

    def _failed(self, name: str, task_id: str, outcome: Outcome, extra: JsonObject) -> None:
        if outcome.expected:
            logger.info("Task %s[%s] raised expected: %s", name, task_id, outcome.summary, extra=extra)
        else:
            if outcome.traceback:
                trace = Lines(outcome.traceback)
                logger.error(
                    "Task %s[%s] raised unexpected: %s\n%s", name, task_id, outcome.summary, trace, extra=extra
                )
            else:
                logger.error("Task %s[%s] raised unexpected: %s", name, task_id, outcome.summary, extra=extra)

    def terminating(self, request: Request, signum: int) -> None:
        _notify(self._on_terminating, request, signum)

    def revoked(
        self, request: Request, *, terminated: bool = False, expired: bool = False, signum: int | None = None
    ) -> None:
        if signals.task_revoked:
            signals.task_revoked.send(
                sender=request.task, request=request, terminated=terminated, signum=signum, expired=expired
            )

    def unknown(self, request: Request, error: Exception) -> None:
        logger.error(
            "Received unregistered task of type %r (%s): %s", request.task, request.id, error, extra=fields(request)
        )
        if signals.task_unknown:
            signals.task_unknown.send(
                sender=self.sender, message=request.delivery, exc=error, name=request.task, id=request.id
            )

    def rejected(self, request: Request, error: Exception) -> None:
        logger.error("Received a message that is not a task, on %s: %s", request.queue, error, extra=fields(request))
        if signals.task_rejected:
            signals.task_rejected.send(sender=self.sender, message=request.delivery, exc=error)


_WORDS = {"IGNORED": "ignored", "REJECTED": "rejected"}


def _notify(observers: tuple[Callable[..., None], ...], *arguments: object) -> None:
    for observer in observers:
        try:
            observer(*arguments)
        except Exception:  # a plug-in's
            logger.exception("observer %r failed", observer)


def name_of(request: Request) -> str:
    """The task's name as logs show it: its shadow, if the caller gave one."""
    return request.headers.get("shadow") or request.task


def fields(request: Request) -> dict[str, object]:
    """The fields of a log record about a request."""
    return {"task_id": request.id, "task_name": printable(request.task, LONGEST_ID), "queue": request.queue}
