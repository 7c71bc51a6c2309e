"""`celery.app.control`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from amqtask.control import Control
from amqtask.questions import Inspect

__all__ = ["Control", "Inspect", "flatten_reply"]


def flatten_reply(reply: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """A list of replies as one dictionary: node → answer."""
    found: dict[str, Any] = {}
    for item in reply:
        found.update(item)
    return found
