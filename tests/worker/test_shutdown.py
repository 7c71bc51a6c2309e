"""The degrees of stopping: which signal does what, and what the exit code says."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import Any

import pytest

from amqtask.execution.chain_steps import Stops
from amqtask.topology.delays import DelayPlan
from amqtask.worker.options import WorkerSetup
from amqtask.worker.shutdown import Degree, Shutdown
from tests.worker.fakes import HandLoop

TERM, INT, QUIT = signal.SIGTERM, signal.SIGINT, signal.SIGQUIT


class Told:
    """Writes down what it was told, in order."""

    def __init__(self, *, busy: bool) -> None:
        self.is_busy = busy
        self.words: list[str] = []

    @property
    def is_settled(self) -> bool:
        return not self.is_busy

    @property
    def waits_for(self) -> str:
        return "a task"

    def quiet(self) -> None:
        self.words.append("quiet")

    def abandon(self) -> None:
        self.is_busy = False
        self.words.append("abandon")

    def close(self) -> None:
        self.words.append("close")

    def halt(self) -> None:
        self.words.append("halt")


def shutdown_of(told: Told, loop: HandLoop, **options: Any) -> Shutdown:
    return Shutdown(
        told, loop, WorkerSetup(hostname="w@h", queues=(), tasks={}, delays=DelayPlan(), stops=Stops(), **options)
    )


@pytest.mark.parametrize("signum", [TERM, INT])
def test_an_idle_worker_closes_at_once(signum: int) -> None:
    told = Told(busy=False)
    shutdown = shutdown_of(told, HandLoop())
    shutdown.on_signal(signum)

    assert told.words == ["quiet", "close"]
    assert shutdown.exit_code == 0


def test_a_warm_shutdown_waits_for_what_runs() -> None:
    told, loop = Told(busy=True), HandLoop()
    shutdown = shutdown_of(told, loop)
    shutdown.on_signal(TERM)
    loop.advance(3600)
    assert told.words == ["quiet"]

    told.is_busy = False
    shutdown.progress()

    assert told.words == ["quiet", "close"]
    assert shutdown.exit_code == 0


@pytest.mark.parametrize("second", [TERM, INT, QUIT])
def test_a_second_signal_ends_what_runs(second: int) -> None:
    told = Told(busy=True)
    shutdown = shutdown_of(told, HandLoop())
    shutdown.on_signal(TERM)
    shutdown.on_signal(second)

    assert told.words == ["quiet", "quiet", "abandon", "close"]
    assert shutdown.exit_code == 1


def test_the_end_of_the_grace_period_ends_what_runs() -> None:
    told, loop = Told(busy=True), HandLoop()
    shutdown = shutdown_of(told, loop, shutdown_timeout=10.0)
    shutdown.on_signal(TERM)
    loop.advance(9.9)
    assert "abandon" not in told.words

    loop.advance(0.2)

    assert told.words[-2:] == ["abandon", "close"]
    assert shutdown.exit_code == 1


def test_quit_is_cold() -> None:
    told = Told(busy=True)
    shutdown = shutdown_of(told, HandLoop())
    shutdown.on_signal(QUIT)

    assert told.words == ["quiet", "abandon", "close"]
    assert shutdown.exit_code == 1


def test_term_is_quit_when_remapped() -> None:
    told = Told(busy=True)
    shutdown_of(told, HandLoop(), term_is_quit=True).on_signal(TERM)

    assert told.words == ["quiet", "abandon", "close"]


def test_a_soft_shutdown_gives_running_tasks_their_time() -> None:
    told, loop = Told(busy=True), HandLoop()
    shutdown = shutdown_of(told, loop, soft_shutdown_timeout=5.0)
    shutdown.on_signal(QUIT)
    assert (shutdown.degree, told.words) == (Degree.SOFT, ["quiet"])

    loop.advance(5.1)

    assert told.words == ["quiet", "quiet", "abandon", "close"]
    assert shutdown.exit_code == 1


def test_a_soft_shutdown_ends_early_when_the_tasks_do() -> None:
    told, loop = Told(busy=True), HandLoop()
    shutdown = shutdown_of(told, loop, soft_shutdown_timeout=5.0)
    shutdown.on_signal(QUIT)
    told.is_busy = False
    shutdown.progress()

    assert told.words == ["quiet", "close"]
    assert shutdown.exit_code == 1


def test_an_idle_worker_skips_the_soft_time() -> None:
    told = Told(busy=False)
    shutdown_of(told, HandLoop(), soft_shutdown_timeout=5.0).on_signal(QUIT)

    assert told.words[-1] == "close"


def test_a_signal_during_the_cold_shutdown_ends_it_on_the_spot() -> None:
    told = Told(busy=True)
    shutdown = shutdown_of(told, HandLoop())
    shutdown.on_signal(QUIT)
    shutdown.on_signal(QUIT)

    assert told.words[-1] == "halt"


def test_a_cold_shutdown_waits_only_so_long_for_confirms() -> None:
    class Unconfirmed(Told):
        is_settled = False

    told, loop = Unconfirmed(busy=True), HandLoop()
    shutdown_of(told, loop).on_signal(QUIT)
    assert "close" not in told.words

    loop.advance(3.1)

    assert told.words[-1] == "close"


def test_an_error_it_cannot_go_on_with_stops_it_with_a_failure() -> None:
    told = Told(busy=False)
    shutdown = shutdown_of(told, HandLoop())
    shutdown.fail(RuntimeError("refused login"))

    assert told.words[-1] == "close"
    assert shutdown.exit_code == 1


def test_a_process_that_a_task_forks_can_be_terminated_and_does_not_stop_the_worker() -> None:
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=120, check=False)

    assert (done.stdout, done.stderr) == (f"ended by {TERM:d}, the worker got []\n", "")


# In a process of its own, because others here have threads. Python forgets signals that come while it forks.
FORKS = """
import os, signal, time
from amqtask.testing.loop import PlainLoop
from amqtask.worker.shutdown import SignalHandlers

signums, loop = [], PlainLoop()
assert SignalHandlers(loop, signums.append).install()
is_up, says_so = os.pipe()
pid = os.fork()
if not pid:
    os.write(says_so, b"up")
    while True:
        time.sleep(0.01)
os.read(is_up, 2)
os.kill(pid, signal.SIGTERM)
_, status = os.waitpid(pid, 0)
loop.run_once()
print(f"ended by {os.WTERMSIG(status)}, the worker got {signums}")
"""


def test_stacks_are_printed_again_and_again_while_threads_begin_and_end() -> None:
    done = subprocess.run([sys.executable, "-c", ASKED], capture_output=True, text=True, timeout=120, check=False)

    assert (done.returncode, done.stdout) == (0, "lives\n")
    assert done.stderr.count("Current thread") > 100


ASKED = """
import os, signal, threading, time
from amqtask.testing.loop import PlainLoop
from amqtask.worker.shutdown import SignalHandlers

assert SignalHandlers(PlainLoop(), lambda signum: None).install()

def begin_and_end():
    while True:
        thread = threading.Thread(target=os.getpid)
        thread.start()
        thread.join()

worker = os.getpid()
pid = os.fork()
if not pid:
    for _ in range(3000):
        os.kill(worker, signal.SIGUSR1)
        time.sleep(0.0005)
    os._exit(0)
for _ in range(2):
    threading.Thread(target=begin_and_end, daemon=True).start()
os.waitpid(pid, 0)
print("lives", flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("signum", [TERM, INT])
def test_a_worker_that_is_to_start_anew_can_be_stopped_and_its_tasks_end(signum: int) -> None:
    told = Told(busy=True)
    shutdown = shutdown_of(told, HandLoop())
    shutdown.on_signal(signal.SIGHUP)
    shutdown.restarts = True  # as without a terminal

    shutdown.on_signal(signum)
    assert not shutdown.restarts
    assert "abandon" not in told.words

    told.is_busy = False
    shutdown.progress()
    assert shutdown.exit_code == 0


def test_a_worker_that_is_to_start_anew_can_be_told_to_stop_at_once() -> None:
    told = Told(busy=True)
    shutdown = shutdown_of(told, HandLoop())
    shutdown.on_signal(signal.SIGHUP)
    shutdown.restarts = True

    shutdown.on_signal(QUIT)

    assert "abandon" in told.words
    assert not shutdown.restarts


def test_remote_control_stops_a_worker_that_is_to_start_anew() -> None:
    shutdown = shutdown_of(Told(busy=True), HandLoop())
    shutdown.on_signal(signal.SIGHUP)
    shutdown.restarts = True

    shutdown.warm("remote control")

    assert not shutdown.restarts
