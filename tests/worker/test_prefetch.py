"""The adaptive window: fair for long tasks, deep enough for short ones, calm in between."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amqtask.worker.prefetch import MAX_RESERVE, Window, fitting_window


def ended(window: Window, runtime: float, count: int = 20) -> None:
    window.total += runtime * count
    window.count += count


@pytest.mark.parametrize(
    ("slots", "runtime", "window"),
    [
        (1, None, 1),
        (8, None, 8),
        (8, 3600.0, 8),
        (8, 0.1, 8),
        (2, 0.00005, 202),
        (1, 0.00005, 101),
        (4, 0.001, 24),
        (100, 0.00001, 100 + MAX_RESERVE),
        (1, 0.0, 1 + MAX_RESERVE),
    ],
)
def test_one_per_slot_for_long_tasks_and_a_reserve_for_short_ones(
    slots: int, runtime: float | None, window: int
) -> None:
    assert fitting_window(slots, runtime) == window


def test_it_starts_at_one_per_slot_and_grows_with_the_first_short_tasks() -> None:
    window = Window(slots=2)
    assert window.current == 2

    ended(window, 0.00005)

    assert window.look(now=10.0) == 202


def test_after_a_lost_connection_it_is_one_per_slot_until_the_next_one_has_lasted() -> None:
    window = Window(slots=2)
    ended(window, 0.00005)
    window.look(now=10.0)

    window.begin_anew(now=20.0)
    ended(window, 0.00005)

    assert window.current == 2
    assert window.look(now=21.0) is None
    assert window.look(now=23.0) == 202


def test_a_pinned_window_stays_also_after_a_lost_connection() -> None:
    window = Window(slots=2, pinned=7)

    window.begin_anew(now=20.0)

    assert window.current == 7


def test_a_pinned_window_stays() -> None:
    window = Window(slots=2, pinned=7)
    ended(window, 0.00005)

    assert window.look(now=10.0) is None
    assert window.current == 7


def test_a_runtime_alone_changes_it_only_while_deliveries_come() -> None:
    window = Window(slots=2)
    ended(window, 0.00005)

    assert window.look(now=10.0, arriving=False) is None
    assert window.look(now=10.0) == 202


@pytest.mark.parametrize("wish", ["extra", "held"])
def test_room_for_those_that_wait_here_is_made_also_when_no_deliveries_come(wish: str) -> None:
    window = Window(slots=2)
    setattr(window, wish, 8)

    assert window.look(now=10.0, arriving=False) == 10


def test_it_closes_for_long_tasks_also_when_no_deliveries_come() -> None:
    window = Window(slots=2)
    ended(window, 0.00005)
    window.look(now=10.0)

    window.saw_nothing_end(0.5)

    assert window.look(now=20.0, arriving=False) == 2


def test_changes_keep_a_distance_that_grows_to_half_a_second() -> None:
    window = Window(slots=1)
    changed_at: list[float] = []
    for step in range(4000):
        now = step / 1000
        ended(window, 0.00005 if len(changed_at) % 2 == 0 else 1.0)
        if window.look(now) is not None:
            changed_at.append(now)

    gaps = [later - earlier for earlier, later in itertools.pairwise(changed_at)]
    assert gaps[0] == pytest.approx(0.02, abs=0.005)
    assert gaps[-1] >= 0.5


@pytest.mark.parametrize("runtime", [0.00006, 0.00004, 0.00008])
def test_small_differences_change_nothing(runtime: float) -> None:
    window = Window(slots=2)
    ended(window, 0.00005)
    assert window.look(0.0) == 202
    ended(window, runtime, 1000)

    assert window.look(100.0) is None


def test_the_last_step_down_is_taken_however_small_it_is() -> None:
    window = Window(slots=8)
    ended(window, 0.004)
    assert window.look(0.0) == 18
    window.current = 10
    ended(window, 3600.0)

    assert window.look(100.0) == 8


def test_the_window_closes_when_long_tasks_hold_all_slots_and_nothing_ends() -> None:
    window = Window(slots=2)
    ended(window, 0.00005)
    assert window.look(0.0) == 202

    window.saw_nothing_end(1.0)

    assert window.look(100.0) == 2


@given(st.integers(1, 500), st.lists(st.tuples(st.floats(0, 1e5), st.integers(1, 1000)), max_size=30))
def test_the_window_is_never_below_the_slots_nor_above_slots_and_reserve(
    slots: int, ends: list[tuple[float, int]]
) -> None:
    window = Window(slots=slots)
    for turn, (runtime, count) in enumerate(ends):
        ended(window, runtime, count)
        window.look(float(turn))
        assert slots <= window.current <= slots + MAX_RESERVE
