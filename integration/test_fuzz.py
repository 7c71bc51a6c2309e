"""The short form of `make fuzz`: hostile messages to a live worker on each pool."""

from __future__ import annotations

import pytest

from integration.fuzz.corpus import Hostile, corpus
from integration.fuzz.run import Fuzzing
from integration.nodes import RabbitNode

SEED, MESSAGES = 7, 120


@pytest.fixture(scope="module")
def messages() -> list[Hostile]:
    """The same for all pools."""
    return corpus(SEED, MESSAGES)


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo", "eventlet", "gevent", "asyncio"])
def test_whatever_arrives_only_that_message_is_affected(
    hurt_node: RabbitNode, messages: list[Hostile], pool: str
) -> None:
    report = Fuzzing(hurt_node, pool, messages, seed=SEED).run()

    assert report.failures == []
