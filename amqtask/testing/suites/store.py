"""The conformance suite for sources of periodic tasks: subclass ScheduleStoreSuite and let pytest collect it.

    class TestMyStore(ScheduleStoreSuite):
        def open(self) -> ScheduleStore:
            return MyStore(self.app, StoreOptions())

        def put(self, name: str, seconds: float, *, enabled: bool = True) -> None: ...

        def remove(self, name: str) -> None: ...

`remembers = False` is for stores that forget last runs with their process.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import ClassVar

import pytest

from amqtask.beat.contract import Entry, Run, ScheduleStore
from amqtask.beat.scheduler import Scheduler

NOON = datetime(2026, 6, 1, 12, 0, 0, 250_000, tzinfo=timezone.utc)


def _run(name: str, count: int, due_at: datetime = NOON) -> Run:
    return Run(name, due_at, due_at + timedelta(seconds=1), f"{name}-{count}", count)


class ScheduleStoreSuite:
    """The promises of every schedule store; see amqtask.beat.contract."""

    remembers: ClassVar[bool] = True

    def open(self) -> ScheduleStore:
        """The store, opened anew on the same entries; the suite closes it."""
        raise NotImplementedError

    def put(self, name: str, seconds: float, *, enabled: bool = True) -> None:
        """Have an entry of that name run the task `tasks.tick` every so many seconds, as its users would."""
        raise NotImplementedError

    def remove(self, name: str) -> None:
        """Take an entry away, as its users would."""
        raise NotImplementedError

    @pytest.fixture
    def store(self) -> Iterator[ScheduleStore]:
        """A store with one entry, every ten seconds."""
        self.put("ten", 10)
        opened = self.open()
        yield opened
        opened.close()

    def entries(self, store: ScheduleStore) -> dict[str, Entry]:
        """The store's entries by name, without disabled ones, which some stores leave out."""
        entries = list(store.entries())
        assert len({entry.name for entry in entries}) == len(entries), "two entries of one name"
        return {entry.name: entry for entry in entries if entry.enabled}

    def test_an_entry_is_told_as_it_is(self, store: ScheduleStore) -> None:
        entry = self.entries(store)["ten"]
        assert entry.task == "tasks.tick"
        assert entry.schedule.next_due(NOON, timezone.utc) == NOON + timedelta(seconds=10)
        assert entry.last_due_at is None
        assert entry.total_run_count == 0
        assert not entry.one_off

    def test_a_disabled_entry_is_not_sent(self, store: ScheduleStore) -> None:
        self.put("off", 10, enabled=False)
        scheduler = Scheduler(timezone.utc)
        scheduler.update(store.entries(), NOON)
        assert scheduler.next_of("off") is None
        assert scheduler.next_of("ten") is not None

    def test_nothing_has_changed_after_the_entries_were_told(self, store: ScheduleStore) -> None:
        list(store.entries())
        assert not store.has_changed()

    def test_what_is_added_changed_and_removed_is_seen_once(self, store: ScheduleStore) -> None:
        list(store.entries())
        self.put("five", 5)
        assert store.has_changed()
        assert set(self.entries(store)) == {"ten", "five"}
        assert not store.has_changed()
        self.put("five", 6)
        assert store.has_changed()
        assert self.entries(store)["five"].schedule.next_due(NOON, timezone.utc) == NOON + timedelta(seconds=6)
        self.remove("five")
        assert store.has_changed()
        assert set(self.entries(store)) == {"ten"}
        assert not store.has_changed()

    def test_a_run_is_remembered_and_is_no_change(self, store: ScheduleStore) -> None:
        list(store.entries())
        store.record([_run("ten", 1), _run("ten", 2, NOON + timedelta(seconds=10))])
        assert not store.has_changed()
        entry = self.entries(store)["ten"]
        assert entry.last_due_at == NOON + timedelta(seconds=10)
        assert entry.last_run_at == NOON + timedelta(seconds=11)
        assert entry.total_run_count == 2

    def test_a_run_may_be_told_twice(self, store: ScheduleStore) -> None:
        list(store.entries())
        for _ in range(2):
            store.record([_run("ten", 1)])
        assert self.entries(store)["ten"].total_run_count == 1

    def test_a_run_of_an_entry_that_is_gone_does_no_harm(self, store: ScheduleStore) -> None:
        list(store.entries())
        store.record([_run("gone", 1), _run("ten", 1)])
        assert self.entries(store)["ten"].total_run_count == 1
        assert set(self.entries(store)) == {"ten"}

    def test_a_run_is_known_to_who_opens_the_store_later(self, store: ScheduleStore) -> None:
        if not self.remembers:
            pytest.skip("this store forgets with its process")
        list(store.entries())
        store.record([_run("ten", 1)])
        later = self.open()
        try:
            assert self.entries(later)["ten"].last_due_at == NOON
        finally:
            later.close()

    def test_it_may_be_asked_often_enough(self, store: ScheduleStore) -> None:
        assert 0 < store.poll_seconds <= 60
