"""`celery.loaders`: where an application's settings come from, and what is called as its workers run, as a class of one's own.

`AmqTask(loader="module:Class")`, a class attribute `loader_cls`, or the variable CELERY_LOADER name it.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from amqtask import signals
from amqtask.compat.loaders.base import BaseLoader
from amqtask.compat.utils.imports import symbol_by_name
from amqtask.exceptions import ConfigurationError

if TYPE_CHECKING:
    from amqtask.app import AmqTask

__all__ = ["get_loader_cls"]

_ALIASES = {"app": "amqtask.compat.loaders.app:AppLoader", "default": "amqtask.compat.loaders.default:Loader"}


def get_loader_cls(loader: Any) -> type[BaseLoader]:
    """The class of that name (`app`, `default`, or a path), or the class itself. Raises: ConfigurationError."""
    try:
        found: type[BaseLoader] = symbol_by_name(loader, _ALIASES)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(f"the loader {loader!r} cannot be imported: {error}") from error
    return found


def use(app: AmqTask, loader: object) -> None:
    """Have a loader of that class (or name). Raises: ConfigurationError."""
    made = get_loader_cls(loader)(app)
    app.__dict__["loader"] = made
    told = Told(app)
    app.__dict__["_told_loader"] = told  # signals know only what somebody keeps
    for signal, hook, tell in (
        (signals.worker_init, "on_worker_init", told.worker_init),
        (signals.worker_process_init, "on_worker_process_init", told.process_init),
        (signals.worker_shutdown, "on_worker_shutdown", told.worker_shutdown),
        (signals.task_prerun, "on_task_init", told.task_begins),
        (signals.task_postrun, "on_process_cleanup", told.task_has_ended),
    ):
        if getattr(type(made), hook, None) is not getattr(BaseLoader, hook):
            signal.connect(tell)


class Told:
    """Calls a loader's hooks, for what its application's workers do."""

    def __init__(self, app: Any) -> None:
        self._reference = weakref.ref(app)

    @property
    def _loader(self) -> BaseLoader:
        app: Any = self._reference()
        return app.loader  # type: ignore[no-any-return]

    def worker_init(self, sender: Any, **_: object) -> None:
        """A worker starts."""
        if sender.app is self._reference():
            self._loader.on_worker_init()

    def process_init(self, **_: object) -> None:
        """A child process of a worker starts."""
        self._loader.on_worker_process_init()

    def worker_shutdown(self, sender: Any, **_: object) -> None:
        """A worker has stopped."""
        if sender.app is self._reference():
            self._loader.on_worker_shutdown()

    def task_begins(self, task: Any, task_id: str, **_: object) -> None:
        """A task begins."""
        if task.app is self._reference():
            self._loader.on_task_init(task_id, task)

    def task_has_ended(self, task: Any, **_: object) -> None:
        """A task has ended."""
        if task.app is self._reference():
            self._loader.on_process_cleanup()
