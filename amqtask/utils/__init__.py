"""Import paths that Celery's users have in their code, and nothing else: what is here lives elsewhere."""

from __future__ import annotations

import uuid as _uuid

from amqtask.ground.plugins import others_names


def uuid() -> str:
    """A new task id."""
    return str(_uuid.uuid4())


__getattr__ = others_names(__name__)
