"""Import paths that Celery's users have in their code, and nothing else: what is here lives elsewhere."""

from __future__ import annotations

import importlib
import uuid as _uuid
from typing import Any


def uuid() -> str:
    """A new task id."""
    return str(_uuid.uuid4())


def __getattr__(name: str) -> Any:
    return importlib.import_module("amqtask.compat").lookup(__name__, name)
