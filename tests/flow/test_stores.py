"""The store of one process does what all stores do."""

from __future__ import annotations

import pytest

from amqtask.flow.contract import RUN, Bound, Entry
from amqtask.flow.memory import MemoryStore
from amqtask.testing.suites.flow import FlowStoreSuite


class TestMemoryStore(FlowStoreSuite):
    @pytest.fixture
    def store(self) -> MemoryStore:
        return MemoryStore()


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
