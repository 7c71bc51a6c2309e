"""A worker whose broker has two hosts, of which one fails; and one whose handshakes fail."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from integration.conftest import Broker
from integration.faults import LOGIN, VIRTUAL_HOST, Forwarder
from integration.test_worker import Held, worker_of
from integration.workers import WorkerProcess, eventually

# A line of a worker's log that is worth reading.
LOUD = re.compile(r"\[[^\]]*: (WARNING|ERROR|CRITICAL)/")


@pytest.fixture
def held(rabbit: Broker, tmp_path: Path) -> Iterator[Held]:
    """Tasks that a test holds, sent past the ways."""
    made = Held(rabbit.url, rabbit.queue("hosts"), tmp_path)
    yield made
    made.app.close()


@pytest.fixture
def ways(broker_url: str) -> Iterator[list[Forwarder]]:
    """Two hosts that lead to one broker."""
    with ExitStack() as stack:
        yield [stack.enter_context(Forwarder(broker_url)) for _ in range(2)]


def worker_over(ways: list[Forwarder], held: Held, *options: str) -> WorkerProcess:
    return worker_of(held, "-c", "2", *options, AMQTASK_BROKER_URL=";".join(way.url for way in ways))


@pytest.mark.parametrize("said", [LOGIN, VIRTUAL_HOST], ids=["login", "virtual host"])
def test_connections_lost_in_the_handshake_end_no_worker_and_stop_no_results(
    ways: list[Forwarder], held: Held, said: bytes
) -> None:
    only = ways[:1]
    only[0].ban(said)
    worker = worker_over(only, held).start(wait=False)
    with worker:
        eventually(lambda: only[0].accepted >= 4)  # each of its connections at least once
        only[0].heal()
        assert held.send("note", "a").get(timeout=90) == "a"

        only[0].ban(said)
        only[0].cut()
        accepted = only[0].accepted
        eventually(lambda: only[0].accepted >= accepted + 4)
        only[0].heal()
        assert held.send("note", "b").get(timeout=90) == "b"

        assert worker.stop() == 0
        assert "refused" not in worker.log


def test_a_silent_host_is_left_for_the_next_and_told_in_a_few_lines(
    rabbit: Broker, ways: list[Forwarder], held: Held
) -> None:
    silent = ways[0]
    with worker_over(ways, held) as worker:
        assert held.send("note", "before").get(timeout=90) == "before"
        seen = len(worker.log)

        silent.stall(new_ones=True)
        eventually(
            lambda: worker.log[seen:].count("consuming from") or "Connection to broker lost" in worker.log[seen:]
        )
        eventually(lambda: ways[1].accepted >= 2)  # at least what consumes, and what publishes
        silent.cut()  # now the broker knows that nobody is there
        assert held.send("note", "after").get(timeout=90) == "after"

        loud = [line for line in worker.log[seen:].splitlines() if LOUD.search(line)]
        assert 1 <= len(loud) <= 3, loud
        assert any("the broker has not answered for" in line for line in loud)
        assert worker.stop() == 0


def test_a_worker_that_is_told_to_stop_without_a_broker_stops(ways: list[Forwarder], held: Held) -> None:
    only = ways[:1]
    with worker_over(only, held) as worker:
        held.send("hold", "a")
        held.await_run("a")
        only[0].stall(new_ones=True)
        held.release("a")

        assert worker.stop() == 0, worker.log
