"""`celery.app.control`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from amqtask.ground.current import current_app
from amqtask.remote.control import Control
from amqtask.remote.control import Inspect as Inspection

if TYPE_CHECKING:
    from amqtask.ground.shapes import JsonFields

__all__ = ["Control", "Inspect", "flatten_reply"]


def flatten_reply(reply: Iterable[JsonFields]) -> dict[str, Any]:
    """A list of replies as one dictionary: node → answer."""
    replies: dict[str, object] = {}
    for item in reply:
        replies.update(item)
    return replies


class Inspect(Inspection):
    """`Inspect(app=app)`; without one it asks the workers of the current application."""

    @property
    def control(self) -> Control:  # type: ignore[override] # in Celery a class attribute, too
        """Remote control of the current application."""
        control: Control = current_app().control
        return control
