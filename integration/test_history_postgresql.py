"""The index in PostgreSQL: all that its tests in SQLite say of it, once more."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from amqtask.history.client import History
from integration.servers import Postgres
from tests.history.test_index import *  # noqa: F403  # all of its tests


@pytest.fixture(scope="module")
def database(postgres_server: Postgres) -> Iterator[str]:
    url = postgres_server.create_database()
    yield url
    postgres_server.drop_database(url)


@pytest.fixture(scope="module")
def opened(database: str) -> Iterator[History]:
    made = History(database)
    yield made
    made.close()


@pytest.fixture  # type: ignore[no-redef]
def history(opened: History) -> History:
    """Empty."""

    def empty(connection: sa.Connection) -> None:
        tables = [name for name in sa.inspect(connection).get_table_names() if name != "amqtask_history_position"]
        connection.execute(sa.text(f"TRUNCATE {', '.join(tables)}"))
        connection.execute(sa.text("UPDATE amqtask_history_position SET position = -1"))

    opened.index.transact(empty)
    return opened
