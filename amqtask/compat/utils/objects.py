"""`celery.utils.objects`."""

from __future__ import annotations

from types import SimpleNamespace as Bunch
from typing import Any

__all__ = ["Bunch", "mro_lookup"]


def mro_lookup(cls: type, attr: str, stop: Any = None, monkey_patched: object = None) -> type | None:
    """The class that defines an attribute."""
    for ancestor in cls.mro():
        if stop and ancestor in stop:
            return None
        if attr in ancestor.__dict__:
            return ancestor
    return None
