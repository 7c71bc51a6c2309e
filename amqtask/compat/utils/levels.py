"""Levels of logging by their names."""

from __future__ import annotations

import logging
from typing import Any

LOG_LEVELS: dict[Any, Any] = {
    **logging._nameToLevel,
    "FATAL": logging.CRITICAL,
    **{number: name for name, number in logging._nameToLevel.items()},
}
base_logger = logging.getLogger("amqtask")


def mlevel(level: int | str | None) -> int | str | None:
    """The number of a level's name."""
    return LOG_LEVELS[level.upper()] if level and not isinstance(level, int) else level
