"""The index as a file: a full disk, an older version's file."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from amqtask.history import search
from amqtask.history.client import History
from amqtask.history.index import IndexUnreachable
from tests.history.test_index import call, event


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "index.sqlite3"


@pytest.fixture
def history(file: Path) -> Iterator[History]:
    made = History(f"sqlite:///{file}")
    yield made
    made.close()


def test_a_full_disk_is_named_and_what_did_not_fit_comes_in_when_there_is_room(history: History) -> None:
    def allow(pages: int) -> None:
        history.index.transact(lambda connection: connection.execute(sa.text(f"PRAGMA max_page_count = {pages}")).all())

    history.index.take(call("one"), before=None, now=1)
    many = [told for number in range(2000) for told in call(f"t{number}", number)]
    allow(1)  # as many as there are
    with pytest.raises(IndexUnreachable, match=r"cannot be written: .*full"):
        history.index.take(many, before=1, now=2)

    assert (history.index.position(), [task.id for task in history.find()]) == (1, ["one"])
    allow(10**6)
    history.index.take(many, before=1, now=2)
    assert len(history.find(limit=10_000)) == 2001


def test_a_file_of_an_older_version_gets_what_is_new(history: History, file: Path) -> None:
    history.index.take(call("one", stamps={"tenant": "7"}))
    history.close()
    with sqlite3.connect(file) as older:
        older.execute("DROP INDEX amqtask_history_stamps_by_key")
        older.execute("DROP INDEX amqtask_history_periodic")
        older.execute("ALTER TABLE amqtask_history DROP COLUMN periodic")
        older.execute("ALTER TABLE amqtask_history_workers DROP COLUMN heard_at")
    older.close()

    again = History(f"sqlite:///{file}")
    assert again.workers() == []
    assert [task.periodic for task in again.find(stamp=("tenant", "7"))] == [None]
    again.close()
    with sqlite3.connect(file) as opened:
        names = {row[0] for row in opened.execute("SELECT name FROM sqlite_master WHERE type = 'index'")}
    opened.close()
    assert {"amqtask_history_stamps_by_key", "amqtask_history_periodic"} <= names


def test_a_search_that_takes_too_long_is_given_up(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    history.index.take([event("sent", number, f"t{number}", args="(1,)") for number in range(5000)])
    with monkeypatch.context() as patched:
        patched.setattr(search, "LONGEST_LOOK", 0.0)
        with pytest.raises(IndexUnreachable, match="ask for less"):
            history.count()

    assert history.count() == {"PENDING": 5000}


def test_to_close_what_could_not_be_opened_is_no_error() -> None:
    away = History("sqlite:////nowhere/index.sqlite3")
    with pytest.raises(IndexUnreachable, match="cannot be opened"):
        away.find()
    away.close()
