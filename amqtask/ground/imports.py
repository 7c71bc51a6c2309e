"""Modules by names that only the running program knows: a user's, a plug-in's. What we know ourselves, a statement imports."""

from __future__ import annotations

import importlib
from operator import attrgetter
from typing import Any


def load(module: str, package: str | None = None) -> Any:
    """The module of that name; in `package` if the name begins with a dot. Raises: ImportError."""
    return importlib.import_module(module, package)


def load_path(path: str) -> Any:
    """What `module:attribute` (or `module:attribute.of.it`), or `module.attribute` names.

    Raises: ImportError, AttributeError, ValueError (there is no module in the path).
    """
    module, separator, attributes = path.partition(":")
    if not separator:
        module, _, attributes = path.rpartition(".")
    return attrgetter(attributes)(load(module))
