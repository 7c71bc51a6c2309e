"""`celery.utils.iso8601`."""

from __future__ import annotations

from datetime import datetime


def parse_iso8601(datestring: str) -> datetime:
    """The datetime of a text. Raises: ValueError."""
    return datetime.fromisoformat(datestring.replace("Z", "+00:00"))
