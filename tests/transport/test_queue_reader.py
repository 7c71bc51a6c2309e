"""QueueReader on the in-memory broker: replies to whoever waits, over one connection that may be lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from amqtask.exceptions import BrokerUnreachable, PublishError
from amqtask.protocol.entities import Queue
from amqtask.protocol.message import Delivery, Message, Properties
from amqtask.transport.memory.broker import MemoryBroker
from amqtask.transport.memory.local import MemoryAddress
from amqtask.transport.publisher import PikaPublisher
from amqtask.transport.queue_reader import QueueReader

PATIENCE = 60.0


class Desk:
    """A broker, a reader of its queue `replies`, and what the reader has handed over."""

    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self.addresses = [MemoryAddress(broker=self.broker)]
        self.publisher = PikaPublisher(self.addresses, timeout=PATIENCE)
        self.bodies: list[bytes] = []
        self.reader = QueueReader(self.addresses, Queue("replies"), self._on_reply)

    def _on_reply(self, delivery: Delivery) -> None:
        self.bodies.append(delivery.body)

    def reply(self, *bodies: bytes) -> None:
        for body in bodies:
            self.publisher.publish(Message(body, Properties(), "", "replies"))

    def read(self, *bodies: bytes) -> None:
        """Wait until these have come."""
        assert self.reader.drive(lambda: set(bodies) <= set(self.bodies), time.monotonic() + PATIENCE)

    def close(self) -> None:
        self.reader.close()
        self.publisher.close()


@pytest.fixture
def desk() -> Iterator[Desk]:
    made = Desk()
    made.reader.ensure(PATIENCE)
    yield made
    made.close()


def test_a_burst_of_replies_comes_in_order_and_is_acknowledged(desk: Desk) -> None:
    desk.reply(b"1", b"2", b"3")

    desk.read(b"3")

    assert desk.bodies == [b"1", b"2", b"3"]
    desk.broker.cut()
    assert desk.broker.count("replies") == 0


def test_a_reply_that_came_while_the_connection_was_lost_comes_once_it_is_back(desk: Desk) -> None:
    desk.broker.cut()
    desk.reply(b"meanwhile")

    desk.read(b"meanwhile")

    assert desk.bodies == [b"meanwhile"]


def test_replies_are_polled_without_waiting(desk: Desk) -> None:
    desk.reader.poll()
    assert desk.bodies == []

    desk.reply(b"1")
    desk.reader.poll()

    assert desk.bodies == [b"1"]


def test_threads_that_wait_at_once_all_get_their_reply(desk: Desk) -> None:
    bodies = [b"%d" % number for number in range(8)]
    threads = [threading.Thread(target=desk.read, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for body in reversed(bodies):
        desk.reply(body)
    for thread in threads:
        thread.join(PATIENCE)

    assert sorted(desk.bodies) == bodies


def test_a_wait_inside_a_reply_s_callback_is_an_error_and_no_deadlock(desk: Desk) -> None:
    errors: list[RuntimeError] = []

    def wait_again(delivery: Delivery) -> None:
        try:
            desk.reader.drive(lambda: False, time.monotonic() + PATIENCE)
        except RuntimeError as error:
            errors.append(error)

    desk.reader.on_reply = wait_again
    desk.reply(b"1")
    desk.reader.drive(lambda: bool(errors), time.monotonic() + PATIENCE)

    assert "would wait for ever" in str(errors[0])


def test_the_queue_is_deleted_with_its_reader(desk: Desk) -> None:
    desk.reader.close()

    assert desk.broker.queue_names() == []
    with pytest.raises(BrokerUnreachable, match="closed"):
        desk.reader.drive(lambda: False, time.monotonic() + PATIENCE)


def test_a_stopped_broker_is_unreachable_at_the_deadline(desk: Desk) -> None:
    desk.broker.stop()

    with pytest.raises(BrokerUnreachable, match="memory://"):
        desk.reader.drive(lambda: False, time.monotonic() + 0.5)


def test_a_queue_of_another_connection_is_refused(desk: Desk) -> None:
    mine, yours = (QueueReader(desk.addresses, Queue("mine", exclusive=True), lambda _: None) for _ in range(2))
    mine.ensure(PATIENCE)

    with pytest.raises(PublishError, match="RESOURCE_LOCKED"):
        yours.ensure(PATIENCE)
    mine.close()
