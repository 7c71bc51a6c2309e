"""`celery` for programs that have this package's folder on their path: amqtask, module for module.

It says to be the Celery that amqtask is written after: libraries look at the version before they do anything.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from amqtask.compat import Same
from amqtask.compat.names import VersionInfo

__version__ = "5.7.0"
VERSION = version_info = VersionInfo(5, 7, 0)


class Standing:
    """`celery.app.task` is the module `amqtask.app.task`, not a copy of it."""

    @staticmethod
    def find_spec(fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """As the import system asks."""
        if not fullname.startswith("celery."):
            return None
        try:
            found = importlib.import_module(_ours(fullname))
        except ModuleNotFoundError as error:
            if error.name is not None and (_ours(fullname) + ".").startswith(error.name + "."):
                return None
            raise
        return importlib.util.spec_from_loader(fullname, Same(found), is_package=hasattr(found, "__path__"))


class Named(ModuleType):
    """What the package itself does not say is amqtask's, to read and to replace."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("amqtask"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("__") or name in vars(self):
            super().__setattr__(name, value)
        else:
            setattr(importlib.import_module("amqtask"), name, value)


def _ours(name: str) -> str:
    return "amqtask" + name.removeprefix("celery")


# The queue that docs/coming-from-celery.md names for those whose programs rely on Celery's.
_table = vars(importlib.import_module("amqtask.settings"))["_TABLE"]
_table["task_default_queue"] = _table["task_default_queue"]._replace(default="celery")
sys.meta_path.insert(0, Standing)
sys.modules[__name__].__class__ = Named
