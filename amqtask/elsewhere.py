"""Attributes that only programs written for Celery ask for are in amqtask.compat; it is imported when one is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


class WithOthersNames:
    """What an object has not itself may be in `amqtask.compat.attributes`."""

    if not TYPE_CHECKING:  # what is there is for them, not for us

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return importlib.import_module("amqtask.compat").attribute(self, name)
