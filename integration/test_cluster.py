"""The shortest form of the cluster suite (see integration.cluster for what is counted and held to)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from amqtask import AmqTask
from integration.apps.clustered import QUEUE
from integration.cluster import APP, SHORT, SHORTEST, Suite, World
from integration.nodes import Cluster
from integration.probing import Probe
from integration.workers import WorkerProcess, eventually


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
@pytest.mark.timeout(450)
@pytest.mark.parametrize("scenario", SHORTEST)
def test_nothing_is_lost_or_stuck_on_three_nodes_that_fail(
    suite: Suite, scenario: str, capsys: pytest.CaptureFixture[str]
) -> None:
    row = suite.run(scenario)

    with capsys.disabled():
        print(f"\n{row}")
    assert (row.lost, row.stuck, row.missed) == (0, 0, 0), str(row)


@pytest.mark.slow
@pytest.mark.timeout(450)
def test_results_wait_while_the_node_of_their_queue_restarts_and_their_caller_does_something_else(
    cluster: Cluster, tmp_path: Path
) -> None:
    home, *others = cluster.nodes
    caller = AmqTask("caller", broker=cluster.url, backend="rpc://", task_default_queue=QUEUE)
    numbers = [str(number) for number in range(20)]
    results = [caller.send_task("clustered.note", ("restart", "plain", number)) for number in numbers]
    home.stop()
    environment = {"AMQTASK_BROKER_URL": ";".join(node.url for node in others), "CLUSTER_FOLDER": str(tmp_path)}

    with WorkerProcess(APP, "-P", "threads", "-c", "2", "-Q", QUEUE, environment=environment):
        runs = tmp_path / "runs"
        eventually(lambda: runs.exists() and len(runs.read_text().splitlines()) == 20, what="not all tasks ran")
        home.start()

        assert [result.get(timeout=60) for result in results] == numbers
    caller.close()
    assert len(runs.read_text().splitlines()) == 20
