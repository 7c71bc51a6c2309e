"""Tasks that set alarms of their own, as libraries for timeouts do."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from amqtask import states
from amqtask.pool import find_pool
from amqtask.testing.suites.pool import Bench
from amqtask.testing.tasks import POOL_TASKS, PlainTask, clean_up

# Otherwise pytest-timeout uses the alarm.
pytestmark = pytest.mark.timeout(300, method="thread")


def raise_timeout(signum: int, frame: object) -> None:
    raise TimeoutError("the alarm of a task")


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, raise_timeout)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def clean_up_after_an_alarm(folder: str) -> str:
    with alarm(60):
        pass
    return clean_up(folder)


def clean_up_within_an_alarm(folder: str) -> str:
    with alarm(60):
        return clean_up(folder)


def time_out(folder: str) -> str:
    with alarm(0.2):
        return clean_up(folder)


def leave_an_alarm() -> None:
    signal.signal(signal.SIGALRM, raise_timeout)
    signal.setitimer(signal.ITIMER_REAL, 0.3)


def take_the_signal() -> None:
    signal.signal(signal.SIGALRM, signal.SIG_IGN)


TASKS = (
    *POOL_TASKS,
    *(
        PlainTask(task)
        for task in (clean_up_after_an_alarm, clean_up_within_an_alarm, time_out, leave_an_alarm, take_the_signal)
    ),
)


@pytest.fixture(params=["prefork", "solo"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    before = signal.getsignal(signal.SIGALRM)
    bench = Bench(find_pool(request.param), 1, TASKS)
    yield bench
    bench.close()
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("task", ["clean_up_after_an_alarm", "clean_up_within_an_alarm"])
def test_a_task_that_sets_an_alarm_keeps_its_soft_limit(bench: Bench, tmp_path: Path, task: str) -> None:
    assert bench.value(bench.submit(task, str(tmp_path), soft_limit=0.3)) == "cleaned up"


def test_an_alarm_of_a_task_strikes_also_before_its_soft_limit(bench: Bench, tmp_path: Path) -> None:
    outcome = bench.outcome(bench.submit("time_out", str(tmp_path), soft_limit=30.0))

    assert outcome.state == states.FAILURE
    assert outcome.summary == "TimeoutError('the alarm of a task')"


def test_an_alarm_that_a_task_leaves_strikes_no_other_task(bench: Bench, tmp_path: Path) -> None:
    bench.outcome(bench.submit("leave_an_alarm"))
    bench.loop.call_later(0.6, (tmp_path / "go").touch)

    assert bench.value(bench.submit("wait_for", str(tmp_path), "next", "go")) == "next"


def test_limits_and_termination_work_after_a_task_took_the_alarm_s_signal(bench: Bench, tmp_path: Path) -> None:
    bench.outcome(bench.submit("take_the_signal"))

    assert bench.value(bench.submit("clean_up", str(tmp_path), soft_limit=0.3)) == "cleaned up"
    number = bench.submit("wait_for", str(tmp_path), "terminated", "never")

    def terminate() -> None:  # solo turns the loop while the task runs
        if not (tmp_path / "terminated.started").exists() or not bench.pool.terminate(number, "by the test"):
            bench.loop.call_later(0.01, terminate)

    terminate()
    assert bench.outcome(number).state == states.REVOKED
