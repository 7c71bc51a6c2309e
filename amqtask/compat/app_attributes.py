"""`app`: what Celery's application has besides."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from amqtask.app import AmqTask
from amqtask.beat.contract import BeatOptions
from amqtask.compat.app.amqp import AMQP
from amqtask.compat.connections import Connection, Producer, Producers
from amqtask.compat.loaders.app import AppLoader
from amqtask.compat.loaders.base import BaseLoader
from amqtask.compat.names import bugreport
from amqtask.execution.context import current_context
from amqtask.ground.current import current_app
from amqtask.ground.lazy import lazy
from amqtask.worker.options import WorkerOptions

if TYPE_CHECKING:
    import click

    from amqtask.beat.build import BeatProcess
    from amqtask.compat.bootsteps import Step
    from amqtask.worker.worker import Worker


# -- `app.Worker(…)`, `app.Beat(…)`: a worker and a beat that are started by hand.

_KNOWN = frozenset(WorkerOptions._fields)
_LISTS = frozenset({"queues", "exclude_queues", "include"})


def make_worker(app: AmqTask, **options: Any) -> Worker:
    """A worker that is ready to `start()`; options as on the command line. Raises: ConfigurationError."""
    known_options = {name: value for name, value in options.items() if name in _KNOWN and value is not None}
    for name in _LISTS & known_options.keys():
        value = known_options[name]
        known_options[name] = tuple(value.split(",")) if isinstance(value, str) else tuple(value)
    known_options["of_app"] = {name: value for name, value in options.items() if name not in _KNOWN}
    known_options.setdefault("install_signals", threading.current_thread() is threading.main_thread())
    from amqtask.assembly import build_worker

    return build_worker(app, WorkerOptions(**known_options))


class Beat:
    """`run()` sends periodic tasks until a signal ends it."""

    def __init__(
        self,
        app: AmqTask,
        max_interval: float | None = None,
        schedule: str | None = None,
        scheduler: str | None = None,
        **_: object,
    ) -> None:
        self.app = app
        self._options = BeatOptions(schedule=schedule, scheduler=scheduler, max_interval=max_interval)

    def process(self) -> BeatProcess:
        """What `run` runs."""
        from amqtask.beat.build import build_beat

        return build_beat(self.app, self._options)

    def run(self) -> int:
        """Until a signal ends it; the exit code."""
        return self.process().run()


class OfApp(AmqTask):
    """Bound to an application."""

    # -- parts

    @lazy
    def amqp(self) -> AMQP:
        """Queues and routes."""
        return AMQP(self)

    @lazy
    def loader(self) -> BaseLoader:
        """Imports the modules with tasks."""
        return AppLoader(self)

    @lazy
    def steps(self) -> dict[str, set[type[Step]]]:
        """Bootsteps of the application's own for workers: `app.steps["worker"].add(…)`, `app.steps["consumer"].add(…)`."""
        return defaultdict(set)

    @lazy
    def user_options(self) -> dict[str, set[click.Option]]:
        """Options of the application's own for commands: `app.user_options["worker"].add(click.Option(["--x"]))`."""
        return defaultdict(set)

    # -- connections

    @property
    def pool(self) -> Producers:
        """Connections to acquire."""
        return Producers(lambda: Connection(self))

    @property
    def producer_pool(self) -> Producers:
        """Producers to acquire."""
        return Producers(lambda: Producer(self))

    @contextmanager
    def connection_or_acquire(
        self, connection: Any = None, pool: bool = True, *_: object, **__: object
    ) -> Iterator[Any]:
        """The connection that is given, or one for the block."""
        if connection is not None:
            yield connection
            return
        with self.connection() as acquired:
            yield acquired

    default_connection = connection_or_acquire

    @contextmanager
    def producer_or_acquire(self, producer: object = None) -> Iterator[Any]:
        """The producer that is given, or one for the block."""
        yield Producer(self) if producer is None else producer

    default_producer = producer_or_acquire

    def broker_connection(self, *_: object, **__: object) -> Any:
        """A connection."""
        return self.connection()

    # -- processes

    def Worker(self, app: object = None, **options: object) -> Any:
        """A worker: `app.Worker(pool="solo", concurrency=1).start()`."""
        return make_worker(self, **options)

    WorkController = Worker

    def Beat(self, app: object = None, **options: Any) -> Beat:
        """A beat: `app.Beat(scheduler="…").run()`."""
        return Beat(self, **options)

    # -- settings

    def add_defaults(self, fun: object) -> None:
        """Add defaults for settings that nothing else has set; they are read when they are needed."""
        self.conf.later(lambda: self.conf.add_defaults(fun))

    def either(self, default_key: str, *defaults: object) -> Any:
        """The first of `defaults` that is not None, else the setting."""
        return next((value for value in defaults if value is not None), self.conf[default_key])

    def select_queues(self, queues: Iterable[str] | None = None) -> None:
        """Consume these only."""
        self.queues.select(list(queues or ()))

    def prepare_config(self, c: object) -> Any:
        """Return the configuration unchanged."""
        return c

    # -- state

    def _get_current_object(self) -> AmqTask:
        """The application itself, as Celery's proxies return it."""
        return self

    @property
    def finalized(self) -> bool:
        """Whether its tasks are finalised."""
        return self.is_finalized

    @property
    def configured(self) -> bool:
        """Whether settings were read."""
        return self.is_finalized

    @property
    def current_task(self) -> Any:
        """The task that runs here; None where none runs."""
        context = current_context()
        return None if context is None or context.task is None else self.tasks[context.task]

    current_worker_task = current_task

    def bugreport(self) -> str:
        """Versions and settings."""
        return bugreport(self)

    @property
    def uses_utc_timezone(self) -> bool:
        """Whether the application's time zone is UTC."""
        return str(self.timezone) == "UTC"

    @lazy
    def oid(self) -> str:
        """A unique id of this application object."""
        return str(uuid4())

    @property
    def is_current(self) -> bool:
        """Whether it is the current application."""
        return current_app() is self

    @property
    def annotations(self) -> list[Mapping[str, Any]]:
        """The setting task_annotations as a list."""
        annotations = self.conf.task_annotations or []
        return list(annotations) if isinstance(annotations, (list, tuple)) else [annotations]
