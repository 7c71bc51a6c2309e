"""Every task runs at least once, whatever breaks (see integration.soak for the faults)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from integration.nodes import RabbitNode
from integration.soak import FAULTS, Soak


@pytest.fixture(scope="module")
def own_node() -> Iterator[RabbitNode]:
    """A node that these tests may hurt."""
    node = RabbitNode("soak")
    try:
        yield node.start()
    finally:
        node.remove()


@pytest.mark.slow
@pytest.mark.timeout(420)
@pytest.mark.parametrize("fault", list(FAULTS))
def test_every_task_runs_at_least_once(own_node: RabbitNode, fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = Soak(own_node).run(fault, FAULTS[fault])

    with capsys.disabled():
        print(f"\n{report}")
    assert report.lost == 0
    assert report.dead == 0
