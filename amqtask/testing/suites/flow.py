"""What every store of locks and places does; subclass it and give it a `store` fixture, empty, with names of its own."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from amqtask.flow.contract import (
    CLOSED,
    HALF_OPEN,
    OPEN,
    RUN,
    Bound,
    Entry,
    FlowStore,
    Guard,
    Lock,
    Override,
    Verdict,
)

LEASE = 30.0


class FlowStoreSuite:
    """For the store of the fixture `store`."""

    # Whether one question may be for several runs.
    is_for_several = True

    @pytest.fixture
    def scope(self) -> str:
        """What the keys of one test have in common."""
        return f"amqtask-flow:{{{uuid.uuid4()}}}"

    @pytest.fixture
    def places(self, scope: str) -> Bound:
        """Two places."""
        return Bound(f"{scope}:concurrency::x", "concurrency", places=2)

    def entry(self, scope: str, task_id: str, *bounds: Bound, lock: Lock | None = None, **more: Any) -> Entry:
        """The run of a call."""
        return Entry(scope, task_id, f"{task_id} w {more.pop('run', 1)}", lock, bounds, **more)

    # -- locks

    def test_one_call_has_a_key_until_it_is_given_back(self, store: FlowStore, scope: str) -> None:
        key = f"{scope}:unique::x"

        assert store.take(key, "first", 60) is None
        assert store.take(key, "first", 60) is None
        assert store.take(key, "second", 60) == "first"
        store.free(key, "second")
        assert store.take(key, "second", 60) == "first"
        store.free(key, "first")
        assert store.take(key, "second", 60) is None

    def test_a_call_that_waits_is_replaced_one_that_runs_is_not(self, store: FlowStore, scope: str) -> None:
        lock = Lock(f"{scope}:unique::x", 60, "end")

        assert store.take(lock.key, "first", 60) is None
        assert store.take(lock.key, "second", 60, replaces=True) is None
        assert store.enter(self.entry(scope, "first", lock=lock), LEASE).other == "second"
        assert store.enter(self.entry(scope, "second", lock=lock), LEASE) == RUN
        assert store.take(lock.key, "third", 60, replaces=True) == "second"

    def test_a_key_that_was_not_confirmed_is_free_soon(self, store: FlowStore, scope: str) -> None:
        kept, lost = f"{scope}:unique::kept", f"{scope}:unique::lost"

        assert store.take(kept, "first", 0.5) is None
        store.confirm(kept, "first", 60)
        assert store.take(lost, "first", 0.5) is None
        while store.take(lost, "second", 60) is not None:
            pass
        assert store.take(kept, "second", 60) == "first"

    @pytest.mark.parametrize("until", ["success", "end"])
    def test_a_run_keeps_the_key_of_its_call(self, store: FlowStore, scope: str, until: str) -> None:
        lock = Lock(f"{scope}:unique::x", 60, until)
        entry = self.entry(scope, "first", lock=lock)

        assert store.enter(entry, LEASE) == RUN  # its sender knew nothing of the key
        assert store.enter(self.entry(scope, "second", lock=lock), LEASE).other == "first"
        store.renew(scope, [entry.holder], LEASE)
        store.leave(entry, 0.1, "wait")
        assert store.enter(self.entry(scope, "second", lock=lock), LEASE).other == "first"
        assert store.enter(self.entry(scope, "first", lock=lock, run=2), LEASE) == RUN
        store.leave(self.entry(scope, "first", lock=lock, run=2), 0.1, "free")
        assert store.enter(self.entry(scope, "second", lock=lock), LEASE) == RUN

    def test_a_key_that_ends_with_the_start_is_free_then(self, store: FlowStore, scope: str) -> None:
        lock = Lock(f"{scope}:unique::x", 60, "started")

        assert store.take(lock.key, "first", 60) is None
        assert store.enter(self.entry(scope, "first", lock=lock), LEASE) == RUN
        assert store.take(lock.key, "second", 60) is None
        assert store.enter(self.entry(scope, "first", lock=lock, run=2), LEASE) == RUN
        assert store.take(lock.key, "third", 60) == "second"

    def test_a_key_for_a_time_stays_whatever_becomes_of_its_call(self, store: FlowStore, scope: str) -> None:
        lock = Lock(f"{scope}:unique::x", 60, "ttl")
        entry = self.entry(scope, "first", lock=lock)

        assert store.enter(entry, LEASE) == RUN
        store.leave(entry, 0.1, "free")
        assert store.enter(self.entry(scope, "second", lock=lock), LEASE).other == "first"
        taken = lock._replace(is_taken=True)
        assert store.enter(self.entry(scope, "second", lock=taken), LEASE) == RUN

    # -- places

    def test_there_are_so_many_places_and_no_more(self, store: FlowStore, scope: str, places: Bound) -> None:
        runs = [self.entry(scope, str(number), places) for number in range(3)]

        assert [store.enter(run, LEASE) for run in runs[:2]] == [RUN, RUN]
        refused = store.enter(runs[2], LEASE)
        assert refused.seconds > 0
        assert refused.reason == "concurrency"
        store.leave(runs[0], 0.01, "free")
        assert store.enter(runs[2]._replace(tickets=refused.tickets), LEASE) == RUN

    def test_a_question_that_is_asked_twice_takes_one_place(self, store: FlowStore, scope: str, places: Bound) -> None:
        one = places._replace(places=1)

        assert store.enter(self.entry(scope, "a", one), LEASE) == RUN
        assert store.enter(self.entry(scope, "a", one), LEASE) == RUN

    def test_the_place_of_a_run_that_is_gone_ends_with_its_lease(
        self, store: FlowStore, scope: str, places: Bound
    ) -> None:
        one = places._replace(places=1)
        gone, alive = self.entry(scope, "gone", one), self.entry(scope, "alive", one, tickets={"concurrency": 0})

        assert store.enter(gone, 0.1) == RUN
        while store.enter(alive, 60) != RUN:
            pass
        store.leave(gone, 1, "free")  # it comes back too late
        assert store.enter(self.entry(scope, "other", one), LEASE).seconds > 0

    def test_a_renewed_lease_keeps_its_place(self, store: FlowStore, scope: str, places: Bound) -> None:
        one = places._replace(places=1)
        kept, probe = self.entry(scope, "kept", one), self.entry(scope, "probe", one._replace(key=f"{one.key}2"))

        assert store.enter(kept, 0.2) == RUN
        assert store.enter(probe, 0.2) == RUN
        store.renew(scope, [kept.holder, "unknown"], 60)
        while store.enter(self.entry(scope, "next", probe.bounds[0], tickets={"concurrency": 0}), LEASE) != RUN:
            pass
        assert store.enter(self.entry(scope, "other", one, tickets={"concurrency": 0}), LEASE).seconds > 0

    def test_all_limits_let_it_in_or_none_does(self, store: FlowStore, scope: str, places: Bound) -> None:
        tenant = Bound(f"{scope}:concurrency:tenant:x", "concurrency by tenant", places=1)

        assert store.enter(self.entry(scope, "a", tenant), LEASE) == RUN
        assert store.enter(self.entry(scope, "b", places, tenant), LEASE).reason == "concurrency by tenant"
        assert store.enter(self.entry(scope, "c", places), LEASE) == RUN
        assert store.enter(self.entry(scope, "d", places), LEASE) == RUN

    def test_one_question_is_for_several_runs_where_nobody_waits(
        self, store: FlowStore, scope: str, places: Bound
    ) -> None:
        one, several = places._replace(places=1), 5 if self.is_for_several else 1
        first, waits, other = (self.entry(scope, name, one) for name in ("first", "waits", "other"))

        assert store.enter(first, LEASE, 5).runs == several
        assert store.enter(waits, LEASE, 5).seconds > 0
        store.leave(first, 0.01, "free", runs=several)
        assert store.enter(other, LEASE, 5) == RUN  # one of them waits
        store.leave(other, 0.01, "free")
        assert store.enter(waits._replace(tickets={"concurrency": 1}), LEASE) == RUN

    def test_of_a_rate_one_question_is_for_those_that_may_begin_now(self, store: FlowStore, scope: str) -> None:
        rate = Bound(f"{scope}:rate::x", "rate", interval=1000.0, burst=41)

        runs: list[int] = []
        while not (verdict := store.enter(self.entry(scope, str(len(runs)), rate), LEASE, 5)).seconds:
            runs.append(verdict.runs)
        assert sum(runs) == 41
        assert (runs[0], runs[-1]) == ((5 if self.is_for_several else 1), 1)

    # -- operators

    def test_an_operators_number_holds_at_once_and_until_it_is_reset(
        self, store: FlowStore, scope: str, places: Bound
    ) -> None:
        runs = [self.entry(scope, str(number), places, tickets={"concurrency": 0}) for number in range(4)]

        assert store.set_limit(scope, places.label, Override("1", "ann", 1.5, places=1)) is False
        assert [store.enter(run, LEASE).reason for run in runs[:2]] == ["", "concurrency"]
        assert store.set_limit(scope, places.label, Override("3", "bob", 2.5, places=3)) is True
        assert [store.enter(run, LEASE).reason for run in runs[1:]] == ["", "", "concurrency"]
        store.leave(runs[0], 0.1, "free")
        assert store.set_limit(scope, places.label, None) is True
        assert store.enter(runs[3], LEASE).reason == "concurrency"
        assert store.set_limit(scope, places.label, None) is False

    def test_an_operators_rate_holds_at_once(self, store: FlowStore, scope: str) -> None:
        rate = Bound(f"{scope}:rate::x", "rate", interval=1000.0, burst=1)

        assert store.set_limit(scope, "rate", Override("3/s", "ann", 1.5, interval=1000.0, burst=3)) is False
        entered = [store.enter(self.entry(scope, str(number), rate), LEASE) for number in range(4)]
        assert entered[:3] == [RUN] * 3
        assert entered[3].reason == "rate"

    def test_a_slow_rate_holds_no_longer_than_it_is_set(self, store: FlowStore, scope: str) -> None:
        rate = Bound(f"{scope}:rate::x", "rate", interval=0.05, burst=1)

        store.set_limit(scope, "rate", Override("1/d", "ann", 1.5, interval=86_400.0, burst=1))
        assert store.enter(self.entry(scope, "a", rate), LEASE) == RUN
        store.set_limit(scope, "rate", None)
        while store.enter(self.entry(scope, "b", rate, tickets={"rate": 0}), LEASE) != RUN:
            pass

    def test_a_look_says_what_is_set_runs_and_waits(self, store: FlowStore, scope: str, places: Bound) -> None:
        one = Bound(f"{scope}:concurrency:tenant:x", "concurrency by tenant", places=1, text="acmé")
        override = Override("1", "ann", 1.5, places=1)
        store.set_limit(scope, one.label, override)
        for number in range(3):
            store.enter(self.entry(scope, str(number), places, one), LEASE)

        overrides, uses = store.look(scope, ["concurrency", one.label, "rate"])

        assert overrides == {one.label: override}
        assert [tuple(use) for use in uses["concurrency"]] == [("", 1, 0)]
        assert [tuple(use) for use in uses[one.label]] == [("acmé", 1, 2)]
        assert not uses["rate"]

    # -- rates

    def test_a_rate_lets_a_burst_in_and_then_one_after_the_other(self, store: FlowStore, scope: str) -> None:
        rate = Bound(f"{scope}:rate::x", "rate", interval=1000.0, burst=3)

        entered = [store.enter(self.entry(scope, str(number), rate), LEASE) for number in range(4)]

        assert entered[:3] == [RUN] * 3
        assert 0 < entered[3].seconds <= 600

    def test_a_rate_lets_the_next_in_when_its_time_has_come(self, store: FlowStore, scope: str) -> None:
        rate = Bound(f"{scope}:rate::x", "rate", interval=0.05, burst=1)

        assert store.enter(self.entry(scope, "a", rate), LEASE) == RUN
        while store.enter(self.entry(scope, "b", rate, tickets={"rate": 0}), LEASE) != RUN:
            pass

    def test_those_who_come_later_come_back_later(self, store: FlowStore, scope: str) -> None:
        rate = Bound(f"{scope}:rate::x", "rate", interval=2.0, burst=1)

        waits = [store.enter(self.entry(scope, str(number), rate), LEASE).seconds for number in range(6)]

        assert waits[0] == 0
        assert waits[1:] == sorted(waits[1:])
        assert waits[5] - waits[1] > 4 * 2.0 * 0.7

    # -- breakers

    @pytest.fixture
    def guard(self, scope: str) -> Guard:
        """A breaker that opens with the second failure, for a moment."""
        return Guard(f"{scope}:breaker", failures=2, seconds=60, pause=0.1)

    def ends(self, store: FlowStore, entry: Entry, ended: str) -> str:
        """A run that is let in, and ends so; what its breaker becomes."""
        assert store.enter(entry, LEASE) == RUN
        return store.leave(entry, 0.1, "free", ended)

    def opened(self, store: FlowStore, scope: str, guard: Guard) -> None:
        """Two runs fail."""
        assert self.ends(store, self.entry(scope, "first", guard=guard), "failure") == ""
        assert self.ends(store, self.entry(scope, "second", guard=guard), "failure") == OPEN

    def tries(self, store: FlowStore, entry: Entry, lease: float = LEASE) -> Verdict:
        """The answer to a call that asks until it is let in."""
        while (verdict := store.enter(entry, lease)).seconds:
            assert verdict.reason == "its breaker is open"
        return verdict

    def test_a_breaker_opens_after_so_many_failures(self, store: FlowStore, scope: str, guard: Guard) -> None:
        guard = guard._replace(pause=60)

        assert self.ends(store, self.entry(scope, "good", guard=guard), "success") == ""
        self.opened(store, scope, guard)
        verdict = store.enter(self.entry(scope, "third", guard=guard), LEASE)

        assert 50 < verdict.seconds <= 60
        assert (verdict.reason, verdict.changed) == ("its breaker is open", "")
        circuit = store.circuits([f"{scope}:none", guard.key])[guard.key]
        assert circuit.state == OPEN
        assert 50 < circuit.seconds <= 60

    def test_one_call_tries_and_lets_the_others_in(self, store: FlowStore, scope: str, guard: Guard) -> None:
        self.opened(store, scope, guard)
        first, other = self.entry(scope, "third", guard=guard), self.entry(scope, "fourth", guard=guard)

        assert self.tries(store, first).changed == HALF_OPEN
        assert store.circuits([guard.key])[guard.key].state == HALF_OPEN
        assert store.enter(other, LEASE).seconds >= 0.1
        assert store.leave(first, 0.1, "free", "failure") == OPEN
        assert self.tries(store, other).changed == HALF_OPEN
        assert store.leave(other, 0.1, "free", "success") == CLOSED
        assert store.circuits([guard.key]) == {}
        assert self.ends(store, first, "failure") == ""

    def test_a_call_that_tries_and_dies_is_followed_by_another(
        self, store: FlowStore, scope: str, guard: Guard
    ) -> None:
        self.opened(store, scope, guard)

        assert self.tries(store, self.entry(scope, "third", guard=guard), lease=0.05).changed == HALF_OPEN
        assert self.tries(store, self.entry(scope, "fourth", guard=guard)).changed == HALF_OPEN

    def test_a_call_that_tries_and_says_nothing_is_followed_by_another(
        self, store: FlowStore, scope: str, guard: Guard
    ) -> None:
        self.opened(store, scope, guard)
        first = self.entry(scope, "third", guard=guard)

        self.tries(store, first)
        assert store.leave(first, 0.1, "wait", "") == ""
        assert store.enter(self.entry(scope, "fourth", guard=guard), LEASE).changed == HALF_OPEN

    def test_runs_that_began_before_it_opened_change_nothing(self, store: FlowStore, scope: str, guard: Guard) -> None:
        guard, early = guard._replace(pause=60), self.entry(scope, "early", guard=guard)

        assert store.enter(early, LEASE) == RUN
        self.opened(store, scope, guard)
        assert store.leave(early, 0.1, "free", "success") == ""
        assert store.circuits([guard.key])[guard.key].state == OPEN
