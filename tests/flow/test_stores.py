"""The stores of one process and of a database do what all stores do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from amqtask.client.flow_store import open_flow_store
from amqtask.exceptions import ConfigurationError, FlowStoreUnreachable
from amqtask.flow.contract import RUN, Bound, Entry, FlowStore
from amqtask.flow.memory import MemoryStore
from amqtask.testing.suites.flow import FlowStoreSuite


class TestMemoryStore(FlowStoreSuite):
    @pytest.fixture
    def store(self) -> MemoryStore:
        return MemoryStore()


class TestSqlStore(FlowStoreSuite):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[FlowStore]:
        made = open_flow_store(f"sqlite:///{tmp_path}/flow.sqlite3", {}, 5.0)
        yield made
        made.close()


def test_a_database_that_cannot_be_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="sqlite:// and memory://"):
        open_flow_store("mysql://host/db", {}, 5.0)
    with pytest.raises(ConfigurationError, match="flow_store cannot be used"):
        open_flow_store("sqlite+nothing://", {}, 5.0)
    store = open_flow_store(f"sqlite:///{tmp_path}/nowhere/flow.sqlite3", {}, 5.0)
    with pytest.raises(FlowStoreUnreachable, match="is flow_store right"):
        store.take("amqtask-flow:{t}:unique::x", "id", 1)


@pytest.mark.parametrize("places", [1, 4])
@pytest.mark.parametrize("seconds", [0.05, 2.0, 60.0])
def test_the_places_are_used_while_somebody_waits(places: int, seconds: float) -> None:
    """A simulation: a backlog asks when it is told to; runs take `seconds` each."""
    now = 0.0
    store = MemoryStore(lambda: now)
    bound = Bound("x", "concurrency", places=places)
    count = 300
    asks: list[tuple[float, int, dict[str, int]]] = [(number / 1000, number, {}) for number in range(count)]
    ends: list[tuple[float, int]] = []
    questions = most = 0
    while asks or ends:
        asks.sort(key=lambda ask: ask[:2])
        ends.sort()
        if ends and (not asks or ends[0][0] <= asks[0][0]):
            now, number = ends.pop(0)
            store.leave(_entry(number, bound), seconds, "free")
            continue
        now, number, tickets = asks.pop(0)
        questions += 1
        verdict = store.enter(_entry(number, bound)._replace(tickets=tickets), 1e9)
        if verdict == RUN:
            ends.append((now + seconds, number))
            most = max(most, len(ends))
        else:
            asks.append((now + verdict.seconds, number, dict(verdict.tickets)))

    used = count * seconds / (places * now)
    assert most == places
    assert used > (0.9 if seconds >= 2 else 0.3), f"{used:.3f} of the places, {questions / count:.1f} questions a run"
    assert questions / count < (60 if places == 1 else 20), (
        f"{questions / count:.1f} questions a run, {used:.3f} of the places"
    )


def _entry(number: int, bound: Bound) -> Entry:
    return Entry("s", str(number), f"{number} w 1", None, (bound,))
