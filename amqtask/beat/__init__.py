"""beat: publishes periodic tasks when they are due; any number may run, one of them at a time does."""

import importlib
from typing import Any

from amqtask.beat.lazy import BeatLazyFunc

__all__ = ["BeatLazyFunc"]


def __getattr__(name: str) -> Any:
    return importlib.import_module("amqtask.compat").lookup(__name__, name)
