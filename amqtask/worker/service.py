"""Services on a worker's loop (remote control, autoscale, watchdog …), each removable."""

from __future__ import annotations

from typing import Protocol


class Service(Protocol):
    """Started when the worker starts, stopped before its connections close; both may be called twice."""

    name: str

    def start(self) -> None: ...

    def stop(self) -> None: ...
