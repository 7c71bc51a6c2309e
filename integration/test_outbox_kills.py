"""Committed is sent and rolled back is not, while web process, relays, broker and database are killed (integration.outbox)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from integration.nodes import RabbitNode, rabbitmq_installed
from integration.outbox import SHOPS, broker, database_server, run
from integration.servers import PostgresServer


@pytest.fixture(scope="module")
def own_node() -> Iterator[RabbitNode]:
    """A node that these tests may hurt."""
    if not rabbitmq_installed():
        pytest.skip("rabbitmq-server is not installed")
    with broker() as node:
        yield node


@pytest.fixture(scope="module")
def own_database() -> Iterator[PostgresServer]:
    """A PostgreSQL that these tests may hurt."""
    with database_server() as server:
        yield server


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("shop", list(SHOPS))
def test_what_is_sent_is_what_is_committed(
    own_node: RabbitNode, own_database: PostgresServer, shop: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(shop, own_node, own_database, tasks=100, seed=1)

    with capsys.disabled():
        print(f"\n{report}")
    assert (report.lost, report.rolled_back_sent) == (0, 0)
    assert report.sent == report.committed >= 100
    assert report.known_rollbacks >= 100
    assert report.kills["web"] > 0
    assert report.kills["broker"] > 0
    assert report.kills["database"] > 0
    assert report.kills["relay"] + report.kills["worker"] > 0
