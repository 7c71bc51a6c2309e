"""Every result store with a server of its own keeps one contract on that server.

`rpc://` has its turn in test_backends.py; files, SQLite and the process's own memory need no server (tests/backends). What
happens while servers come and go is in test_stores_faults.py, what Celery makes of our results in test_stores_celery.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from amqtask.backends.contract import BackendOptions, ResultBackend
from amqtask.backends.registry import open_backend
from amqtask.testing.suites.backend import BackendSuite, in_a_child
from integration.nodes import free_port
from integration.servers import Postgres, Sentinel

# -- each store: its URL, and what its options are


class StoreSuite(BackendSuite):
    """A store by URL; `settings` and `transport_options` as in an application."""

    url: str
    settings: dict[str, Any]
    transport_options: dict[str, Any]

    @pytest.fixture(autouse=True)
    def no_options(self) -> None:
        self.settings, self.transport_options = {}, {}

    def unreachable_url(self) -> str:
        """The same kind of URL, with the password `secret`, where nothing listens."""
        raise NotImplementedError

    def opened(self, url: str, **options: Any) -> ResultBackend:
        given = {"transport_options": tuple(self.transport_options.items()), "settings": self.settings, **options}
        made = open_backend(url, BackendOptions(url=url, **{"connect_timeout": 30.0, **given}))
        assert made is not None
        return made

    def make(self) -> ResultBackend:
        return self.opened(self.url)

    def make_expiring(self, seconds: float) -> ResultBackend | None:
        return self.opened(self.url, expires=seconds)

    def make_unreachable(self) -> ResultBackend | None:
        self.transport_options["retry_for"] = 0.1
        return self.opened(self.unreachable_url(), connect_timeout=2.0)


@pytest.fixture(scope="module")
def results_database(postgres_server: Postgres) -> Iterator[str]:
    """One database for all tests here: task ids are new each time."""
    url = postgres_server.create_database()
    yield url
    postgres_server.drop_database(url)


class TestPostgres(StoreSuite):
    @pytest.fixture(autouse=True)
    def database(self, results_database: str) -> None:
        self.url = f"db+{results_database}"

    def unreachable_url(self) -> str:
        return f"db+postgresql://user:secret@127.0.0.1:{free_port()}/results"


class TestRedis(StoreSuite):
    @pytest.fixture(autouse=True)
    def server(self, redis_url: str) -> None:
        self.url = redis_url

    def unreachable_url(self) -> str:
        return f"redis://:secret@127.0.0.1:{free_port()}/0"


class TestMemcached(StoreSuite):
    @pytest.fixture(autouse=True)
    def server(self, memcached_address: str) -> None:
        self.url = f"cache+memcached://{memcached_address}/"

    def unreachable_url(self) -> str:
        return f"cache+memcached://user:secret@127.0.0.1:{free_port()}"


class TestMongo(StoreSuite):
    @pytest.fixture(autouse=True)
    def server(self, mongodb_url: str) -> None:
        self.url = mongodb_url

    def unreachable_url(self) -> str:
        return f"mongodb://user:secret@127.0.0.1:{free_port()}/results"


class TestSentinel(StoreSuite):
    @pytest.fixture(autouse=True)
    def server(self, no_options: None, sentinel: Sentinel) -> None:
        # The first of two sentinels is never there.
        self.url = f"sentinel://127.0.0.1:{free_port()}/2;{sentinel.url}"
        self.transport_options["master_name"] = sentinel.master_name

    def unreachable_url(self) -> str:
        return f"sentinel://:secret@127.0.0.1:{free_port()}/0"


class TestCluster(StoreSuite):
    @pytest.fixture(autouse=True)
    def server(self, redis_cluster_url: str) -> None:
        self.url = redis_cluster_url.replace("redis:", "redis+cluster:")

    def unreachable_url(self) -> str:
        return f"redis+cluster://:secret@127.0.0.1:{free_port()}"

    # What redis-py was learning of the cluster when it was cancelled it leaves to the collector, which complains of it in some
    # later test: so these are for a child process, which ends without collecting.

    def test_awaiting_may_end_at_any_moment(self, backend: ResultBackend) -> None:
        assert in_a_child(lambda: BackendSuite.test_awaiting_may_end_at_any_moment(self, backend)) == 0

    def test_awaiting_ends_at_the_timeout_and_leaves_nothing_behind(self, backend: ResultBackend) -> None:
        test = BackendSuite.test_awaiting_ends_at_the_timeout_and_leaves_nothing_behind
        assert in_a_child(lambda: test(self, backend)) == 0

    def test_awaiting_leaves_nothing_behind_however_it_is_cancelled(self, backend: ResultBackend) -> None:
        test = BackendSuite.test_awaiting_leaves_nothing_behind_however_it_is_cancelled
        assert in_a_child(lambda: test(self, backend)) == 0

    def test_awaiting_a_chain_or_a_group_leaves_nothing_behind(self, backend: ResultBackend) -> None:
        assert (
            in_a_child(lambda: BackendSuite.test_awaiting_a_chain_or_a_group_leaves_nothing_behind(self, backend)) == 0
        )
