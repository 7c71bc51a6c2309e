"""`celery.utils.imports`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from amqtask.ground.plugins import load

__all__ = [
    "NotAPackage",
    "cwd_in_path",
    "find_module",
    "gen_task_name",
    "import_from_cwd",
    "instantiate",
    "qualname",
    "symbol_by_name",
]


class NotAPackage(Exception):
    """A module of a module that is no package."""


def qualname(obj: object) -> str:
    """`module.Class` of a class or of an instance."""
    named = obj if isinstance(obj, type) or hasattr(obj, "__qualname__") else type(obj)
    return f"{named.__module__}.{named.__qualname__}"


def symbol_by_name(
    name: object,
    aliases: dict[str, str] | None = None,
    imp: Any = None,
    package: str | None = None,
    sep: str = ".",
    default: object = None,
) -> Any:
    """The object at `module.Name` or `module:Name`; what is no text is itself."""
    if not isinstance(name, str):
        return name
    path = (aliases or {}).get(name) or name
    module, _, attribute = path.rpartition(":" if ":" in path else sep)
    if not module:
        module, attribute = package or path, attribute if package else ""
    try:
        imported = (imp or load)(module)
        return getattr(imported, attribute) if attribute else imported
    except (ImportError, AttributeError):
        if default is None:
            raise
        return default


def instantiate(name: object, *args: object, **kwargs: object) -> Any:
    """An instance of the class of that name."""
    return symbol_by_name(name)(*args, **kwargs)


@contextmanager
def cwd_in_path() -> Iterator[None]:
    """In the block modules of the present folder can be imported."""
    folder = os.getcwd()
    if folder in sys.path:
        yield
        return
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def find_module(module: str, path: object = None, imp: Any = None) -> ModuleType:
    """Import a module, of the present folder too. Raises: NotAPackage, ImportError."""
    with cwd_in_path():
        try:
            imported: ModuleType = (imp or load)(module)
        except ModuleNotFoundError as error:
            parent = module.rpartition(".")[0]
            if parent and "is not a package" in str(error):
                raise NotAPackage(parent) from error
            raise
        return imported


def import_from_cwd(module: str, imp: Any = None, package: str | None = None) -> ModuleType:
    """Import a module of the present folder."""
    with cwd_in_path():
        imported: ModuleType = (imp or load)(module, package=package)
        return imported


def gen_task_name(app: Any, name: str, module_name: str | None) -> str:
    """The name that a task of this function gets."""
    return str(app.gen_task_name(name, module_name or "__main__"))
