"""PikaLoop: the order of a turn, timers, descriptors, and being woken from elsewhere; no broker."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from amqtask.transport.loop import PikaLoop

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def loop() -> Iterator[PikaLoop]:
    """A loop that ends by itself if a test does not end it."""
    made = PikaLoop()
    guard = made.call_later(30, made.stop)
    yield made
    guard.cancel()
    made.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """The reading and the writing end."""
    ends = os.pipe()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            pass


# -- the end of a turn


def test_what_is_asked_for_soon_runs_in_order_and_before_what_is_asked_for_last(loop: PikaLoop) -> None:
    seen: list[str] = []
    loop.call_last(lambda: seen.append("last"))
    loop.call_soon(lambda: seen.append("one"))
    loop.call_soon(lambda: seen.append("two"))
    loop.call_later(0.001, loop.stop)

    loop.run()

    assert seen == ["one", "two", "last"]


def test_what_the_end_of_a_turn_asks_for_last_is_still_done_in_that_turn(loop: PikaLoop) -> None:
    seen: list[str] = []

    def write() -> None:
        seen.append("write")
        loop.call_last(lambda: seen.append("flush"))

    def end() -> None:
        seen.append("next turn")
        loop.stop()

    def work() -> None:
        loop.call_soon(end)
        loop.call_last(write)

    loop.call_soon(work)
    loop.run()

    assert seen == ["write", "flush", "next turn"]


def test_sockets_are_looked_at_between_two_ends_of_turns(loop: PikaLoop, pipe: tuple[int, int]) -> None:
    turns = 0

    def again() -> None:
        nonlocal turns
        turns += 1
        loop.call_soon(again)

    os.write(pipe[1], b"x")
    loop.add_reader(pipe[0], loop.stop)
    loop.call_soon(again)
    loop.run()

    assert turns < 10


# -- timers


def test_a_cancelled_timer_does_not_run_and_may_be_cancelled_again(loop: PikaLoop) -> None:
    seen: list[str] = []
    doomed = loop.call_later(0.001, lambda: seen.append("doomed"))
    done = loop.call_later(0.001, lambda: seen.append("done"))
    doomed.cancel()
    doomed.cancel()
    loop.call_later(0.005, loop.stop)

    loop.run()
    done.cancel()

    assert seen == ["done"]


def test_a_timer_may_cancel_one_that_is_due_in_the_same_turn(loop: PikaLoop) -> None:
    seen: list[str] = []
    loop.call_later(0, lambda: victim.cancel())
    victim = loop.call_later(0, lambda: seen.append("victim"))
    loop.call_later(0.005, loop.stop)

    loop.run()

    assert seen == []


# -- descriptors


def test_a_reader_and_a_writer_may_share_a_descriptor(loop: PikaLoop) -> None:
    ours, theirs = socket.socketpair()
    seen: list[str] = []

    def read() -> None:
        seen.append(ours.recv(10).decode())
        loop.stop()

    def write() -> None:
        loop.remove_writer(ours.fileno())
        seen.append("writable")
        theirs.send(b"readable")

    loop.add_reader(ours.fileno(), read)
    loop.add_writer(ours.fileno(), write)
    loop.run()
    loop.remove_reader(ours.fileno())
    loop.remove_reader(ours.fileno())
    ours.close()
    theirs.close()

    assert seen == ["writable", "readable"]


def test_a_reader_hears_that_the_other_end_is_gone(loop: PikaLoop, pipe: tuple[int, int]) -> None:
    loop.add_reader(pipe[0], loop.stop)
    os.close(pipe[1])

    loop.run()

    loop.remove_reader(pipe[0])
    assert os.read(pipe[0], 1) == b""


def test_a_removed_reader_is_not_called_for_what_had_come_before(loop: PikaLoop) -> None:
    first, second = os.pipe(), os.pipe()
    seen: list[int] = []

    def read(mine: int, other: int) -> None:
        seen.append(mine)
        loop.remove_reader(mine)
        loop.remove_reader(other)

    loop.add_reader(first[0], lambda: read(first[0], second[0]))
    loop.add_reader(second[0], lambda: read(second[0], first[0]))
    os.write(first[1], b"x")
    os.write(second[1], b"x")
    loop.run_once(0.01)
    for end in (*first, *second):
        os.close(end)

    assert len(seen) == 1


# -- from elsewhere


def test_a_thread_wakes_the_loop_and_all_it_asks_for_runs_in_order(loop: PikaLoop) -> None:
    seen: list[int] = []

    def ask() -> None:
        for number in range(2000):
            loop.call_soon_threadsafe(lambda number=number: seen.append(number))  # type: ignore[misc]
        loop.call_soon_threadsafe(loop.stop)

    thread = threading.Thread(target=ask)
    loop.call_soon(thread.start)
    loop.run()
    thread.join()

    assert seen == list(range(2000))


def test_many_threads_lose_nothing(loop: PikaLoop) -> None:
    count = 0
    barrier = threading.Barrier(8)

    def add() -> None:
        nonlocal count
        count += 1
        if count == 8 * 500:
            loop.stop()

    def ask() -> None:
        barrier.wait()
        for _ in range(500):
            loop.call_soon_threadsafe(add)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    loop.run()
    for thread in threads:
        thread.join()

    assert count == 4000


def test_a_signal_handler_wakes_a_waiting_loop(loop: PikaLoop) -> None:
    before = signal.signal(signal.SIGALRM, lambda *_: loop.call_soon_threadsafe(loop.stop))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        loop.run()
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_signal_may_come_while_the_loop_is_being_woken(loop: PikaLoop) -> None:
    """pika's own wake-up holds a lock meanwhile, and the handler would wait for it for ever."""
    came = 0

    def note(*_: object) -> None:
        nonlocal came
        came += 1
        loop.call_soon_threadsafe(lambda: None)

    before = signal.signal(signal.SIGALRM, note)
    signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
    try:
        for _ in range(3000):
            loop.stop()
            loop.run()
            loop.call_soon_threadsafe(lambda: None)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    assert came


# -- running


def test_a_loop_that_was_stopped_before_returns_at_once(loop: PikaLoop) -> None:
    loop.stop()
    loop.run()


def test_a_closed_loop_takes_calls_without_harm() -> None:
    loop = PikaLoop()
    loop.close()
    loop.close()
    loop.call_soon_threadsafe(lambda: None)


def test_a_callback_that_takes_long_can_have_the_loop_served(loop: PikaLoop, pipe: tuple[int, int]) -> None:
    seen: list[str] = []

    def heartbeat() -> None:
        loop.call_last(lambda: seen.append("written"))

    def task() -> None:
        loop.call_later(0, heartbeat)
        loop.add_reader(pipe[0], lambda: seen.append(os.read(pipe[0], 1).decode()))
        os.write(pipe[1], b"r")
        loop.service()
        assert sorted(seen) == ["r", "written"]
        loop.stop()

    loop.call_soon(task)
    loop.run()

    assert sorted(seen) == ["r", "written"]


@pytest.mark.parametrize("library", ["eventlet", "gevent"])
def test_green_threads_run_while_the_loop_waits_and_can_wake_it(library: str) -> None:
    pytest.importorskip(library)
    code = f"""
        import warnings; warnings.simplefilter("ignore")
        {"import eventlet; eventlet.monkey_patch()" if library == "eventlet" else "from gevent import monkey; monkey.patch_all()"}
        import os, threading, time
        from amqtask.transport.loop import PikaLoop

        loop = PikaLoop()
        seen = []

        def green():
            for _ in range(5):
                time.sleep(0.001)
                seen.append("green")
            os.write(writer, b"x")

        def read():
            seen.append("read")
            loop.remove_reader(reader)
            loop.call_soon_threadsafe(loop.stop)

        reader, writer = os.pipe()
        loop.add_reader(reader, read)
        threading.Thread(target=green).start()
        loop.call_later(20, loop.stop)
        loop.run()
        print(" ".join(seen))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.stdout.split() == ["green"] * 5 + ["read"], done.stderr
