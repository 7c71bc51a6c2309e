"""The plain loop: its order, its clock, its threads."""

from __future__ import annotations

import threading

import pytest

from amqtask.transport.memory.clock import ManualClock
from amqtask.transport.memory.loop import MemoryLoop


def test_timers_run_in_the_order_of_their_time_when_the_clock_gets_there() -> None:
    clock = ManualClock()
    loop = MemoryLoop(clock)
    ran: list[str] = []
    loop.call_later(2, lambda: ran.append("two"))
    loop.call_later(1, lambda: ran.append("one"))
    cancelled = loop.call_later(1, lambda: ran.append("never"))
    cancelled.cancel()
    cancelled.cancel()

    loop.run_once()
    assert ran == []
    clock.advance(1)
    loop.run_once()
    assert ran == ["one"]
    clock.advance(5)
    loop.run_once()

    assert ran == ["one", "two"]


def test_what_is_called_soon_runs_at_the_end_of_the_turn_and_what_that_calls_soon_in_the_next() -> None:
    loop = MemoryLoop()
    ran: list[str] = []

    def first() -> None:
        ran.append("first")
        loop.call_soon(lambda: ran.append("second"))

    loop.call_soon(first)
    loop.call_soon_threadsafe(lambda: ran.append("from outside"))

    loop.run_once()
    assert ran == ["from outside", "first"]
    loop.run_once()

    assert ran == ["from outside", "first", "second"]


def test_another_thread_wakes_the_loop_up_and_stops_it() -> None:
    loop = MemoryLoop()
    ran: list[int] = []

    def work() -> None:
        loop.call_soon_threadsafe(lambda: ran.append(threading.get_ident()))
        loop.call_soon_threadsafe(loop.stop)

    thread = threading.Thread(target=work)
    thread.start()
    loop.run()
    thread.join()

    assert ran == [threading.get_ident()]


def test_a_loop_that_was_stopped_before_does_not_run() -> None:
    loop = MemoryLoop()
    loop.stop()

    loop.run()


def test_file_descriptors_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="PlainLoop"):
        MemoryLoop().add_reader(0, lambda: None)
