"""prefork: what programs do in tasks: children and programs of their own, timeouts for all sockets, slow starts."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import billiard
import pytest

from amqtask import AmqTask
from amqtask.exceptions import SoftTimeLimitExceeded
from amqtask.testing.tasks import POOL_TASKS, PlainTask
from amqtask.testing.worker import start_worker
from tests.pools.preforked import Prefork


def double(number: int) -> int:
    return 2 * number


def use_a_process(way: str) -> int:
    context: Any = multiprocessing.get_context(way)
    process = context.Process(target=double, args=(2,))
    process.start()
    process.join()
    return process.exitcode or 0


def use_a_pool(way: str) -> list[int]:
    with multiprocessing.get_context(way).Pool(1) as pool:
        return pool.map(double, [1, 2, 3])


def use_an_executor(way: str) -> int:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(way)) as executor:
        return executor.submit(double, 21).result()


def use_billiard(way: str) -> int:
    process = billiard.get_context(way).Process(target=double, args=(2,))
    process.start()
    process.join()
    return process.exitcode or 0


def start_a_program(folder: str) -> None:
    """A program that lives on when nobody ends it."""
    program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (Path(folder) / "program").write_text(str(program.pid))
    (Path(folder) / "program").rename(Path(folder) / "started")
    program.wait()


def end_softly(folder: str) -> str:
    try:
        (Path(folder) / "begun").touch()
        time.sleep(60)
    except SoftTimeLimitExceeded as error:
        return f"ended softly {error}"
    return "slept"


TASKS = (
    *POOL_TASKS,
    *(
        PlainTask(each)
        for each in (use_a_process, use_a_pool, use_an_executor, use_billiard, start_a_program, end_softly)
    ),
)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("task", "value"),
    [("use_a_process", 0), ("use_a_pool", [2, 4, 6]), ("use_an_executor", 42), ("use_billiard", 0)],
)
@pytest.mark.parametrize("way", ["fork", "spawn", "forkserver"])
def test_a_task_may_have_processes_of_its_own(way: str, task: str, value: object) -> None:
    with Prefork(1, tasks=TASKS) as prefork:
        assert prefork.value(prefork.submit(task, way)) == value
        assert prefork.value(prefork.submit("add", 1, 1)) == 2


@pytest.mark.parametrize("way", ["terminate", "hard limit", "stop"])
def test_a_program_that_a_task_started_ends_with_the_task(way: str, tmp_path: Path) -> None:
    with Prefork(1, tasks=TASKS) as prefork:
        number = prefork.submit(
            "start_a_program", str(tmp_path), **({"hard_limit": 1.0} if way == "hard limit" else {})
        )
        prefork.until((tmp_path / "started").exists)
        program = int((tmp_path / "started").read_text())
        if way == "terminate":
            prefork.pool.terminate(number, "by hand")
        if way == "stop":
            prefork.pool.stop()
        else:
            prefork.outcome(number)

        prefork.until(lambda: not is_alive(program))


def test_usr1_raises_the_soft_time_limit_in_the_task(tmp_path: Path) -> None:
    with Prefork(1, tasks=TASKS) as prefork:
        number = prefork.submit("end_softly", str(tmp_path))
        prefork.until((tmp_path / "begun").exists)
        assert prefork.pool.terminate(number, "by hand", signal.SIGUSR1)

        assert prefork.value(number) == "ended softly by SIGUSR1"


def test_a_timeout_for_all_sockets_changes_nothing() -> None:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(0.2)
    try:
        with Prefork(2, tasks=TASKS) as prefork:
            pids = prefork.pids
            prefork.until(lambda: all(child.is_ready for child in prefork.pool._children.live))
            over = time.monotonic() + 0.6
            prefork.until(lambda: time.monotonic() > over)

            assert prefork.pids == pids
            assert prefork.value(prefork.submit("add", 1, 1)) == 2
    finally:
        socket.setdefaulttimeout(before)


def test_children_that_take_long_to_start_get_more_time(caplog: pytest.LogCaptureFixture) -> None:
    def take_long() -> None:
        time.sleep(0.6)

    with caplog.at_level(logging.ERROR), Prefork(1, start_timeout=0.2, on_child_start=take_long) as prefork:
        assert prefork.value(prefork.submit("add", 1, 1)) == 2

    assert "worker_proc_alive_timeout" in caplog.text


def test_a_system_without_processes_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fork, refusals = os.fork, [OSError(11, "Resource temporarily unavailable")] * 2

    def refused() -> int:
        if refusals:
            raise refusals.pop()
        return fork()

    monkeypatch.setattr(os, "fork", refused)
    with caplog.at_level(logging.ERROR), Prefork(1) as prefork:
        assert prefork.value(prefork.submit("add", 1, 1)) == 2

    assert "no pool process can be started" in caplog.text


def test_a_task_that_asks_for_a_retry_keeps_nothing_alive() -> None:
    app = AmqTask("tests", broker="memory://", backend="cache+memory://")
    kept: list[weakref.ref[Large]] = []

    class Large:
        """Something that takes room."""

    @app.task(bind=True, max_retries=2)
    def work(self: Any) -> int:
        large = Large()
        kept.append(weakref.ref(large))
        if self.request.retries < 2:
            raise self.retry(countdown=0)
        return len(kept)

    with start_worker(app):
        gc.collect()
        gc.disable()
        try:
            assert work.delay().get(60) == 3
            assert [reference() for reference in kept[:2]] == [None, None]
        finally:
            gc.enable()


def test_what_no_child_has_read_is_taken_back_where_gevent_has_patched_all_sockets() -> None:
    pytest.importorskip("gevent")

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TAKES_BACK], capture_output=True, text=True, timeout=120, check=False
    )

    assert (done.returncode, done.stdout) == (0, "8, taken back []\n"), done.stderr


TAKES_BACK = """
from gevent import monkey
monkey.patch_all()
from amqtask.testing.tasks import POOL_TASKS
from tests.pools.preforked import Prefork

with Prefork(1) as prefork:
    value = prefork.value(prefork.submit("add", 4, 4))
    print(f"{value}, taken back {prefork.pool.take_back()}")
"""
