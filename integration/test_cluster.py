"""The shortest form of the cluster suite (see integration.cluster for what is counted and held to)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from integration.cluster import SHORT, SHORTEST, Suite, World
from integration.nodes import Cluster
from integration.probing import Probe


@pytest.fixture(scope="module")
def suite(three_nodes: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    """Workers and beats on three nodes, and somebody who watches them."""
    world = World(three_nodes, tmp_path_factory.mktemp("cluster"), SHORT)
    with Probe(three_nodes.urls) as probe:
        try:
            yield Suite(world, probe)
        finally:
            world.stop()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("scenario", SHORTEST)
def test_nothing_is_lost_or_stuck_on_three_nodes_that_fail(
    suite: Suite, scenario: str, capsys: pytest.CaptureFixture[str]
) -> None:
    row = suite.run(scenario)

    with capsys.disabled():
        print(f"\n{row}")
    assert (row.lost, row.stuck, row.missed) == (0, 0, 0), str(row)
