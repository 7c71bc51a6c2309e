"""`celery.loaders.base`: what an application's settings are read by, and what is told as its workers run."""

from __future__ import annotations

import os
from datetime import datetime
from typing import TYPE_CHECKING, Any

from amqtask.ground.plugins import load

if TYPE_CHECKING:
    from amqtask.app import AmqTask


__all__ = ["BaseLoader"]


class BaseLoader:
    """The loader of one application. Derive from it and say otherwise."""

    def __init__(self, app: AmqTask, **_: object) -> None:
        self.app = app
        self.task_modules: set[str] = set()

    def read_configuration(self, env: str = "CELERY_CONFIG_MODULE") -> Any:
        """The settings of an application that has no other configuration: a mapping, an object, the name of a module, or None."""
        return os.environ.get(env)

    # -- called by workers

    def on_worker_init(self) -> None:
        """A worker starts."""

    def on_worker_process_init(self) -> None:
        """A child process of a worker starts."""

    def on_worker_shutdown(self) -> None:
        """A worker has stopped."""

    def on_task_init(self, task_id: str, task: Any) -> None:
        """A task begins."""

    def on_process_cleanup(self) -> None:
        """A task has ended."""

    # -- called by others

    def import_default_modules(self) -> None:
        """Import all modules that `include`, `imports` and autodiscover_tasks name."""
        self.app.load_tasks()

    def init_worker(self) -> None:
        """Import the modules with tasks when a worker starts."""
        self.app.import_modules()

    def import_task_module(self, module: str) -> Any:
        """Import a module of tasks."""
        self.task_modules.add(module)
        return load(module)

    def import_module(self, module: str, package: str | None = None) -> Any:
        """Import any module."""
        return load(module, package)

    import_from_cwd = import_module

    def autodiscover_tasks(self, packages: object, related_name: str = "tasks") -> None:
        """`app.autodiscover_tasks`."""
        self.app.autodiscover_tasks(packages, related_name, force=True)

    def now(self, utc: bool = True) -> datetime:
        """The present time."""
        return self.app.now()

    @property
    def conf(self) -> Any:
        """The settings."""
        return self.app.conf

    @property
    def default_modules(self) -> set[str]:
        """The names of the modules that are imported."""
        return {*self.app.conf.imports, *self.app.conf.include}
