"""`pytest_plugins = ("amqtask.contrib.pytest",)`: celery.contrib.pytest's fixtures, at its place."""

from __future__ import annotations

import importlib
from typing import Any

pytest_plugins = ("amqtask.testing.celery_fixtures",)


def __getattr__(name: str) -> Any:
    return importlib.import_module("amqtask.compat").lookup(__name__, name)
