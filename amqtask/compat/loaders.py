"""`app.loader`: imports the modules with tasks."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from amqtask.ground.plugins import load

if TYPE_CHECKING:
    from amqtask.app import AmqTask


class Loader:
    """The loader of one application."""

    def __init__(self, app: AmqTask) -> None:
        self.app = app
        self.task_modules: set[str] = set()

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


def get_loader_cls(loader: object) -> type[Loader]:
    """The loader's class: there is only one."""
    return Loader
