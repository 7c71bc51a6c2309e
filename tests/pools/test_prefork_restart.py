"""prefork: all processes are replaced, without losing a task and without ever running more than there are slots."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pools.preforked import Prefork


@pytest.mark.parametrize("has_worked", [False, True])
def test_idle_processes_are_replaced(has_worked: bool, caplog: pytest.LogCaptureFixture) -> None:
    with Prefork(12) as prefork:
        if has_worked:
            prefork.look_ahead()
        old = set(prefork.pids)

        prefork.pool.restart()
        prefork.until(lambda: len(prefork.pids) == 12 and not old & set(prefork.pids))

        assert prefork.value(prefork.submit("add", 1, 1)) == 2
        assert caplog.text == ""


def test_busy_processes_are_replaced_after_their_task_and_stand_for_a_slot_until_then(tmp_path: Path) -> None:
    with Prefork(2) as prefork:
        busy = [prefork.submit("wait_for", str(tmp_path), f"t{n}", "go") for n in range(2)]
        prefork.until(lambda: (tmp_path / "t0.started").exists() and (tmp_path / "t1.started").exists())
        old = set(prefork.pids)
        behind = [prefork.submit("pid") for _ in range(4)]

        prefork.pool.restart()
        prefork.pool.resize(2)  # whatever fills the pool up must not fill it up twice
        assert set(prefork.pids) == old
        (tmp_path / "go").touch()

        assert [prefork.value(number) for number in busy] == ["t0", "t1"]
        assert not {prefork.value(number) for number in behind} & old
        prefork.until(lambda: len(prefork.pids) == 2 and not old & set(prefork.pids))


def test_idle_processes_go_while_others_are_busy(tmp_path: Path) -> None:
    with Prefork(3) as prefork:
        busy = prefork.submit("wait_for", str(tmp_path), "a", "go")
        prefork.until((tmp_path / "a.started").exists)
        old = set(prefork.pids)
        running = prefork.pool.find(busy)
        assert running is not None
        keeper = running.pid

        prefork.pool.restart()
        prefork.until(lambda: len(prefork.pids) == 3 and old & set(prefork.pids) == {keeper})
        (tmp_path / "go").touch()

        assert prefork.value(busy) == "a"
        prefork.until(lambda: len(prefork.pids) == 3 and keeper not in prefork.pids)


def test_tasks_go_on_while_the_pool_restarts() -> None:
    with Prefork(2) as prefork:
        prefork.look_ahead()
        old = set(prefork.pids)
        numbers = [prefork.submit("add", n, n) for n in range(500)]

        prefork.pool.restart()

        assert [prefork.value(number) for number in numbers] == [n + n for n in range(500)]
        prefork.until(lambda: len(prefork.pids) == 2 and not old & set(prefork.pids))
