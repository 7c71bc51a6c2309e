"""The stores of one process and of a database do what all stores do."""

from __future__ import annotations

import heapq
import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
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
    is_for_several = False

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


def test_a_table_that_is_gone_is_made_again(tmp_path: Path) -> None:
    with closing(open_flow_store(f"sqlite:///{tmp_path}/flow.sqlite3", {}, 5.0)) as store:
        store.take("amqtask-flow:{t}:unique::x", "id", 60)
        with closing(sqlite3.connect(tmp_path / "flow.sqlite3")) as database:
            database.execute("DROP TABLE amqtask_flow")
        assert store.take("amqtask-flow:{t}:unique::x", "another", 60) is None


def test_an_error_of_a_database_shows_no_statement(tmp_path: Path) -> None:
    path = tmp_path / "flow.sqlite3"
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE amqtask_flow (scope, name, value, until)")
    store = open_flow_store(f"sqlite:///file:{path}?mode=ro&uri=true", {}, 5.0)
    with closing(store), pytest.raises(FlowStoreUnreachable, match=r"write a readonly database\. Is it running"):
        store.take("amqtask-flow:{t}:unique::x", "id", 60)


class Backlog:
    """A simulation: a backlog asks when it is told to, and what waits comes up to 10 ms late. `lengths` are the runs' seconds."""

    def __init__(self, places: int, lengths: list[float]) -> None:
        self.now = 0.0
        self.store = MemoryStore(lambda: self.now)
        self.bound = Bound("x", "concurrency", places=places)
        self.lengths = lengths
        self.questions = self.most = 0
        # Seconds in places that were taken, and in those that could have been.
        self.used = self.usable = 0.0

    def work_off(self) -> None:
        """One comes each millisecond."""
        chance = random.Random(1)
        coming = len(self.lengths)
        events = [(number / 1000, 1, number, dict[str, int]()) for number in range(coming)]
        running = waiting = 0
        while events:
            at, asks, number, tickets = heapq.heappop(events)
            self.used += running * (at - self.now)
            self.usable += min(self.bound.places, running + waiting) * (at - self.now)
            self.now = at
            entry = _entry(number, self.bound)._replace(tickets=tickets)
            if not asks:
                running -= 1
                self.store.leave(entry, self.lengths[number], "free")
                continue
            self.questions += 1
            verdict = self.store.enter(entry, 1e9)
            waiting += (verdict != RUN) - bool(tickets)
            if verdict == RUN:
                running += 1
                self.most = max(self.most, running)
                heapq.heappush(events, (at + self.lengths[number], 0, number, tickets))
            else:
                late = verdict.seconds + chance.random() / 100
                heapq.heappush(events, (at + late, 1, number, dict(verdict.tickets)))


@pytest.mark.parametrize("places", [1, 4, 20])
@pytest.mark.parametrize("seconds", [0.1, 2.0, 60.0])
@pytest.mark.parametrize("spread", ["the same", "random", "a few long ones"])
def test_the_places_are_used_while_somebody_waits(places: int, seconds: float, spread: str) -> None:
    chance, count = random.Random(places), 600
    makes: dict[str, Callable[[], float]] = {
        "the same": lambda: seconds,
        "random": lambda: chance.expovariate(1 / seconds),
        "a few long ones": lambda: seconds * chance.choice([0.2, 0.2, 0.2, 0.2, 4.2]),
    }
    backlog = Backlog(places, [makes[spread]() for _ in range(count)])

    backlog.work_off()

    told = f"{backlog.used / backlog.usable:.3f} of the places, {backlog.questions / count:.1f} questions a run"
    assert backlog.most == places
    assert backlog.used / backlog.usable > (0.9 if seconds < 1 else 0.95), told
    assert backlog.questions / count < (50 if places == 1 else 20), told


@pytest.mark.parametrize(
    ("rate", "burst", "used"),
    [(160, 160, 0.99), (20, 20, 0.99), (160, 1, 0.72), (40, 1, 0.84), (20, 1, 0.9), (5, 1, 0.95)],
)
def test_a_rate_is_used_while_somebody_waits(rate: int, burst: int, used: float) -> None:
    now, count, questions, chance = 0.0, 5 * rate + burst + 50, 0, random.Random(1)
    store, bound = MemoryStore(lambda: now), Bound("x", "rate", interval=1 / rate, burst=burst)
    asks = [(number / 1000, number, dict[str, int]()) for number in range(count)]
    begun: list[tuple[float, int]] = []
    while asks:
        now, number, tickets = heapq.heappop(asks)
        questions += 1
        verdict = store.enter(_entry(number, bound)._replace(tickets=tickets), 1e9)
        if verdict == RUN:
            begun.append((now, number))
        else:
            late = verdict.seconds + chance.random() / 100
            heapq.heappush(asks, (now + late, number, dict(verdict.tickets)))

    displaced = sum(abs(number - place) for place, (_, number) in enumerate(begun)) / count
    told = f"{questions / count:.1f} questions a run, {displaced:.1f} places away from its own"
    assert (count - burst) / rate / (begun[-1][0] - begun[0][0]) > used
    assert questions / count < (4 if burst > 1 or rate < 10 else 9), told
    assert displaced < 0.05 * count, told


def test_those_who_wait_for_a_run_that_does_not_end_ask_ever_more_rarely() -> None:
    now, questions = 0.0, 0
    store, bound = MemoryStore(lambda: now), Bound("x", "concurrency", places=1)
    for number in range(40):
        assert store.enter(_entry(number, bound), 1e9) == RUN
        now += 0.05
        store.leave(_entry(number, bound), 0.05, "free")
    assert store.enter(_entry(-1, bound), 1e9) == RUN
    asks = [(now + number / 1000, number, dict[str, int]()) for number in range(1000)]
    end = now + 600
    while asks[0][0] < end:
        now, number, tickets = heapq.heappop(asks)
        questions += 1
        verdict = store.enter(_entry(number, bound)._replace(tickets=tickets), 1e9)
        heapq.heappush(asks, (now + verdict.seconds, number, dict(verdict.tickets)))

    assert questions < 6000


def _entry(number: int, bound: Bound) -> Entry:
    return Entry("s", str(number), f"{number} w 1", None, (bound,))
