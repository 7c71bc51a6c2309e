"""Native daemon threads that take calls from one queue; another thread is started when all are busy.

(concurrent.futures waits for its threads when the process ends: a task that hangs would keep the worker alive.)
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from amqtask.ground.printable import bounded_logger

logger = bounded_logger("amqtask.pools")


class ThreadCrew:
    """At most `limit` threads. `call` is for one thread only (the loop's)."""

    def __init__(self, limit: int, name: str) -> None:
        self.limit = limit
        self._name = name
        self._calls: queue.SimpleQueue[tuple[Callable[..., object], tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._size = 0

    @property
    def size(self) -> int:
        """How many threads there are."""
        return self._size

    def call(self, function: Callable[..., object], *arguments: object, busy: int) -> None:
        """Make this call in a thread; `busy` is how many calls are running or waiting, this one included."""
        if self._size < busy and self._size < self.limit:
            self._size += 1
            threading.Thread(target=self._work, name=f"{self._name}-{self._size}", daemon=True).start()
        self._calls.put((function, arguments))

    def take_back(self) -> list[tuple[Any, ...]]:
        """Remove the calls that no thread has taken yet, and return their arguments."""
        taken: list[tuple[Any, ...]] = []
        words_to_go = 0
        try:
            while True:
                call = self._calls.get_nowait()
                if call is None:
                    words_to_go += 1
                else:
                    taken.append(call[1])
        except queue.Empty:
            for _ in range(words_to_go):
                self._calls.put(None)
        return taken

    def resize(self, limit: int) -> None:
        """Change the limit; surplus threads end when they are idle."""
        self.limit = limit
        while self._size > limit:
            self._size -= 1
            self._calls.put(None)

    def stop(self) -> None:
        """End idle threads now, busy ones after their call; does not wait for them."""
        self.resize(0)

    def _work(self) -> None:
        take = self._calls.get
        while (call := take()) is not None:
            function, arguments = call
            try:
                function(*arguments)
            except Exception:
                logger.exception("%s failed", function)
            del call, function, arguments
