"""Names and attributes that only programs written for Celery ask for are in amqtask.compat, imported when one is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from amqtask.ground.plugins import plugins


class WithOthersNames:
    """Looks for attributes that an object does not have in `amqtask.compat.attributes`; not for those of `NEVER_ELSEWHERE`."""

    # What our own code asks for, where an object may not have it.
    NEVER_ELSEWHERE: ClassVar[frozenset[str]] = frozenset()

    if not TYPE_CHECKING:  # what is there is for them, not for us

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__") or name in self.NEVER_ELSEWHERE:
                raise AttributeError(name)
            return plugins().celery_attribute(self, name)


def others_names(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module that has names for their sake."""

    def find(name: str) -> Any:
        if name.startswith("__"):  # the import system asks each module for a __path__
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return plugins().celery_name(module, name)

    return find
