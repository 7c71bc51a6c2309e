"""A listening socket on a loop, in a process that has no file descriptor left."""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

from amqtask.ground.accepting import Acceptor
from amqtask.testing.loop import PlainLoop
from amqtask.transport.memory.broker import ManualClock


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """All that the limit allows are taken, but for none that is in use."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.open(os.devnull, os.O_RDONLY)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken[0] + 20, hard))
    try:
        try:
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            pass
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for each in taken:
            os.close(each)


def turns(loop: PlainLoop, seconds: float) -> int:
    """How often the loop turns in so many seconds."""
    count, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        loop.run_once(seconds)
        count += 1
    return count


def test_a_connection_that_cannot_be_taken_waits_and_costs_no_processor() -> None:
    clock = ManualClock()
    loop = PlainLoop(clock)
    accepted: list[socket.socket] = []
    listener = socket.create_server(("127.0.0.1", 0))
    acceptor = Acceptor(loop, listener, accepted.append)
    acceptor.start()
    with socket.create_connection(listener.getsockname()):
        with no_descriptor_left():
            assert turns(loop, 0.1) < 10
        assert accepted == []

        clock.advance(1)
        loop.run_once()
        loop.run_once(5)

        assert len(accepted) == 1
    acceptor.stop()
    accepted[0].close()
    loop.close()


def test_room_that_is_made_is_used_at_once() -> None:
    loop = PlainLoop()
    accepted: list[socket.socket] = []
    listener = socket.create_server(("127.0.0.1", 0))
    kept = [os.open(os.devnull, os.O_RDONLY)]

    def make_room() -> bool:
        os.close(kept.pop())
        return True

    acceptor = Acceptor(loop, listener, accepted.append, make_room=make_room)
    acceptor.start()
    with socket.create_connection(listener.getsockname()), no_descriptor_left():
        loop.run_once(5)
        loop.run_once(5)
        assert len(accepted) == 1
    acceptor.stop()
    accepted[0].close()
    loop.close()
