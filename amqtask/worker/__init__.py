"""The worker: consumer, strategy, dispatch, acknowledgements, shutdown."""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    return importlib.import_module("amqtask.compat").lookup(__name__, name)
