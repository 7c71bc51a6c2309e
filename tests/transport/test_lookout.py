"""Lookout: an answer that comes when nothing is consumed any more, as the consumer's channel was closed after the question."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from amqtask.protocol.entities import Queue, arguments
from amqtask.testing.loop import PlainLoop
from amqtask.testing.suites.transport import Listener
from amqtask.transport.connection import ConnectionListener, ConnectionUse, LoopConnection
from amqtask.transport.consumer import PikaConsumer
from amqtask.transport.lookout import TICK_SECONDS, Lookout, Watch, Watched
from amqtask.transport.memory.broker import ManualClock, MemoryBroker
from amqtask.transport.memory.local import MemoryAddress
from amqtask.transport.publisher import PikaPublisher
from amqtask.transport.wire import Wire

QUEUE = Queue("silent", arguments=arguments({"x-queue-type": "quorum"}))


class Bench(ConnectionListener):
    """A lookout that is told of a queue when it asks first, and of none afterwards."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.loop = PlainLoop(self.clock)
        self.addresses = [MemoryAddress(broker=MemoryBroker())]
        self.lost: list[Exception] = []
        self.looks = 0
        self.asked_elsewhere: list[int] = []
        publisher = PikaPublisher(self.addresses, timeout=1.5)
        publisher.declare([QUEUE])
        publisher.close()
        self._connection = LoopConnection(self.addresses, self.loop)
        self._lookout = Lookout(
            self.loop,
            watched=self._watched,
            on_stalled=lambda queue, why: None,
            on_better=lambda steps, why: None,
            elsewhere=self._elsewhere,
            hosts=2,
        )
        self._connection.join(self).start()
        self.turn()

    def consume(self) -> None:
        """So that the answer says that the queue has a consumer."""
        consumer = PikaConsumer(LoopConnection(self.addresses, self.loop), Listener())
        consumer.add_queue(QUEUE, prefetch=1)
        consumer.start()
        self.turn()

    def ask(self) -> None:
        """Have the lookout ask, and get the answer."""
        self.clock.advance(TICK_SECONDS)
        self.turn()
        assert self.looks > 1, "no answer came"

    def turn(self) -> None:
        for _ in range(60):
            self.loop.run_once()

    def _watched(self) -> list[Watched]:
        self.looks += 1
        return [Watched(QUEUE, Watch(has_moved=False), 1)] if self.looks == 1 else []

    def _elsewhere(self, steps: int, listener: ConnectionListener) -> ConnectionUse:
        self.asked_elsewhere.append(steps)
        return self._connection.elsewhere(steps, listener)

    def on_open(self, connection: Wire) -> None:
        self._lookout.begin(connection)

    def on_lost(self, error: Exception) -> None:
        self.lost.append(error)

    def on_refused(self, error: Exception) -> None:
        self.lost.append(error)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.loop.close()


def test_an_answer_for_what_is_not_consumed_any_more_costs_no_connection(bench: Bench) -> None:
    bench.consume()

    bench.ask()

    assert bench.lost == []


def test_no_other_host_is_asked_when_nothing_is_consumed_any_more(bench: Bench) -> None:
    bench.ask()

    assert bench.asked_elsewhere == []
