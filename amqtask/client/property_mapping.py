"""A message's properties as receivers of before_task_publish get them, in Celery too: a mapping of those that are set."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from dataclasses import fields
from typing import Any

from amqtask.protocol.message import Properties

_NAMES = tuple(field.name for field in fields(Properties) if field.name != "headers")


class PropertyMapping(MutableMapping[str, Any]):
    """Reads and writes the properties of one message; `headers` are not among them."""

    __slots__ = ("_properties",)

    def __init__(self, properties: Properties) -> None:
        self._properties = properties

    def __getitem__(self, name: str) -> Any:
        value = getattr(self._properties, name) if name in _NAMES else None
        if value is None:
            raise KeyError(name)
        return value

    def __setitem__(self, name: str, value: object) -> None:
        if name not in _NAMES:
            raise KeyError(f"{name!r} is no property of a message; there are: {', '.join(_NAMES)}")
        setattr(self._properties, name, value)

    def __delitem__(self, name: str) -> None:
        self[name]
        setattr(self._properties, name, None)

    def __iter__(self) -> Iterator[str]:
        return (name for name in _NAMES if getattr(self._properties, name) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))
