"""The store of Django's tables keeps the contract of schedule stores."""

from __future__ import annotations

from typing import Any

import pytest

from amqtask import AmqTask
from amqtask.beat.contract import ScheduleStore, StoreOptions
from amqtask.testing.suites.store import ScheduleStoreSuite


class TestDatabaseStore(ScheduleStoreSuite):
    @pytest.fixture(autouse=True)
    def tables(self, database: None, project: AmqTask) -> None:
        import amqtask.contrib.django.models

        self.application = project
        self.models: Any = amqtask.contrib.django.models

    def open(self) -> ScheduleStore:
        from amqtask.contrib.django.schedulers import DatabaseScheduler

        class OnTheTestsConnection(DatabaseScheduler):
            def close(self) -> None:
                """Everything is in the test's transaction."""

        return OnTheTestsConnection(self.application, StoreOptions())

    def put(self, name: str, seconds: float, *, enabled: bool = True) -> None:
        every, _ = self.models.IntervalSchedule.objects.get_or_create(every=int(seconds), period="seconds")
        self.models.PeriodicTask.objects.update_or_create(
            name=name, defaults={"task": "tasks.tick", "interval": every, "enabled": enabled}
        )

    def remove(self, name: str) -> None:
        self.models.PeriodicTask.objects.get(name=name).delete()
