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


class WithListedNames:
    """As WithOthersNames, for objects that each message has to do with: a class with a `__getattr__` takes five times as long for
    every attribute that it does have (Python 3.11). So the class lists these names (`others_names="pid start"`)."""

    __slots__ = ()

    def __init_subclass__(cls, *, others_names: str = "") -> None:
        super().__init_subclass__()
        for name in others_names.split():
            setattr(cls, name, _Elsewhere(name))


class _Elsewhere:
    """An attribute in `amqtask.compat.attributes`, as a member of the class that has it for others' sake."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, owner: object, owner_class: type) -> Any:
        return self if owner is None else plugins().celery_attribute(owner, self._name)


def others_names(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module that has names for their sake."""

    def find(name: str) -> Any:
        if name.startswith("__"):  # the import system asks each module for a __path__
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return plugins().celery_name(module, name)

    return find
