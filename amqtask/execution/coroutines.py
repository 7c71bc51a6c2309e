"""Runs coroutines of `async def` tasks in slots that are no event loop: one reusable loop per thread or process."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


class CoroutineRunner:
    """Keeps one event loop for its caller. Not for two threads at once: each slot has its own."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def __call__(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run to the end and return the result. What the task left running on the loop is cancelled."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        loop = self._loop
        try:
            return loop.run_until_complete(coroutine)
        finally:
            left = asyncio.all_tasks(loop)
            if left:
                for task in left:
                    task.cancel()
                loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))

    def close(self) -> None:
        """Close the loop."""
        if self._loop is not None:
            self._loop.close()
            self._loop = None
