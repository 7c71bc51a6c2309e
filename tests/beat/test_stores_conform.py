"""Our stores of the settings' entries keep the contract."""

from __future__ import annotations

from pathlib import Path

import pytest

from amqtask import AmqTask
from amqtask.beat.contract import ScheduleStore, StoreOptions
from amqtask.beat.settings_store import FileStore, MemoryStore
from amqtask.testing.suites.store import ScheduleStoreSuite


class SettingsStoreSuite(ScheduleStoreSuite):
    @pytest.fixture(autouse=True)
    def app(self, tmp_path: Path) -> None:
        self.application = AmqTask("tasks", broker="memory://", set_as_current=False)
        self.options = StoreOptions(filename=str(tmp_path / "last"))

    def put(self, name: str, seconds: float, *, enabled: bool = True) -> None:
        entry = {"task": "tasks.tick", "schedule": seconds, "enabled": enabled}
        self.application.conf.beat_schedule[name] = entry

    def remove(self, name: str) -> None:
        del self.application.conf.beat_schedule[name]


class TestFileStore(SettingsStoreSuite):
    def open(self) -> ScheduleStore:
        return FileStore(self.application, self.options)


class TestMemoryStore(SettingsStoreSuite):
    remembers = False

    def open(self) -> ScheduleStore:
        return MemoryStore(self.application, self.options)
