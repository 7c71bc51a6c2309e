"""A second consumer of a queue over the connection of the first: on a channel of its own, which it closes when it stops."""

from __future__ import annotations

from amqtask.protocol.entities import Queue, arguments
from amqtask.protocol.message import Message, Properties
from amqtask.testing.loop import PlainLoop
from amqtask.testing.suites.transport import Listener
from amqtask.transport.amqp import AmqpSharedEnds
from amqtask.transport.connection import LoopConnection
from amqtask.transport.consumer import PikaConsumer
from amqtask.transport.memory.broker import ManualClock, MemoryBroker
from amqtask.transport.memory.local import MemoryAddress
from amqtask.transport.publisher import PikaPublisher

QUEUE = Queue("q", arguments=arguments({"x-queue-type": "quorum"}))


class Place:
    """A queue with numbered messages, and the first consumer of it, which may hold one."""

    def __init__(self, messages: int) -> None:
        clock = ManualClock()
        addresses = [MemoryAddress(broker=MemoryBroker(clock=clock))]
        publisher = PikaPublisher(addresses, timeout=1.5, on_warning=lambda text: None)
        publisher.declare([QUEUE])
        for number in range(messages):
            publisher.publish(Message(b"%d" % number, Properties(), "", QUEUE.name))
        self.loop = PlainLoop(clock)
        self.connection = LoopConnection(addresses, self.loop)
        self.ends = AmqpSharedEnds(self.connection)
        self.listener = Listener()
        self.consumer = self.ends.consumer(self.listener)
        self.consumer.add_queue(QUEUE, prefetch=1)
        self.consumer.start()
        self.turn()

    def second(self, *, prefetch: int) -> tuple[Listener, PikaConsumer]:
        listener = Listener()
        consumer = self.ends.consumer(listener, is_second=True)
        consumer.add_queue(QUEUE, prefetch=prefetch, declare=())
        consumer.start()
        return listener, consumer

    def turn(self) -> None:
        for _ in range(60):
            self.loop.run_once()


def test_it_gets_what_the_first_has_no_room_for_and_answers_over_its_own_channel() -> None:
    place = Place(4)
    second, consumer = place.second(prefetch=2)
    place.turn()
    assert (place.listener.bodies, second.bodies) == ([b"0"], [b"1", b"2"])

    consumer.ack(second.deliveries[-1].tag, multiple=True)
    place.turn()

    assert (place.listener.bodies, second.bodies) == ([b"0"], [b"1", b"2", b"3"])


def test_when_it_stops_the_connection_stays_and_what_it_held_comes_again() -> None:
    place = Place(2)
    second, consumer = place.second(prefetch=5)
    place.turn()
    assert second.bodies == [b"1"]

    consumer.stop()
    place.turn()
    place.consumer.ack(place.listener.deliveries[0].tag)
    place.turn()

    assert place.listener.bodies == [b"0", b"1"]
    assert [delivery.redelivered for delivery in place.listener.deliveries] == [False, True]
    assert {delivery.epoch for delivery in place.listener.deliveries} == {place.consumer.epoch}
    assert len(place.connection.users) == 1, "nothing is left of it"


def test_one_that_is_stopped_before_it_began_gets_nothing() -> None:
    place = Place(2)
    second, consumer = place.second(prefetch=5)
    place.loop.run_once()

    consumer.stop()
    place.turn()
    place.consumer.ack(place.listener.deliveries[0].tag)
    place.turn()

    assert (place.listener.bodies, second.bodies) == ([b"0", b"1"], [])
