"""What the tests themselves stand on: waiting, ports, processes that end, and processes that do not."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from integration.machine import PORTS, Server, free_port, is_running, kill_session
from integration.nodes import RabbitNode
from integration.waiting import NeverHappened, Patience, eventually
from integration.workers import LoggedProcess, run_session


class Clock:
    """Seconds that only `sleep` lets pass, some of them unasked."""

    def __init__(self) -> None:
        self.now = 0.0
        self.overrun = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds + self.overrun


def program(code: str) -> LoggedProcess:
    """A Python process."""
    return LoggedProcess([sys.executable, "-c", textwrap.dedent(code)])


def sleeper() -> subprocess.Popen[bytes]:
    """A process in a session of its own."""
    return subprocess.Popen(["sleep", "1000"], start_new_session=True)


# -- waiting


def test_seconds_in_which_the_machine_stood_still_do_not_count() -> None:
    clock = Clock()
    patience = Patience(10.0, clock=clock)
    clock.overrun = 60.0
    patience.pause(0.5, clock.sleep)
    assert not patience.is_over

    clock.overrun = 0.1  # a busy machine is no machine that stands still
    while not patience.is_over:
        patience.pause(0.5, clock.sleep)
    assert 70.0 < clock.now < 71.0


def test_what_came_true_while_it_was_looked_at_for_too_long_has_happened() -> None:
    looks: list[int] = []

    def look() -> bool:
        looks.append(1)
        if len(looks) == 1:
            time.sleep(0.2)  # the machine stands still, here
        return len(looks) > 1

    eventually(look, 0.1)


def test_what_is_told_of_a_deadline_is_how_things_are_then() -> None:
    looks: list[int] = []

    def look() -> bool:
        looks.append(1)
        return False

    with pytest.raises(NeverHappened, match=r"^looked [1-9]\d* times, after 0.1 s"):
        eventually(look, 0.1, what=lambda: f"looked {len(looks)} times")


# -- ports


def test_a_port_is_given_out_once_and_is_none_of_those_from_which_connections_go_out() -> None:
    ports = [free_port() for _ in range(200)]
    assert len(set(ports)) == 200
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert set(ports) <= set(PORTS)
    assert PORTS[-1] + 10_000 < first


# -- processes


def test_a_process_that_ended_is_not_waited_for() -> None:
    ended = pytest.raises(NeverHappened, match=r"(?s)'hello' never came up .* exit code 3; .*over and out")
    with program("print('over and out'); raise SystemExit(3)").start(wait=False) as process, ended:
        process.await_log("hello")


def test_a_process_that_is_stuck_tells_where() -> None:
    code = """
        import time

        def stuck():
            print("here", flush=True)
            time.sleep(1000)

        stuck()
    """
    with program(code).start(wait=False) as process:
        process.await_log("here")
        eventually(lambda: "S (sleeping)" in Path(f"/proc/{process.pid}/status").read_text())
        with pytest.raises(NeverHappened, match=r"(?s)State:\s+S.*exit code -6.*here.*in stuck"):
            process.await_log("there", 0.1)


def test_a_stopped_process_is_seen_to_be_stopped() -> None:
    with program("import os; print('here', flush=True); os.kill(os.getpid(), 19)").start(wait=False) as process:
        process.await_log("here")
        eventually(lambda: "T (stopped)" in Path(f"/proc/{process.pid}/status").read_text())
        with pytest.raises(NeverHappened, match=r"(?s)did not end, after 0.1 s.*T \(stopped\).*exit code -6"):
            process.wait(0.1)


def test_killing_a_process_ends_what_it_started_and_left() -> None:
    reader, writer = os.pipe()
    command = [sys.executable, "-c", "import subprocess; subprocess.Popen(['sleep', '1000'], close_fds=False)"]
    parent = subprocess.Popen(command, start_new_session=True, pass_fds=[writer])
    os.close(writer)
    parent.wait()

    kill_session(parent)

    with os.fdopen(reader, "rb") as pipe:
        assert pipe.read() == b""  # its last writer has gone


def test_what_a_program_started_and_left_ends_with_it() -> None:
    code = """
        import subprocess
        left = subprocess.Popen(["sleep", "1000"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        print(left.pid)
    """
    _, printed, _ = run_session([sys.executable, "-c", textwrap.dedent(code)])
    eventually(lambda: not is_running(int(printed)))


def test_killing_a_server_ends_its_processes_that_began_sessions_of_their_own() -> None:
    code = """
        import subprocess
        backend = subprocess.Popen(["sleep", "1000"], start_new_session=True)  # as PostgreSQL's do
        print(backend.pid, flush=True)
        backend.wait()
    """
    server = Server("postmaster")
    log = server.folder / "log"
    server.run([sys.executable, "-c", textwrap.dedent(code)], lambda: log.read_text().endswith("\n"))

    server.kill()

    assert not is_running(int(log.read_text()))
    server.remove()


def test_killing_a_process_that_was_waited_for_does_not_hit_the_next_one_of_its_number() -> None:
    other = sleeper()
    ended = subprocess.Popen(["true"], start_new_session=True)
    ended.wait()
    ended.pid = other.pid  # some 30,000 processes later

    kill_session(ended)

    assert other.poll() is None
    kill_session(other)
    assert other.returncode == -9


def test_a_node_that_was_killed_forgets_its_number() -> None:
    node, erlang = RabbitNode("forgetful"), sleeper()
    (node.folder / "pid").write_text(str(erlang.pid))

    node.kill()

    assert not is_running(erlang.pid)
    assert node.pid is None
    erlang.wait()
    node.remove()
