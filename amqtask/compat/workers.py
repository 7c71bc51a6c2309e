"""`app.Worker(…)`, `app.Beat(…)`: a worker and a beat that are started by hand."""

from __future__ import annotations

import threading
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from amqtask.beat.contract import BeatOptions
from amqtask.worker.options import WorkerOptions

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.beat.process import BeatProcess
    from amqtask.worker.worker import Worker

_KNOWN = frozenset(field.name for field in fields(WorkerOptions))
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
