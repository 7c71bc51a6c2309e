"""PikaCollector on the in-memory broker: all messages of a queue once it has so many, for one process at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest

from amqtask.protocol.entities import Queue
from amqtask.protocol.message import Delivery, Message, Properties
from amqtask.testing.loop import PlainLoop
from amqtask.transport.collector import PikaCollector
from amqtask.transport.connection import LoopConnection
from amqtask.transport.contract import QueuePresence
from amqtask.transport.memory.broker import MemoryBroker
from amqtask.transport.memory.local import MemoryAddress
from amqtask.transport.publisher import PikaPublisher

PARTS = Queue("parts")


class Table:
    """A broker with a queue of parts, and collectors that look at it."""

    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self.addresses = [MemoryAddress(broker=self.broker)]
        self.publisher = PikaPublisher(self.addresses, timeout=60.0)
        self.publisher.declare([PARTS])
        self.loop = PlainLoop()
        self.collectors = [PikaCollector(LoopConnection(self.addresses, self.loop)) for _ in range(2)]
        self.taken: list[list[bytes]] = []
        self.finish: list[Callable[[bool], None]] = []
        self.done: list[QueuePresence] = []

    def put(self, *bodies: bytes) -> None:
        for body in bodies:
            self.publisher.publish(Message(body, Properties(), "", "parts"))

    def look(self, size: int, *, takes: bool = True, collector: int = 0) -> None:
        def take(deliveries: Sequence[Delivery], finished: Callable[[bool], None]) -> bool:
            self.taken.append([delivery.body for delivery in deliveries])
            self.finish.append(finished)
            return takes

        self.collectors[collector].collect("parts", size, take=take, on_done=self.done.append)

    def close(self) -> None:
        for collector in self.collectors:
            collector.stop()
        self.publisher.close()
        self.loop.close()


@pytest.fixture
def table() -> Iterator[Table]:
    made = Table()
    yield made
    made.close()


def test_a_queue_that_is_not_full_is_left_as_it_is(table: Table) -> None:
    table.put(b"1")
    table.look(2)
    table.loop.run_until(lambda: table.done)

    assert (table.done, table.taken) == ([QueuePresence.THERE], [])
    assert table.broker.count("parts") == 1


def test_a_full_queue_is_taken_whole_and_deleted_once_it_is_dealt_with(table: Table) -> None:
    table.put(b"1", b"2")
    table.look(2)
    table.loop.run_until(lambda: table.finish)
    assert table.taken == [[b"1", b"2"]]
    assert "parts" in table.broker.queue_names()

    table.finish[0](True)
    table.loop.run_until(lambda: table.done)

    assert table.done == [QueuePresence.GONE]
    assert table.broker.queue_names() == []


def test_messages_that_are_not_wanted_yet_go_back_in_their_order(table: Table) -> None:
    table.put(b"1", b"2")
    table.look(2, takes=False)
    table.loop.run_until(lambda: table.done)

    assert table.done == [QueuePresence.THERE]
    assert [body for _, body in table.broker.messages("parts")] == [b"1", b"2"]


def test_what_is_given_up_after_all_goes_back(table: Table) -> None:
    table.put(b"1", b"2")
    table.look(2)
    table.loop.run_until(lambda: table.finish)

    table.finish[0](False)
    table.loop.run_until(lambda: table.done)

    assert table.done == [QueuePresence.AWAY]
    table.loop.run_until(lambda: table.broker.count("parts") == 2)


def test_a_second_process_leaves_a_taken_queue_to_the_first(table: Table) -> None:
    table.put(b"1", b"2")
    table.look(2)
    table.loop.run_until(lambda: table.finish)

    table.look(0, collector=1)
    table.loop.run_until(lambda: table.done)

    assert (table.done, len(table.taken)) == ([QueuePresence.THERE], 1)


def test_a_queue_that_is_deleted_is_gone(table: Table) -> None:
    table.broker.delete_queue("parts")
    table.look(2)
    table.loop.run_until(lambda: table.done)

    assert table.done == [QueuePresence.GONE]


def test_a_look_begins_again_when_the_connection_is_lost_on_the_way(table: Table) -> None:
    table.put(b"1", b"2")
    table.look(2)
    table.loop.run_until(lambda: len(table.broker.queue_names()) == 1)
    table.broker.cut()
    table.loop.run_until(lambda: table.finish)

    assert table.taken[-1] == [b"1", b"2"]
