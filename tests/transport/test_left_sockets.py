"""Sockets of connections that are still open, or on their way, when a loop ends are closed, not left to the garbage collector."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from amqtask import AmqTask
from amqtask.testing.worker import start_worker
from amqtask.transport.connection import LoopConnection
from amqtask.transport.loop import PikaLoop
from amqtask.transport.memory.server import MemoryServer
from amqtask.transport.url import parse_broker_urls


@contextmanager
def nothing_left() -> Iterator[None]:
    """No socket is left to the garbage collector in the block."""
    gc.collect()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", ResourceWarning)
        yield
        gc.collect()
    assert [str(one.message) for one in warned if one.category is ResourceWarning] == []


class Quiet:
    """A user of a connection that does nothing but wait for it."""

    opened = False

    def on_open(self, connection: Any) -> None:
        self.opened = True

    def on_lost(self, error: Exception) -> None: ...

    on_unreachable = on_refused = on_lost

    def on_blocked(self, reason: str | None) -> None: ...


def test_of_an_open_connection() -> None:
    server = MemoryServer().start()

    with nothing_left():
        loop, user = PikaLoop(), Quiet()
        LoopConnection(parse_broker_urls(server.url), loop).join(user).start()
        while not user.opened:
            loop.run_once(0.01)
        loop.close()
        del loop, user
    server.stop()


def test_of_a_worker_that_ends_without_closing_its_connections() -> None:
    server = MemoryServer().start()

    with nothing_left():
        app = AmqTask("tasks", broker=server.url, set_as_current=False)
        with start_worker(app, any_broker=True) as worker:
            worker.loop.call_soon_threadsafe(worker.loop.stop)
        app.close()
        del app, worker
    server.stop()
