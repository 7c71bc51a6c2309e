"""The in-process store keeps the backends' contract."""

from __future__ import annotations

from amqtask.backends.contract import BackendOptions, ResultBackend
from amqtask.backends.memory import MemoryBackend
from amqtask.testing.suites.backend import BackendSuite


class TestMemory(BackendSuite):
    is_shared = False

    def make(self) -> ResultBackend:
        return MemoryBackend(BackendOptions(url="cache+memory://"))
