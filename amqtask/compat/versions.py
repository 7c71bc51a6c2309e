"""The version as Celery's users compare it."""

from __future__ import annotations

from typing import NamedTuple

from amqtask import ground


class VersionInfo(NamedTuple):
    """`amqtask.VERSION >= (0, 1)`."""

    major: int
    minor: int
    micro: int
    releaselevel: str = ""
    serial: str = ""


VERSION = VersionInfo(*map(int, ground.VERSION.split(".")[:3]))  # type: ignore[arg-type] # three numbers
