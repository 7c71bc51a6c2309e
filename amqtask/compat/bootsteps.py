"""`celery.bootsteps`: parts of one's own that start and stop with a worker: `app.steps["worker"].add(MyStep)`.

A worker's steps start when its pool and connections do, and stop before them; those of `app.steps["consumer"]` start when the
worker begins to consume. Consumers of a ConsumerStep are kombu's, on a connection and a thread of their own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from amqtask import signals
from amqtask.compat.utils.imports import symbol_by_name
from amqtask.ground.lazy import lazy
from amqtask.ground.printable import bounded_logger

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.ground.shapes import Keywords
    from amqtask.pool import Loop
    from amqtask.pool import Timer as LoopTimer
    from amqtask.worker.worker import Worker

__all__ = ["CLOSE", "RUN", "TERMINATE", "Blueprint", "ConsumerStep", "StartStopStep", "Step"]

logger = bounded_logger("amqtask.worker")
RUN, CLOSE, TERMINATE = 0x1, 0x2, 0x3


class Step:
    """Made when the worker starts; `requires` names steps that come before (those of Celery's own are always there)."""

    name: str | None = None
    label: str | None = None
    conditional = False
    requires: Any = ()
    last = False
    enabled = True

    def __init__(self, parent: Any, **kwargs: object) -> None:
        """`kwargs` are the worker's options, those of `app.user_options` too."""

    def include_if(self, parent: Any) -> bool:
        """Whether the step takes part."""
        return self.enabled

    def _should_include(self, parent: Any) -> tuple[bool, object]:
        return self.include_if(parent), None

    def instantiate(self, name: Any, *args: object, **kwargs: object) -> Any:
        """An object of the class of that name."""
        return symbol_by_name(name)(*args, **kwargs)

    def include(self, parent: Any) -> bool:
        """Take part, if `include_if` says so."""
        if self.include_if(parent):
            self.create(parent)
            return True
        return False

    def create(self, parent: Any) -> Any:
        """Make what the step is for."""

    @property
    def alias(self) -> str:
        """A name for people."""
        return self.label or (self.name or type(self).__qualname__).rsplit(".", 1)[-1]

    def info(self, obj: Any) -> Any:
        """Statistics of the step, if it has any."""

    def __repr__(self) -> str:
        return f"<step: {self.alias}>"


class StartStopStep(Step):
    """Starts and stops with its parent; by default what `create` returned."""

    obj: Any = None

    def start(self, parent: Any) -> Any:
        """Called when the parent starts."""
        return self.obj.start() if self.obj is not None else None

    def stop(self, parent: Any) -> Any:
        """Called when the parent stops."""
        return self.obj.stop() if self.obj is not None else None

    def close(self, parent: Any) -> Any:
        """Called before `stop`."""

    def terminate(self, parent: Any) -> Any:
        """Called in place of `stop`, when there is no time."""
        return self.obj.terminate() if hasattr(self.obj, "terminate") else self.stop(parent)

    def include(self, parent: Any) -> bool:
        """Take part, if `include_if` says so."""
        if self.include_if(parent):
            self.obj = self.create(parent)
            return True
        return False


class ConsumerStep(StartStopStep):
    """`get_consumers(channel)` returns kombu's Consumers; messages come to them on a thread of their own."""

    requires: Any = ("celery.worker.consumer:Connection",)
    consumers: Any = None

    def get_consumers(self, channel: Any) -> Iterable[Any]:
        """The step's consumers, on a channel; both are kombu's."""
        raise NotImplementedError("missing get_consumers")

    def start(self, parent: Any) -> None:
        """Consume."""
        self.consumers = self.get_consumers(parent.connection.channel())
        for consumer in self.consumers or ():
            consumer.consume()

    def stop(self, parent: Any) -> None:
        """Stop consuming."""
        for consumer in self.consumers or ():
            consumer.cancel()

    def shutdown(self, parent: Any) -> None:
        """Close the channels."""
        self.stop(parent)


class Blueprint:
    """The steps of one kind of parent, in the order of their `requires`."""

    def __init__(self, kinds: Iterable[type[Step]]) -> None:
        self.order: list[Step] = []
        self._kinds = tuple(kinds)
        self._started: list[Step] = []

    def apply(self, parent: Any, **options: object) -> Blueprint:
        """Make the steps that take part."""
        for step_class in ordered(self._kinds):
            step = step_class(parent, **options)
            if step.include(parent):
                self.order.append(step)
        return self

    def start(self, parent: Any) -> None:
        """Start all steps, in order; what one raises ends the worker."""
        for step in self.order:
            if isinstance(step, StartStopStep):
                logger.debug("worker: starting %s", step.alias)
                step.start(parent)
                self._started.append(step)

    def stop(self, parent: Any) -> None:
        """Stop all steps that have started, the last first; an error of one is logged, and the others stop."""
        started, self._started = self._started, []
        for name in ("close", "stop"):
            for step in reversed(started):
                try:
                    getattr(step, name)(parent)
                except Exception:  # a user's step; the others stop, too
                    logger.exception("worker: %s of the step %s has failed", name, step.alias)

    def __iter__(self) -> Iterator[Step]:
        return iter(self.order)


def ordered(kinds: Iterable[type[Step]]) -> list[type[Step]]:
    """The steps in order: each after those that it requires, those with `last` at the end."""
    waiting = sorted(
        kinds, key=lambda step_class: (step_class.last, f"{step_class.__module__}.{step_class.__qualname__}")
    )
    names = {step_class: _names(step_class) for step_class in waiting}
    in_order: list[type[Step]] = []
    while waiting:
        for step_class in waiting:
            needed = {_name(item) for item in step_class.requires}
            if not any(needed & names[other_class] for other_class in waiting if other_class is not step_class):
                break
        else:
            step_class = waiting[0]  # they require each other in a circle
        waiting.remove(step_class)
        in_order.append(step_class)
    return in_order


def _names(step_class: type[Step]) -> set[str]:
    return {_name(step_class), *([step_class.name] if step_class.name else [])}


def _name(item: Any) -> str:
    return item.replace(":", ".") if isinstance(item, str) else f"{item.__module__}.{item.__qualname__}"


class ConsumerParent:
    """What the steps of `app.steps["consumer"]` get: the consumer of Celery's worker, as far as there is one here."""

    def __init__(self, worker: Worker, app: AmqTask) -> None:
        self.controller = worker
        self.app = app
        self.hostname = worker.setup.hostname
        self.pool = worker.pool
        self.timer: Timer = worker.timer  # type: ignore[attr-defined] # of amqtask.compat.bootsteps
        self.restart_count = -1

    @property
    def connection(self) -> Any:
        """That of kombu, for channels; opened when it is asked for. Raises: ImportError where kombu is not installed."""
        connection = self.__dict__.get("_connection")
        if connection is None:
            import kombu

            connection = self.__dict__["_connection"] = kombu.Connection(
                ";".join(self.app.broker.urls), heartbeat=self.app.conf.broker_heartbeat
            )
        return connection

    @property
    def has_connection(self) -> bool:
        """Whether the connection was asked for."""
        return "_connection" in self.__dict__

    def close(self) -> None:
        """Close the connection."""
        connection = self.__dict__.pop("_connection", None)
        if connection is not None:
            connection.release()


class Steps:
    """A worker's service: starts the steps of its application, and stops them."""

    name = "steps"

    def __init__(self, app: AmqTask, worker: Worker, kinds: Mapping[str, Iterable[type[Step]]], options: Any) -> None:
        self._worker = worker
        self._options = dict(options)
        self._parent = ConsumerParent(worker, app)
        self._of_worker = Blueprint(kinds["worker"])
        self._of_consumer = Blueprint(kinds["consumer"])
        self._is_started = False
        self._draining: Draining | None = None

    def start(self) -> None:
        """Start the worker's steps now, and the consumer's when the worker consumes."""
        if not self._is_started:
            self._is_started = True
            self._of_worker.apply(self._worker, **self._options).start(self._worker)
            if self._worker.lifecycle.is_ready:
                self._consume()
            else:
                signals.worker_ready.connect(self._consume, sender=self._worker)

    def _consume(self, **_: object) -> None:
        parent = self._parent
        parent.restart_count += 1
        self._of_consumer.apply(parent, **self._options).start(parent)
        if parent.has_connection:
            self._draining = Draining(parent.connection, self._consume_again)
            self._draining.start()

    def _consume_again(self) -> None:
        """Have consumer steps consume on the connection's new channels."""
        self._parent.restart_count += 1
        for step in self._of_consumer:
            if isinstance(step, ConsumerStep):
                step.start(self._parent)

    def stop(self) -> None:
        """Stop the consumer's steps, then the worker's."""
        if not self._is_started:
            return
        self._is_started = False
        signals.worker_ready.disconnect(self._consume, sender=self._worker)
        if self._draining is not None:
            self._draining.stop()
        self._of_consumer.stop(self._parent)
        self._of_worker.stop(self._worker)
        self._parent.close()


class Draining:
    """Hands kombu's consumers what comes, on a thread; a connection that is lost is opened again, and `begin_again` called."""

    def __init__(self, connection: Any, begin_again: Callable[[], None]) -> None:
        self._connection = connection
        self._begin_again = begin_again
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="consumer steps", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; a callback that hangs is left behind."""
        self._is_stopped.set()
        self._thread.join(5.0)

    def _run(self) -> None:
        is_lost = False
        while not self._is_stopped.is_set():
            try:
                if is_lost:
                    self._connection.collect()  # what is left of the old one, and what was declared over it
                    self._connection.ensure_connection(max_retries=1, reraise_as_library_errors=False)
                    self._begin_again()
                    is_lost = False
                self._drain()
            except self._connection.recoverable_connection_errors as error:
                logger.warning("worker: the connection of consumer steps is lost (%s); it is opened again", error)
                is_lost = True
                self._is_stopped.wait(1.0)

    def _drain(self) -> None:
        try:
            self._connection.drain_events(timeout=0.5)
        except TimeoutError:
            self._beat()

    def _beat(self) -> None:
        if self._connection.heartbeat:
            self._connection.heartbeat_check()


def service(app: AmqTask, worker: Worker, options: Any) -> Steps:
    """The service that runs a worker's bootsteps, for amqtask.assembly."""
    parameters = options._asdict()
    return Steps(app, worker, app.steps, {**parameters, **parameters.pop("of_app")})  # type: ignore[attr-defined] # of app_attributes


# -- worker.timer: functions that are called later on a worker's loop


class Entry:
    """A pending call: `cancel()`."""

    def __init__(self, call: Callable[[], None], repeat: float | None) -> None:
        self._call = call
        self.repeat = repeat
        self.canceled = False
        self.timer: LoopTimer | None = None

    def __call__(self) -> None:
        """Make the call; what it raises is logged."""
        try:
            self._call()
        except Exception:  # a user's function
            logger.exception("worker: a function that a timer calls has failed")

    def cancel(self) -> None:
        """Cancel the call; from any thread."""
        self.canceled = True


class Timer:
    """Times are seconds. From any thread; the functions run on the worker's loop, so they must be short."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def call_after(
        self, secs: float, fun: Callable[..., Any], args: Sequence[Any] = (), kwargs: Any = None, priority: int = 0
    ) -> Entry:
        """Call a function once, after so many seconds."""
        return self._enter(secs, _bound(fun, args, kwargs), None)

    def call_repeatedly(
        self, secs: float, fun: Callable[..., Any], args: Sequence[Any] = (), kwargs: Any = None, priority: int = 0
    ) -> Entry:
        """Call a function again and again, until it is cancelled."""
        return self._enter(secs, _bound(fun, args, kwargs), secs)

    def cancel(self, tref: Entry) -> None:
        """Cancel a call."""
        tref.cancel()

    def _enter(self, seconds: float, call: Callable[[], None], repeat: float | None) -> Entry:
        entry = Entry(call, repeat)
        self._loop.call_soon_threadsafe(lambda: self._arm(entry, seconds))
        return entry

    def _arm(self, entry: Entry, seconds: float) -> None:
        if not entry.canceled:
            entry.timer = self._loop.call_later(seconds, lambda: self._fire(entry))

    def _fire(self, entry: Entry) -> None:
        if entry.canceled:
            return
        entry()
        if entry.repeat is not None:
            self._arm(entry, entry.repeat)


def _bound(function: Callable[..., Any], args: Sequence[Any], kwargs: Keywords | None) -> Callable[[], None]:
    return lambda: function(*args, **(kwargs or {}))


# -- `worker`, the sender of a worker's signals and the parent of bootsteps.


if TYPE_CHECKING:
    _Worker = Worker
else:
    _Worker = object  # who has steps of his own has no worker to import


class OfWorker(_Worker):
    """Bound to a worker."""

    @property
    def hostname(self) -> str:
        """The node's name."""
        return self.setup.hostname

    @lazy
    def timer(self) -> Timer:
        """Calls functions later, on the worker's loop."""
        return Timer(self.loop)

    def start(self) -> int:
        """Run until `stop`; the exit code."""
        return self.run()

    @property
    def pid(self) -> int:
        """The id of this process."""
        return os.getpid()

    @property
    def blueprint(self) -> Any:
        """The steps of the worker, with `app.steps`."""
        return self.app.steps["worker"]
