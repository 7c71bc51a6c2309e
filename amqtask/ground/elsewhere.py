"""Names and attributes that only programs written for Celery ask for are in amqtask.compat, imported when one is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from amqtask.ground.plugins import plugins


class WithOthersNames:
    """Looks for attributes that an object does not have in `amqtask.compat.attributes`."""

    if not TYPE_CHECKING:  # what is there is for them, not for us

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return plugins().celery_attribute(self, name)


def others_names(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module that has names for their sake."""

    def find(name: str) -> Any:
        if name.startswith("__"):  # the import system asks each module for a __path__
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return plugins().celery_name(module, name)

    return find
