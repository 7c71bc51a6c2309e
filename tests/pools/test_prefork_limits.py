"""prefork: time limits and termination hit the task that they are meant for, and no other."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from amqtask import states
from amqtask.execution.request import Answer
from tests.pools.preforked import Prefork


def test_the_hard_limit_ends_a_task_that_swallows_its_soft_limit(tmp_path: Path) -> None:
    with Prefork(1) as prefork:
        outcome = prefork.outcome(prefork.submit("swallow_soft_limit", str(tmp_path), soft_limit=0.5, hard_limit=3.0))

        assert (tmp_path / "swallowed").exists()
        assert outcome.state == states.FAILURE
        assert "ran longer than its time limit of 3 s" in outcome.summary
        assert prefork.value(prefork.submit("add", 1, 1)) == 2


def test_the_soft_limit_reaches_a_coroutine_though_another_blocks_the_loop() -> None:
    with Prefork(1) as prefork:
        assert prefork.value(prefork.submit("block_the_loop", soft_limit=0.1)) == ["cleaned up"]


def test_a_hard_limit_counts_from_the_start_of_the_task_not_from_its_submission() -> None:
    with Prefork(1) as prefork:
        prefork.look_ahead()
        numbers = [prefork.submit("pause", 0.5, hard_limit=2.8) for _ in range(6)]

        assert [prefork.value(number) for number in numbers] == [0.5] * 6


def test_only_the_task_over_its_limit_is_lost(tmp_path: Path) -> None:
    with Prefork(2) as prefork:
        prefork.look_ahead()
        before = [prefork.submit("add", n, n, hard_limit=5.0) for n in range(10)]
        over = prefork.submit("wait_for", str(tmp_path), "over", "never", hard_limit=0.3)
        after = [prefork.submit("add", n, n, soft_limit=5.0) for n in range(30)]

        assert prefork.outcome(over).summary.startswith("TimeLimitExceeded")
        assert [prefork.value(number) for number in before + after] == [n + n for n in [*range(10), *range(30)]]


def test_limited_tasks_are_given_ahead_too() -> None:
    with Prefork(2) as prefork:
        for number in [prefork.submit("add", n, n, soft_limit=5.0, hard_limit=6.0) for n in range(300)]:
            prefork.outcome(number)

        assert prefork.pool.free > 2


def test_terminate_ends_the_running_task_and_what_is_behind_it_runs_elsewhere(tmp_path: Path) -> None:
    with Prefork(1) as prefork:
        prefork.look_ahead()
        running = prefork.submit("wait_for", str(tmp_path), "a", "never")
        behind = [prefork.submit("add", n, n) for n in range(5)]
        prefork.until((tmp_path / "a.started").exists)

        assert prefork.pool.terminate(running, "by the test")
        assert prefork.outcome(running).state == states.REVOKED
        assert [prefork.value(number) for number in behind] == [n + n for n in range(5)]


def test_terminate_revokes_what_has_not_begun_without_killing_anybody(tmp_path: Path) -> None:
    with Prefork(1) as prefork:
        prefork.look_ahead()
        running = prefork.submit("wait_for", str(tmp_path), "a", "go")
        behind = prefork.submit("add", 1, 1)
        prefork.until((tmp_path / "a.started").exists)

        assert prefork.pool.terminate(behind, "by the test")
        assert prefork.outcome(behind).state == states.REVOKED
        (tmp_path / "go").touch()
        assert prefork.value(running) == "a"


@pytest.mark.parametrize(("asked_for", "sent"), [(None, signal.SIGTERM), (signal.SIGQUIT, signal.SIGQUIT)])
def test_a_task_is_ended_by_the_signal_that_was_asked_for(tmp_path: Path, asked_for: int | None, sent: int) -> None:
    with Prefork(1) as prefork:
        number = prefork.submit("note_signals", str(tmp_path))
        prefork.until((tmp_path / "noting").exists)
        running = prefork.pool.find(number)
        assert running is not None
        assert running.pid != os.getpid()

        assert prefork.pool.terminate(number, "by the test", asked_for)
        assert prefork.outcome(number).state == states.REVOKED
        assert (tmp_path / "signal").read_text() == str(int(sent))


def test_a_task_that_ignores_termination_is_killed(tmp_path: Path) -> None:
    with Prefork(1) as prefork:
        number = prefork.submit("ignore_sigterm", str(tmp_path))
        prefork.until((tmp_path / "ignoring").exists)

        assert prefork.pool.terminate(number, "by the test")
        assert prefork.outcome(number).state == states.REVOKED
        assert prefork.value(prefork.submit("add", 1, 1)) == 2


@pytest.mark.parametrize("lookahead", [False, True])
def test_shrinking_lets_busy_children_finish(tmp_path: Path, lookahead: bool) -> None:
    with Prefork(3) as prefork:
        if lookahead:
            prefork.look_ahead()
        busy = [prefork.submit("wait_for", str(tmp_path), f"t{n}", "go") for n in range(3)]
        prefork.until(lambda: len(list(tmp_path.glob("*.started"))) == 3)
        prefork.pool.resize(1)
        waiting = [prefork.submit("add", n, n) for n in range(10)]
        (tmp_path / "go").touch()

        assert [prefork.value(number) for number in busy] == ["t0", "t1", "t2"]
        assert [prefork.value(number) for number in waiting] == [n + n for n in range(10)]
        assert all(prefork.outcomes[number].answer is Answer.ACK for number in busy)
        prefork.until(lambda: len(prefork.pids) == 1)
