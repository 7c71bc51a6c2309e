"""prefork: what is given ahead of time, and what passes through."""

from __future__ import annotations

import os
import signal
import socket
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from amqtask import states
from amqtask.execution.request import Answer
from amqtask.ground.processes import POOL_INDEX
from amqtask_pools.prefork import children
from amqtask_pools.prefork.frames import socket_pair
from tests.pools.preforked import Prefork


def test_short_tasks_are_given_ahead_and_long_ones_are_not() -> None:
    with Prefork(2) as prefork:
        assert prefork.pool.free == 2
        prefork.look_ahead()
        for number in [prefork.submit("pause", 0.02) for _ in range(4)]:
            prefork.outcome(number)
        assert prefork.pool.free == 2


def test_what_waits_behind_a_long_task_runs_elsewhere(tmp_path: Path) -> None:
    with Prefork(2) as prefork:
        prefork.look_ahead()
        long = prefork.submit("wait_for", str(tmp_path), "long", "go")
        short = [prefork.submit("pid") for _ in range(20)]
        ran_in = {prefork.value(number) for number in short}
        (tmp_path / "go").touch()

        assert prefork.value(long) == "long"
        assert len(ran_in) == 1
        assert prefork.order[-1] == long


def test_what_waits_behind_long_tasks_everywhere_goes_to_the_first_that_ends(tmp_path: Path) -> None:
    with Prefork(2) as prefork:
        prefork.look_ahead()
        long = [prefork.submit("wait_for", str(tmp_path), name, f"go-{name}") for name in ("a", "b")]
        short = [prefork.submit("add", n, n) for n in range(20)]
        prefork.until(lambda: (tmp_path / "a.started").exists() and (tmp_path / "b.started").exists())
        (tmp_path / "go-b").touch()
        for number in short:
            prefork.outcome(number)
        assert long[0] not in prefork.outcomes
        (tmp_path / "go-a").touch()

        assert prefork.value(long[0]) == "a"


def test_outcomes_do_not_wait_for_the_long_task_that_came_after_them(tmp_path: Path) -> None:
    with Prefork(1) as prefork:
        prefork.look_ahead()
        short = [prefork.submit("add", n, n) for n in range(3)]
        long = prefork.submit("wait_for", str(tmp_path), "long", "go")
        assert [prefork.value(number) for number in short] == [0, 2, 4]
        (tmp_path / "go").touch()

        assert prefork.value(long) == "long"


def test_a_child_that_is_not_scheduled_holds_nothing_up() -> None:
    with Prefork(2) as prefork:
        prefork.look_ahead()
        stopped = prefork.pids[0]
        os.kill(stopped, signal.SIGSTOP)
        numbers = [prefork.submit("pid") for _ in range(30)]
        prefork.until(lambda: len(prefork.outcomes.keys() & set(numbers)) >= 29)
        os.kill(stopped, signal.SIGCONT)

        assert {prefork.value(number) for number in numbers} <= set(prefork.pids)


def test_large_arguments_and_results_travel_in_pieces_among_small_ones() -> None:
    large = "0123456789abcdef" * (5 << 16)
    with Prefork(2) as prefork:
        prefork.look_ahead()
        echoes = {}
        for n in range(24):
            text = large if n % 6 == 0 else "x" * (n * 3000)
            echoes[prefork.submit("echo", text)] = text

        assert all(prefork.value(number) == text for number, text in echoes.items())


def test_a_large_request_waits_in_the_parent_until_its_child_reads(tmp_path: Path) -> None:
    large = "0123456789abcdef" * (5 << 16)
    with Prefork(1) as prefork:
        prefork.outcome(prefork.submit("add", 1, 1))
        os.kill(prefork.pids[0], signal.SIGSTOP)
        number = prefork.submit("echo", large)
        prefork.until(lambda: prefork.pool.free == 0)
        prefork.loop.call_later(0.05, lambda: os.kill(prefork.pids[0], signal.SIGCONT))

        assert prefork.value(number) == large


def test_it_works_without_packet_sockets_and_pidfds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(children, "socket_pair", partial(socket_pair, socket.SOCK_DGRAM))
    monkeypatch.delattr(os, "pidfd_open")
    large = "0123456789abcdef" * (5 << 16)
    with Prefork(2) as prefork:
        prefork.look_ahead()
        long = prefork.submit("wait_for", str(tmp_path), "long", "go")
        short = [prefork.submit("add", n, n) for n in range(20)]
        assert [prefork.value(number) for number in short] == [n + n for n in range(20)]
        (tmp_path / "go").touch()
        assert prefork.value(long) == "long"
        assert prefork.value(prefork.submit("echo", large)) == large
        assert "exited with code 9" in prefork.outcome(prefork.submit("exit_hard", 9)).summary
        prefork.pool.resize(1)
        prefork.until(lambda: len(prefork.pids) == 1)
        assert prefork.value(prefork.submit("add", 1, 1)) == 2


def test_nothing_stays_open_after_stop() -> None:
    with Prefork(2) as prefork:
        prefork.outcome(prefork.submit("add", 1, 1))
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with Prefork(3) as prefork:
            prefork.outcome(prefork.submit("exit_hard", 1))
            prefork.outcome(prefork.submit("add", 1, 1))

    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_stop_kills_a_task_that_ignores_the_polite_signal(tmp_path: Path) -> None:
    with Prefork(1) as prefork:
        number = prefork.submit("ignore_sigterm", str(tmp_path))
        prefork.until((tmp_path / "ignoring").exists)

        assert [request.number for request in prefork.pool.stop()] == [number]


def test_stats_count_what_ended_and_name_the_processes() -> None:
    with Prefork(2, max_tasks_per_child=50) as prefork:
        for number in [prefork.submit("add", n, n) for n in range(10)]:
            assert prefork.outcome(number).state == states.SUCCESS
        stats = prefork.pool.stats()

        assert (stats["total"], stats["max-concurrency"], stats["max-tasks-per-child"]) == (10, 2, 50)
        assert len(stats["processes"]) == 2


def test_a_request_that_no_process_can_be_handed_is_refused_and_the_others_run() -> None:
    nested: dict[str, Any] = {}
    for _ in range(200_000):
        nested = {"n": nested}
    with Prefork(1) as prefork:
        before, bad, after = (
            prefork.submit("add", 1, 1),
            prefork.submit("add", 1, 1, headers=nested),
            prefork.submit("add", 2, 2),
        )

        assert (prefork.value(before), prefork.value(after)) == (2, 4)
        refused = prefork.outcome(bad)
        assert (refused.state, refused.answer) == (states.FAILURE, Answer.DEAD_LETTER)
        assert "RecursionError" in refused.reason
        assert prefork.value(prefork.submit("add", 3, 3)) == 6


def test_each_process_has_a_number_and_its_successor_has_the_same() -> None:
    with Prefork(2) as prefork:
        before = {tuple(prefork.value(prefork.submit("index"))) for _ in range(2)}
        prefork.outcome(prefork.submit("kill_self", signal.SIGKILL))
        prefork.until(lambda: prefork.pool.free == 2)
        numbers = [prefork.submit("index") for _ in range(20)]
        after = {tuple(prefork.value(number)) for number in numbers}

    assert before | after <= {(1, 0), (2, 1)}
    assert POOL_INDEX == [0]
