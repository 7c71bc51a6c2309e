"""prefork: children that die, in every way, lose one task at most, and are replaced."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from amqtask import signals, states
from amqtask.execution.request import Answer
from amqtask.pool import PoolOptions
from amqtask.protocol.serialization import JSON
from amqtask.testing.tasks import POOL_TASKS, PlainTask, make_executor, request
from amqtask_pools.prefork import child as child_module
from amqtask_pools.prefork import children
from amqtask_pools.prefork.child import NUDGE, SOFT_LIMIT, Child
from amqtask_pools.prefork.frames import GO, IS_READY, PIECE, decode_outcomes, encode_request, socket_pair
from tests.pools.preforked import Prefork


def begin(folder: str) -> None:
    """Leaves a line each time it begins, and ends when it may."""
    with (Path(folder) / "begun").open("a") as file:
        file.write("once\n")
    while not (Path(folder) / "end").exists():
        time.sleep(0.001)


def test_a_child_that_is_killed_loses_its_task_with_the_signals_name() -> None:
    with Prefork(2) as prefork:
        outcome = prefork.outcome(prefork.submit("kill_self", signal.SIGKILL))

        assert outcome.answer is Answer.REQUEUE
        assert "WorkerLostError" in outcome.summary
        assert "was killed by signal SIGKILL (9)" in outcome.summary
        assert prefork.value(prefork.submit("add", 1, 1)) == 2
        assert len(prefork.pids) == 2


def test_a_segmentation_fault_is_a_loss_with_its_name() -> None:
    with Prefork(1) as prefork:
        assert "was killed by signal SIGSEGV (11)" in prefork.outcome(prefork.submit("segfault")).summary
        assert prefork.value(prefork.submit("add", 1, 1)) == 2


@pytest.mark.parametrize("code", [0, 3])
def test_a_task_that_exits_hard_is_a_loss_with_the_exit_code(code: int) -> None:
    with Prefork(1) as prefork:
        assert f"exited with code {code}" in prefork.outcome(prefork.submit("exit_hard", code)).summary
        assert prefork.value(prefork.submit("add", 1, 1)) == 2


@pytest.mark.parametrize("kind", ["noise", "empty", "pieces", "ready", "answers"])
def test_a_child_that_writes_rubbish_to_its_pipe_is_lost_and_replaced(kind: str) -> None:
    with Prefork(1) as prefork:
        before = prefork.value(prefork.submit("pid"))
        outcome = prefork.outcome(prefork.submit("write_rubbish", kind))

        assert outcome.answer is Answer.REQUEUE
        assert "wrote to its pipe what is not an outcome" in outcome.summary
        assert prefork.value(prefork.submit("pid")) != before
        assert prefork.pool.free == 1


def test_what_waits_behind_a_task_that_writes_rubbish_runs_elsewhere() -> None:
    with Prefork(1) as prefork:
        prefork.look_ahead()
        lost = prefork.submit("write_rubbish", "noise")
        behind = [prefork.submit("add", n, n) for n in range(10)]

        assert prefork.outcome(lost).answer is Answer.REQUEUE
        assert [prefork.value(number) for number in behind] == [n + n for n in range(10)]


def test_a_process_that_a_task_leaves_behind_does_not_hide_the_end_of_the_child(tmp_path: Path) -> None:
    with Prefork(1) as prefork:
        outcome = prefork.outcome(prefork.submit("leave_a_process_behind", str(tmp_path)))
        (tmp_path / "go").touch()

        assert "exited with code 7" in outcome.summary


def test_a_task_that_fills_the_memory_fails_and_the_child_goes_on() -> None:
    def limit_memory() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))

    with Prefork(1, on_child_start=limit_memory) as prefork:
        before = prefork.value(prefork.submit("pid"))
        outcome = prefork.outcome(prefork.submit("fill_memory"))

        assert outcome.state == states.FAILURE
        assert "MemoryError" in outcome.summary
        assert prefork.value(prefork.submit("pid")) == before


def test_what_a_dead_child_had_not_read_runs_elsewhere() -> None:
    with Prefork(1) as prefork:
        prefork.look_ahead()
        lost = prefork.submit("exit_hard", 1)
        behind = [prefork.submit("add", n, n) for n in range(10)]

        assert prefork.outcome(lost).answer is Answer.REQUEUE
        assert [prefork.value(number) for number in behind] == [n + n for n in range(10)]


def test_a_large_request_that_a_dead_child_had_not_read_to_its_end_runs_elsewhere() -> None:
    large = "0123456789abcdef" * (5 << 16)
    with Prefork(1) as prefork:
        prefork.outcome(prefork.submit("add", 1, 1))
        os.kill(prefork.pids[0], signal.SIGSTOP)
        number = prefork.submit("echo", large)
        prefork.until(lambda: prefork.pool.free == 0)
        os.kill(prefork.pids[0], signal.SIGKILL)

        assert prefork.value(number) == large


def test_in_a_storm_of_kills_each_task_ends_exactly_once() -> None:
    dice = random.Random(1)
    with Prefork(4) as prefork:
        prefork.look_ahead()

        def strike() -> None:
            with contextlib.suppress(ProcessLookupError):  # it has just been reaped
                os.kill(dice.choice(prefork.pids), signal.SIGKILL)
            prefork.loop.call_later(dice.uniform(0.005, 0.03), strike)

        strike()
        numbers = [prefork.submit("pause", dice.choice([0, 0, 0, 0.001, 0.01])) for _ in range(500)]
        answers = [prefork.outcome(number) for number in numbers]
        ended = [outcome for outcome in answers if outcome.state == states.SUCCESS]
        lost = [outcome for outcome in answers if "WorkerLostError" in outcome.summary]

        assert len(ended) + len(lost) == 500
        assert ended
        assert lost


def test_a_child_is_replaced_after_its_number_of_tasks() -> None:
    with Prefork(2, max_tasks_per_child=7) as prefork:
        ran_in = [prefork.value(number) for number in [prefork.submit("pid") for _ in range(100)]]

        assert max(map(ran_in.count, ran_in)) == 7
        assert len(set(ran_in)) >= 100 // 7


def test_a_child_is_replaced_when_it_uses_too_much_memory() -> None:
    # A child begins with the pages of this process, whatever the tests before have loaded into it.
    with Path("/proc/self/statm").open() as file:
        resident = int(file.read().split()[1]) * resource.getpagesize() // 1024
    with Prefork(1, max_memory_per_child=resident + 150 * 1024) as prefork:
        light = [prefork.value(prefork.submit("use_memory", 1)) for _ in range(5)]
        heavy = [prefork.value(prefork.submit("use_memory", 250)) for _ in range(3)]

        assert len(set(light)) == 1
        assert heavy[0] == light[0]
        assert len(set(heavy)) == 3


def test_children_that_cannot_start_are_tried_again_more_and_more_slowly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(children, "FIRST_PAUSE", 0.05)

    def start() -> None:
        if not (tmp_path / "repaired").exists():
            os._exit(1)

    with Prefork(2, on_child_start=start) as prefork:
        number = prefork.submit("add", 1, 1)
        prefork.until(lambda: "the next starts in 0.2 s" in caplog.text)
        (tmp_path / "repaired").touch()

        assert prefork.value(number) == 2
        prefork.until(lambda: len(prefork.pids) == 2)


def test_an_error_at_the_start_of_a_child_is_logged_there(tmp_path: Path) -> None:
    def start() -> None:
        if not (tmp_path / "tried").exists():
            (tmp_path / "tried").touch()
            raise RuntimeError("no database")

    handler = logging.FileHandler(tmp_path / "log")
    logging.getLogger("amqtask.pools").addHandler(handler)
    try:
        with Prefork(1, on_child_start=start) as prefork:
            assert prefork.value(prefork.submit("add", 1, 1)) == 2
    finally:
        logging.getLogger("amqtask.pools").removeHandler(handler)
        handler.close()

    assert "RuntimeError: no database" in (tmp_path / "log").read_text()


def test_a_child_that_does_not_get_ready_is_killed_and_replaced(tmp_path: Path) -> None:
    def start() -> None:
        try:
            (tmp_path / "first").mkdir()
        except FileExistsError:
            return
        time.sleep(60)

    with Prefork(1, on_child_start=start, start_timeout=0.2) as prefork:
        assert prefork.value(prefork.submit("add", 1, 1)) == 2


def test_a_child_that_got_ready_while_the_worker_stood_still_is_not_killed(tmp_path: Path) -> None:
    def wait_for(name: str) -> None:
        while not (tmp_path / name).exists():
            time.sleep(0.001)

    def stand_still() -> None:
        (tmp_path / "go").touch()
        wait_for("begun")

    with Prefork(1, tasks=[PlainTask(begin)], on_child_start=lambda: wait_for("go"), start_timeout=0.2) as prefork:
        due = time.monotonic() + 0.2
        # In one turn of the loop: first this, then what happens when the child is late.
        prefork.loop.call_later(0, stand_still)
        prefork.pool.submit(request(1, "begin", str(tmp_path)))
        while time.monotonic() < due:
            time.sleep(0.001)
        prefork.loop.call_later(0, (tmp_path / "end").touch)

        assert prefork.outcome(1).state == states.SUCCESS

    assert (tmp_path / "begun").read_text() == "once\n"


@pytest.fixture
def signal_handlers() -> Iterator[None]:
    """A child in this process sets some."""
    before = {signum: signal.getsignal(signum) for signum in (NUDGE, SOFT_LIMIT, signal.SIGALRM)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def outcomes_of_a_child_that_is_nudged_at(instruction: int) -> tuple[list[int], bool]:
    """The numbers of the outcomes that it sends, of three tasks; and whether it had so many instructions."""
    ours, its = socket_pair()
    with ours, its:
        for number in (1, 2, 3):
            ours.send(encode_request(request(number, "add", 1, number)))
        ours.send(GO)
        child = Child(its, make_executor(*POOL_TASKS), PoolOptions(slots=1, hostname="tests@here"), os.getppid())
        left = instruction

        def trace(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal left
            if frame.f_code.co_filename != child_module.__file__:
                return None
            frame.f_trace_opcodes = True
            if event == "opcode":
                left -= 1
                if not left:
                    signal.raise_signal(NUDGE)
            return trace

        sys.settrace(trace)
        try:
            child.run()
        finally:
            sys.settrace(None)
        ours.setblocking(False)
        numbers: list[int] = []
        with contextlib.suppress(BlockingIOError):
            while packet := ours.recv(PIECE + 1):
                if packet != IS_READY:
                    numbers += [outcome.number for outcome in decode_outcomes(packet, frozenset({JSON}))]
        return numbers, left <= 0


@pytest.mark.usefixtures("signal_handlers")
def test_no_outcome_is_lost_whenever_a_child_is_asked_for_those_that_it_holds_back() -> None:
    instruction, goes_on = 0, True
    while goes_on:
        instruction += 1
        numbers, goes_on = outcomes_of_a_child_that_is_nudged_at(instruction)
        assert set(numbers) == {1, 2, 3}, f"at instruction {instruction}"


def test_nothing_waits_for_a_child_that_takes_long_to_start(tmp_path: Path) -> None:
    def start() -> None:
        try:
            (tmp_path / "first").mkdir()
        except FileExistsError:
            return
        while not (tmp_path / "go").exists():
            time.sleep(0.01)

    with Prefork(2, on_child_start=start) as prefork:
        for number in [prefork.submit("add", n, n) for n in range(4)]:
            prefork.outcome(number)
        (tmp_path / "go").touch()


def test_children_ignore_ctrl_c_and_say_when_they_go(tmp_path: Path) -> None:
    def gone(exitcode: int, **_: object) -> None:
        (tmp_path / f"gone-{os.getpid()}-{exitcode}").touch()

    signals.worker_process_shutdown.connect(gone, dispatch_uid="test")
    try:
        with Prefork(1) as prefork:
            child = prefork.value(prefork.submit("pid"))
            os.kill(child, signal.SIGINT)
            assert prefork.value(prefork.submit("pid")) == child
            prefork.pool.resize(0)
            prefork.until((tmp_path / f"gone-{child}-0").exists)
    finally:
        signals.worker_process_shutdown.disconnect(dispatch_uid="test")


PARENT = """
import sys
from tests.pools.preforked import Prefork

prefork = Prefork(3)
for _ in range(3):
    prefork.submit("wait_for", sys.argv[1], f"t{_}", "never", 60.0)
from pathlib import Path
prefork.until(lambda: len(list(Path(sys.argv[1]).glob("*.started"))) == 3)
print(*prefork.pids, flush=True)
prefork.until(lambda: False)
"""


def test_children_do_not_survive_the_parent(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as parent:
        assert parent.stdout is not None
        children = [int(word) for word in parent.stdout.readline().split()]
        parent.kill()
    deadline = time.monotonic() + 60
    while any(map(is_running, children)):
        assert time.monotonic() < deadline, "children survive"
        time.sleep(0.01)
    assert len(children) == 3


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
