"""Schedulers in Celery's way, that keep time themselves, run in beat's place."""

from __future__ import annotations

import dbm
import shelve
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner

from amqtask import AmqTask, signals
from amqtask.beat.build import build_beat, find_store
from amqtask.beat.contract import BeatOptions
from amqtask.cli.base import Globals
from amqtask.cli.main import cli
from amqtask.compat.beat import PersistentScheduler, ScheduleEntry, Scheduler, Service
from amqtask.exceptions import ConfigurationError
from amqtask.schedules import crontab, schedule
from amqtask.testing.suites.backend import eventually

OFTEN = {"often": {"task": "t", "schedule": 0.01, "args": (1,), "options": {"queue": "beats"}}}
LONG_AGO = datetime(2000, 1, 1, tzinfo=timezone.utc)


@pytest.fixture
def app() -> Iterator[AmqTask]:
    with AmqTask("beats", broker="memory://", beat_schedule=OFTEN) as made:
        yield made


def sent(app: AmqTask) -> list[Any]:
    assert app.memory_broker is not None
    try:
        return [properties for properties, _ in app.memory_broker.messages("beats")]
    except KeyError:  # nobody has published yet
        return []


@contextmanager
def running(app: AmqTask, **options: Any) -> Iterator[Callable[[], int]]:
    """Beat in a thread; what is yielded waits for its end and returns the exit code."""
    process, codes = build_beat(app, BeatOptions(**options)), []
    thread = threading.Thread(target=lambda: codes.append(process.run(install_signals=False)))
    thread.start()

    def ended() -> int:
        thread.join(60)
        (code,) = codes
        return code

    try:
        yield ended
    finally:
        process.stop()
        thread.join(60)


class Rows(Scheduler):
    """Its entries are in a table of its own."""

    table: ClassVar[dict[str, Any]] = {}
    synced: ClassVar[list[int]] = []
    sync_every = 0

    def setup_schedule(self) -> None:
        self.update_from_dict(
            {"row": {"task": "t", "schedule": 3600, "last_run_at": LONG_AGO, "options": {"queue": "beats"}}}
        )

    def sync(self) -> None:
        Rows.table = {name: entry.total_run_count for name, entry in self.schedule.items()}

    def close(self) -> None:
        super().close()
        Rows.table["closed"] = True


def test_a_scheduler_with_a_store_of_its_own_starts_and_stops_with_beat(app: AmqTask) -> None:
    begun: list[Any] = []

    def note(sender: Any, **_: Any) -> None:
        begun.append(sender.scheduler)

    Rows.table = {}
    signals.beat_init.connect(note)
    try:
        with running(app, scheduler=f"{__name__}:Rows", max_interval=7):
            eventually(lambda: len(sent(app)) == 1)
    finally:
        signals.beat_init.disconnect(note)

    (scheduler,) = begun
    assert isinstance(scheduler, Rows)
    assert (scheduler.max_interval, scheduler.app) == (7, app)
    assert Rows.table == {"row": 1, "closed": True}
    assert sent(app)[0].headers["celery_beat_task"] is True


def test_an_entry_that_cannot_be_sent_is_told_once_in_a_line_until_it_is_sent(
    app: AmqTask, caplog: pytest.LogCaptureFixture
) -> None:
    class Wrong(ScheduleEntry):
        is_sound = False

        @property
        def options(self) -> Any:
            return {"queue": "beats"} if self.is_sound else {"queue": "beats", "priority": "high"}

        @options.setter
        def options(self, _: object) -> None: ...

    scheduler = Scheduler(app, schedule={})
    entry = Wrong(name="wrong", task="t", schedule=60, app=app)
    for is_sound in (False, False, True, False):
        entry.is_sound = is_sound
        scheduler.apply_entry(entry)

    told = [record for record in caplog.records if "cannot be sent" in record.getMessage()]
    assert len(told) == 2
    assert all("priority" in record.getMessage() and record.exc_info is None for record in told)
    assert len(sent(app)) == 1


class Fails(Scheduler):
    def tick(self, *_: Any, **__: Any) -> float:
        raise RuntimeError("the lock is gone")


def test_a_scheduler_that_raises_ends_beat(app: AmqTask, caplog: pytest.LogCaptureFixture) -> None:
    app.conf.beat_scheduler = f"{__name__}:Fails"
    with running(app) as ended:
        assert ended() != 0
    assert "the lock is gone" in caplog.text


def test_one_entry_that_cannot_be_sent_leaves_the_others(app: AmqTask, caplog: pytest.LogCaptureFixture) -> None:
    app.conf.beat_schedule = {**OFTEN, "wrong": {"task": "t", "schedule": 0.01, "options": {"queue": 3}}}
    with running(app, scheduler="amqtask.beat:Scheduler"):
        eventually(lambda: len(sent(app)) > 3 and "wrong" in caplog.text)


def test_a_persistent_scheduler_goes_on_where_it_ended(app: AmqTask, tmp_path: Path) -> None:
    file = str(tmp_path / "runs")
    first: Any = Service(app, schedule_filename=file, scheduler_cls=PersistentScheduler).scheduler
    first.apply_async(first.schedule["often"])
    first.close()

    second: Any = Service(app, schedule_filename=file, scheduler_cls=PersistentScheduler).scheduler
    try:
        assert second.schedule["often"].total_run_count == 1
        app.conf.beat_schedule = {}
        second.merge_inplace(app.conf.beat_schedule)
        assert "often" not in second.schedule
    finally:
        second.close()


def _cut_off(path: Path) -> None:
    path.write_bytes(b"no file of dbm's " * 100)


def _of_a_class_that_is_gone(path: Path) -> None:
    with shelve.open(str(path)) as store:
        store["entries"] = {}
    with dbm.open(str(path), "w") as raw:
        raw[b"entries"] = b"cnowhere.to.be_found\nEntry\n."


@pytest.mark.parametrize("spoil", [_cut_off, _of_a_class_that_is_gone])
def test_a_file_that_cannot_be_read_is_put_aside(app: AmqTask, tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    spoil(tmp_path / "runs")
    before = len(list(tmp_path.iterdir()))

    scheduler: Any = Service(app, schedule_filename=str(tmp_path / "runs"), scheduler_cls=PersistentScheduler).scheduler
    scheduler.close()

    assert list(scheduler.app.conf.beat_schedule) == ["often"]
    assert sum("unreadable" in path.name for path in tmp_path.iterdir()) == before


def test_entries_as_in_celery(app: AmqTask) -> None:
    entry = ScheduleEntry("e", "t", schedule=timedelta(seconds=10), last_run_at=LONG_AGO, args=(1,), app=app)

    assert entry.schedule == schedule(10)
    assert entry.is_due().is_due
    following = next(entry)
    assert (following.total_run_count, following.is_due().is_due) == (1, False)
    assert following == entry != ScheduleEntry("e", "t", schedule=crontab(), app=app)
    following.update(ScheduleEntry("e", "other", schedule=crontab(), app=app))
    assert (following.task, following.total_run_count) == ("other", 1)


def test_listing_a_scheduler_that_keeps_time_itself_is_refused(app: AmqTask) -> None:
    done = CliRunner().invoke(cli, ["beat", "--list", "-S", f"{__name__}:Rows"], obj=Globals(loaded=app))

    assert done.exit_code == 2
    assert "to itself" in done.output


class Foreign:
    """As a class that derives from the scheduler of an installed Celery."""

    def tick(self) -> float:
        return 1.0


def test_a_scheduler_of_another_system_is_told_what_to_derive_from() -> None:
    with pytest.raises(ConfigurationError, match=r"derive from amqtask\.beat\.Scheduler"):
        find_store(f"{__name__}:Foreign")


def test_django_celery_beat_s_scheduler_is_used_where_its_tables_are(monkeypatch: pytest.MonkeyPatch) -> None:
    library = types.ModuleType("django_celery_beat.schedulers")
    library.DatabaseScheduler = Rows  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, "amqtask.contrib.django.models", raising=False)
    for name in ("django_celery_beat", "django_celery_beat.models"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, library.__name__, library)

    assert find_store("django_celery_beat.schedulers:DatabaseScheduler") is Rows
    assert find_store("django") is Rows
