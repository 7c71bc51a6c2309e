"""PlainLoop: its order, its clock, its end."""

from __future__ import annotations

import os

from amqtask.testing.loop import PlainLoop
from amqtask.transport.memory.broker import ManualClock


def test_a_call_after_the_end_touches_nobody_s_descriptor() -> None:
    loop = PlainLoop()
    loop.close()
    reader, writer = os.pipe()  # gets the numbers that were the loop's
    os.set_blocking(reader, False)

    loop.call_soon_threadsafe(lambda: None)

    try:
        written = os.read(reader, 1)
    except BlockingIOError:
        written = b""
    os.close(reader)
    os.close(writer)
    assert written == b""


def test_timers_run_in_the_order_of_their_time_when_the_clock_gets_there() -> None:
    clock = ManualClock()
    loop = PlainLoop(clock)
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
    loop.close()


def test_what_is_called_soon_runs_at_the_end_of_the_turn_and_what_that_calls_soon_in_the_next() -> None:
    loop = PlainLoop()
    ran: list[str] = []

    def first() -> None:
        ran.append("first")
        loop.call_soon(lambda: ran.append("second"))

    loop.call_last(lambda: ran.append("last"))
    loop.call_soon(first)
    loop.call_soon_threadsafe(lambda: ran.append("from outside"))

    loop.run_once()
    assert ran == ["from outside", "first", "last"]
    loop.run_once()

    assert ran == ["from outside", "first", "last", "second"]
    loop.close()
