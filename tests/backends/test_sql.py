"""Results in a SQL database (SQLite in a file) keep the backends' contract, in Celery's tables."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from amqtask import states
from amqtask.backends.contract import BackendOptions, ResultBackend, RetryPolicy
from amqtask.backends.sql import SqlBackend, database_url
from amqtask.exceptions import BackendUnreachable, ConfigurationError
from amqtask.protocol.result import ResultMessage
from amqtask.testing.suites.backend import BackendSuite


class TestSqlite(BackendSuite):
    @pytest.fixture(autouse=True)
    def database(self, tmp_path: Path) -> None:
        self.path = tmp_path / "results.db"

    def make(self) -> ResultBackend:
        return self.with_options()

    def with_options(self, **options: Any) -> SqlBackend:
        return SqlBackend(BackendOptions(url=f"db+sqlite:///{self.path}", **options))

    def make_expiring(self, seconds: float) -> ResultBackend | None:
        return self.with_options(expires=seconds)

    def make_unreachable(self) -> ResultBackend | None:
        self.path = self.path.parent / "no such folder" / "results.db"
        return self.with_options(transport_options=(("retry_for", 0.1),))


def test_what_is_stored_on_the_io_loop_is_given_up_even_with_always_retry(tmp_path: Path) -> None:
    store = SqlBackend(
        BackendOptions(
            url=f"db+sqlite:///{tmp_path}/no such folder/results.db",
            always_retry=RetryPolicy(seconds=None),
            transport_options=(("retry_for", 0.1),),
        )
    )

    with pytest.raises(BackendUnreachable):
        store.store_briefly(ResultMessage("it", states.REVOKED, None))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.db"


def backend(path: Path, **settings: Any) -> SqlBackend:
    return SqlBackend(BackendOptions(url=f"db+sqlite:///{path}", settings=settings))


def rows(path: Path, statement: str) -> list[Any]:
    # The connection's own block commits and does not close.
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        return connection.execute(statement).fetchall()


def test_a_row_is_written_as_celery_writes_it(path: Path) -> None:
    store = backend(path)

    store.store(ResultMessage("it", states.SUCCESS, {"sum": 3}, date_done="2026-01-02T03:04:05.000006+00:00"))

    assert rows(path, "SELECT task_id, status, result, date_done, traceback, children, name FROM celery_taskmeta") == [
        ("it", "SUCCESS", b'{"sum": 3}', "2026-01-02 03:04:05.000006", None, None, None)
    ]
    store.close()


def test_tables_have_the_names_that_settings_give_them(path: Path) -> None:
    store = backend(path, database_table_names={"task": "my_results", "group": "my_groups"})

    store.store(ResultMessage("it", states.SUCCESS, 1))
    store.save_group("group", [])

    assert rows(path, "SELECT count(*) FROM my_results") == [(1,)]
    assert rows(path, "SELECT count(*) FROM my_groups") == [(1,)]
    store.close()


def test_tables_are_not_made_when_settings_say_so(path: Path) -> None:
    store = backend(path, database_create_tables_at_setup=False)

    with pytest.raises(BackendUnreachable, match="celery_taskmeta"):
        store.store(ResultMessage("it", states.SUCCESS, 1))
    store.close()


def test_a_table_of_an_older_celery_is_used_without_the_columns_that_it_lacks(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "CREATE TABLE celery_taskmeta (id INTEGER PRIMARY KEY, task_id VARCHAR(155) UNIQUE, status VARCHAR(50),"
            " result BLOB, date_done DATETIME, traceback TEXT)"
        )
    store = backend(path)

    store.store(ResultMessage("it", states.SUCCESS, 1, children=[[["child", None], None]], extra={"name": "add"}))

    found = store.find("it")
    assert found is not None
    assert (found.result, found.children, found.extra) == (1, [], {})
    assert "has no columns" in caplog.text
    store.close()


def test_a_value_that_is_no_result_is_told_to_who_asks_for_it(path: Path) -> None:
    store = backend(path)
    store.store(ResultMessage("it", states.SUCCESS, 1))
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE celery_taskmeta SET result = x'80048c'")

    found = store.find("it")

    assert found is not None
    assert (found.status, found.result["exc_type"]) == (states.FAILURE, "Undecodable")
    assert "pickled: by a Celery before 5.7" in found.result["exc_message"][0]
    store.close()


def test_engine_options_and_callback_are_applied(path: Path) -> None:
    made: list[sa.Engine] = []
    options = {"echo_pool": True, "pool_recycle": 60}
    store = backend(path, database_engine_options=options, database_engine_callback=made.append)

    store.store(ResultMessage("it", states.SUCCESS, 1))

    assert len(made) == 1
    assert made[0].pool.echo is True
    assert made[0].pool._recycle == 60
    assert made[0].pool._pre_ping is True, "what they do not mention stays as it is"
    store.close()


def test_short_lived_sessions_leave_no_connection_open(path: Path) -> None:
    made: list[sa.Engine] = []
    store = backend(path, database_short_lived_sessions=True, database_engine_callback=made.append)

    store.store(ResultMessage("it", states.SUCCESS, 1))

    assert isinstance(made[0].pool, sa.pool.NullPool)
    store.close()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("db+sqlite://", "one connection only"),
        ("db+sqlite:///:memory:", "one connection only"),
        ("db+nonsense", "not a database URL"),
        ("db+mysql://localhost/results", "pip install one of mysqldb"),
        ("db+mysql+nosuchdriver://localhost/results", "not installed"),
        ("db+postgresql+asyncpg://localhost/results", "for asyncio only"),
        ("db+nosuchdatabase://localhost/results", "not installed"),
    ],
)
def test_a_url_that_cannot_work_is_an_error_that_says_why(url: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        SqlBackend(BackendOptions(url=url))


def test_a_driver_that_is_installed_is_found() -> None:
    assert database_url("db+postgresql://localhost/results").drivername == "postgresql+psycopg"


def test_an_engine_callback_that_is_not_there_is_an_error(path: Path) -> None:
    store = backend(path, database_engine_callback="nowhere.to.be.found")

    with pytest.raises(ConfigurationError, match="nowhere"):
        store.find("it")


def test_a_row_that_cannot_be_read_is_a_failure_that_says_so(path: Path) -> None:
    store = backend(path)
    store.store(ResultMessage("it", states.SUCCESS, 1))
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE celery_taskmeta SET result = ?", (b"{not json",))
        connection.commit()

    (found,) = store.read(["it"])

    assert found.status == states.FAILURE
    assert "not valid application/json" in str(found.result)
    store.close()
