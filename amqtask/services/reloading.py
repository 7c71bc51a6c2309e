"""Importing task modules (again) in a running worker, for `pool_restart`: new child processes then have the new code.

A module's tasks are unregistered before it is imported again, because a name that is registered already keeps its old task.
When the import fails they are registered again, and the worker goes on with the old code.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING

from amqtask.exceptions import ConfigurationError
from amqtask.ground.plugins import load
from amqtask.ground.printable import bounded_logger

if TYPE_CHECKING:
    from collections.abc import Mapping

    from amqtask.app import AmqTask

logger = bounded_logger("amqtask.worker")


def import_again(app: AmqTask, modules: Iterable[str], *, reload: bool) -> set[str]:
    """Import modules that are not imported yet; with `reload` the others, too. Returns the names of tasks that were replaced.

    Raises: ConfigurationError when one cannot be imported.
    """
    changed: set[str] = set()
    for name in dict.fromkeys(modules):
        loaded = sys.modules.get(name)
        if loaded is None:
            logger.info("pool restart: importing module %s", name)
            _imported(name)
        elif reload:
            logger.info("pool restart: reloading module %s", name)
            changed |= _reloaded(app, loaded)
    return changed


def _imported(name: str) -> None:
    try:
        load(name)
    except Exception as error:  # a user's module
        logger.exception("module %s cannot be imported", name)
        raise ConfigurationError(f"module {name} cannot be imported: {error!r}") from error


def _reloaded(app: AmqTask, module: ModuleType) -> set[str]:
    module_tasks = {name: task for name, task in app.tasks.items() if type(task).__module__ == module.__name__}
    before = {name: value for name, value in vars(module).items() if value is app}
    for name in module_tasks:
        app.tasks.unregister(name)
    try:
        importlib.reload(module)
        _check_app(module, before)
    except Exception as error:  # a user's module
        for task in module_tasks.values():
            app.tasks.register(task)
        logger.exception("module %s cannot be reloaded", module.__name__)
        raise ConfigurationError(f"module {module.__name__} cannot be reloaded: {error!r}") from error
    return set(module_tasks)


def _check_app(module: ModuleType, before: Mapping[str, object]) -> None:
    for name, app in before.items():
        if getattr(module, name, None) is not app:
            raise ConfigurationError(f"it makes the application ({name}) anew; restart the worker instead")
