"""Modules by names that only the running program knows: a user's, a plug-in's. What we know ourselves, a statement imports."""

from __future__ import annotations

import importlib
from functools import lru_cache
from operator import attrgetter
from typing import Any

from amqtask.ground.near_names import near_names


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


_ABSENT = object()


@lru_cache
def completed(plugin: Any, defaults: type) -> Any:
    """The class `plugin`; where it lacks members that `defaults` has, a class derived from it that has them.

    So plug-ins need not derive from a class of ours, and go on as they are when a contract gets new members.
    """
    missing = {name: _member(defaults, name) for name in _public(defaults) if _member(plugin, name) is _ABSENT}
    if not missing:
        return plugin
    names = {"__module__": plugin.__module__, "__qualname__": plugin.__qualname__, "__doc__": plugin.__doc__}
    return type(plugin)(plugin.__name__, (plugin,), {**missing, **names})


def misspelt(plugin: type, contract: type) -> dict[str, str]:
    """Members of `plugin` that look like one of the contract that it leaves out: its name by theirs."""
    members = _public(contract)
    left_out = [name for name in members if _member(plugin, name) in (_ABSENT, _member(contract, name))]
    near = {name: near_names(name, left_out, alike=0.85) for name in _public(plugin) if name not in members}
    return {name: matches[0] for name, matches in near.items() if matches}


def _public(of: type) -> list[str]:
    return [name for name in dir(of) if not name.startswith("_")]


def _member(of: type, name: str) -> object:
    """What a class has under a name, as it stands there."""
    return next((vars(base)[name] for base in of.__mro__ if name in vars(base)), _ABSENT)
