"""The conformance suite for transports: subclass TransportSuite, say how its parts are made, and let pytest collect it.

    class TestMyTransport(TransportSuite):
        def make_publisher(self): ...
        def make_loop(self): ...
        def make_consumer(self, loop, listener): ...
        def make_loop_publisher(self, loop, on_warning): ...
        def cut(self): ...          # end all connections from outside
        def delete_queue(self, name): ...

Each test has queues of its own; `name(…)` gives a name that `clean_up` deletes afterwards. What a broker does not have stands in
`lacks`; the tests of that are skipped.
"""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from amqtask.exceptions import Unroutable
from amqtask.protocol.entities import Binding, Declaration, Exchange, Queue, arguments
from amqtask.protocol.message import Delivery, Message, Properties
from amqtask.testing.suites.transport_publishing import CLASSIC as CLASSIC
from amqtask.testing.suites.transport_publishing import DELIVERIES_OF_ONE_CONNECTION as DELIVERIES_OF_ONE_CONNECTION
from amqtask.testing.suites.transport_publishing import EXCHANGE_BINDINGS as EXCHANGE_BINDINGS
from amqtask.testing.suites.transport_publishing import EXCLUSIVE_QUEUES as EXCLUSIVE_QUEUES
from amqtask.testing.suites.transport_publishing import HEADERS_EXCHANGES as HEADERS_EXCHANGES
from amqtask.testing.suites.transport_publishing import PATIENCE as PATIENCE
from amqtask.testing.suites.transport_publishing import RISING_PRIORITIES as RISING_PRIORITIES
from amqtask.testing.suites.transport_publishing import STORED_FANOUTS as STORED_FANOUTS
from amqtask.testing.suites.transport_publishing import TIME_TO_LIVE as TIME_TO_LIVE
from amqtask.testing.suites.transport_publishing import UNWRITABLE_HEADERS as UNWRITABLE_HEADERS
from amqtask.testing.suites.transport_publishing import Listener as Listener
from amqtask.testing.suites.transport_publishing import PublishingSuite
from amqtask.testing.suites.transport_publishing import TurningLoop as TurningLoop
from amqtask.topology.delays import DelayPlan


def _living(message: Message, seconds: float) -> Message:
    """The delayed message with delay queues that expire after so many seconds, in place of the 10 s that workers need."""

    def short(entity: Declaration) -> Declaration:
        if not isinstance(entity, Queue) or not entity.argument_map.get("x-message-ttl"):
            return entity
        return replace(entity, arguments=arguments({**entity.argument_map, "x-message-ttl": int(seconds * 1000)}))

    return replace(message, declare=tuple(map(short, message.declare)))


class TransportSuite(PublishingSuite):
    """The promises of every transport."""

    # -- publish and deliver

    def test_a_message_arrives_as_it_was_published(self) -> None:
        queue = Queue(self.name(), arguments=CLASSIC)
        headers = {"task": "a.b", "retries": 2, "none": None, "yes": True, "limits": [1.5, None], "deep": {"a": [1]}}
        properties = Properties(
            content_type="application/json", content_encoding="utf-8", headers=headers, priority=3,
            correlation_id="the-id", reply_to="me", message_id="m", type="t", app_id="a",
        )  # fmt: skip
        listener, _ = self.consume(queue)

        self.publisher.publish(Message(b"\x00body", properties, "", queue.name))
        self.until(lambda: listener.deliveries)

        (delivery,) = listener.deliveries
        assert (delivery.body, delivery.exchange, delivery.routing_key) == (b"\x00body", "", queue.name)
        assert (delivery.queue, delivery.redelivered, delivery.epoch) == (queue.name, False, listener.consuming[0])
        received = delivery.properties
        assert received.headers == headers
        assert (received.content_type, received.content_encoding) == ("application/json", "utf-8")
        assert (received.correlation_id, received.reply_to, received.priority) == ("the-id", "me", 3)
        assert (received.message_id, received.type, received.app_id, received.delivery_mode) == ("m", "t", "a", 2)

    def test_messages_of_one_queue_come_in_order(self) -> None:
        queue = Queue(self.name(), arguments=CLASSIC)
        bodies = [b"%d" % number for number in range(50)]
        self.publish(queue, *bodies)

        listener, _ = self.consume(queue)
        self.until(lambda: len(listener.deliveries) == 50)

        assert listener.bodies == bodies
        assert [delivery.tag for delivery in listener.deliveries] == list(range(1, 51))

    def test_what_a_message_needs_is_declared_for_it(self) -> None:
        exchange = Exchange(self.name("x"), "topic")
        queue = Queue(self.name(), arguments=CLASSIC)
        declare: tuple[Declaration, ...] = (exchange, queue, Binding(exchange, queue.name, "a.#"))

        self.publisher.publish(Message(b"1", Properties(), exchange.name, "a.b.c", declare))
        listener, _ = self.consume(queue)
        self.until(lambda: listener.deliveries)

        assert (listener.deliveries[0].exchange, listener.deliveries[0].routing_key) == (exchange.name, "a.b.c")

    def test_a_listener_that_fails_fails_for_one_message(self) -> None:
        queue = Queue(self.name(), arguments=CLASSIC)
        listener, _ = self.consume(queue)

        class Fails(list[Delivery]):
            def append(self, delivery: Delivery) -> None:
                super().append(delivery)
                if len(self) == 1:
                    raise ValueError("this one")

        listener.deliveries = Fails()
        self.publish(queue, b"1", b"2")
        self.until(lambda: len(listener.deliveries) == 2)

        assert listener.bodies == [b"1", b"2"]
        assert not listener.lost

    # -- answers

    def test_an_acked_message_is_gone_and_an_unanswered_one_comes_again(self) -> None:
        queue = Queue(self.name(), arguments=CLASSIC)
        self.publish(queue, b"1", b"2", b"3")
        listener, consumer = self.consume(queue)
        self.until(lambda: len(listener.deliveries) == 3)

        consumer.ack(2)
        self.stop(consumer)
        second, _ = self.consume(queue)
        self.until(lambda: len(second.deliveries) == 2)
        self.settle()

        assert second.bodies == [b"1", b"3"]
        assert all(delivery.redelivered for delivery in second.deliveries)

    def test_one_ack_can_answer_all_up_to_it(self) -> None:
        queue = Queue(self.name(), arguments=CLASSIC)
        self.publish(queue, b"1", b"2", b"3")
        listener, consumer = self.consume(queue)
        self.until(lambda: len(listener.deliveries) == 3)

        consumer.ack(2, multiple=True)
        self.stop(consumer)
        second, _ = self.consume(queue)
        self.until(lambda: second.deliveries)
        self.settle()

        assert second.bodies == [b"3"]

    def test_a_message_that_was_given_back_comes_again_at_once(self) -> None:
        queue, _ = self.work_queue()
        listener, consumer = self.consume(queue)
        self.publish(queue, b"1")
        self.until(lambda: listener.deliveries)

        consumer.nack(listener.deliveries[0].tag)
        self.until(lambda: len(listener.deliveries) == 2)

        assert listener.bodies == [b"1", b"1"]
        assert [delivery.redelivered for delivery in listener.deliveries] == [False, True]

    def test_a_quorum_queue_counts_rejects_and_dead_letters_past_its_limit(self) -> None:
        queue, dead = self.work_queue(**{"x-delivery-limit": 2})
        listener, consumer = self.consume(queue)
        letters, _ = self.consume(dead, acks=True)
        self.publish(queue, b"poison")

        for number in range(1, 4):
            self.until(lambda number=number: len(listener.deliveries) == number)  # type: ignore[misc]
            consumer.reject(listener.deliveries[-1].tag, requeue=True)
        self.until(lambda: letters.deliveries)

        counts = [(delivery.properties.headers or {}).get("x-delivery-count", 0) for delivery in listener.deliveries]
        assert counts == [0, 1, 2]
        (death,) = letters.deliveries[0].properties.headers["x-death"]
        assert (death["reason"], death["queue"], death["count"]) == ("delivery_limit", queue.name, 1)

    def test_a_rejected_message_goes_where_its_queue_says(self) -> None:
        dead = Queue(self.name("dead"), arguments=CLASSIC)
        queue = Queue(
            self.name(),
            arguments=arguments(
                {"x-queue-type": "classic", "x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead.name}
            ),
        )
        listener, consumer = self.consume(queue, dead_letter=dead)
        letters, _ = self.consume(dead, acks=True)
        self.publish(queue, b"1", headers={"kept": 1}, correlation_id="the-id")
        self.until(lambda: listener.deliveries)

        consumer.reject(listener.deliveries[0].tag, requeue=False)
        self.until(lambda: letters.deliveries)

        (letter,) = letters.deliveries
        headers = letter.properties.headers
        assert (letter.body, letter.properties.correlation_id, headers["kept"]) == (b"1", "the-id", 1)
        assert (headers["x-first-death-reason"], headers["x-first-death-queue"]) == ("rejected", queue.name)
        (death,) = headers["x-death"]
        assert (death["reason"], death["queue"], death["count"]) == ("rejected", queue.name, 1)
        assert (death["exchange"], death["routing-keys"]) == ("", [queue.name])

    # -- windows

    def test_no_more_than_the_window_is_unanswered(self) -> None:
        queue = Queue(self.name(), arguments=CLASSIC)
        self.publish(queue, *[b"%d" % number for number in range(10)])
        listener, consumer = self.consume(queue, prefetch=3)
        self.until(lambda: len(listener.deliveries) == 3)
        self.settle()
        assert len(listener.deliveries) == 3

        consumer.ack(1)
        self.until(lambda: len(listener.deliveries) == 4)
        self.settle()

        assert len(listener.deliveries) == 4

    def test_a_window_grows_and_shrinks_while_consuming(self) -> None:
        queue = Queue(self.name(), arguments=CLASSIC)
        self.publish(queue, *[b"%d" % number for number in range(20)])
        listener, consumer = self.consume(queue, prefetch=2)
        self.until(lambda: len(listener.deliveries) == 2)

        consumer.set_prefetch(queue.name, 6)
        self.until(lambda: len(listener.deliveries) == 6)
        self.settle()
        assert len(listener.deliveries) == 6

        consumer.set_prefetch(queue.name, 1)
        self.settle()
        consumer.ack(listener.deliveries[-1].tag, multiple=True)
        self.until(lambda: len(listener.deliveries) > 6)
        self.settle()
        held = len(listener.deliveries)
        consumer.ack(listener.deliveries[-1].tag, multiple=True)
        self.until(lambda: len(listener.deliveries) > held)
        self.settle()

        assert len(listener.deliveries) == held + 1
        assert listener.bodies == [b"%d" % number for number in range(held + 1)]

    def test_two_consumers_take_turns(self) -> None:
        queue = Queue(self.name(), arguments=CLASSIC)
        first, _ = self.consume(queue, prefetch=1, acks=True)
        second, _ = self.consume(queue, prefetch=1, acks=True)

        self.publish(queue, *[b"%d" % number for number in range(20)])
        self.until(lambda: len(first.deliveries) + len(second.deliveries) == 20)

        assert first.deliveries
        assert second.deliveries

    def test_a_paused_consumer_gets_nothing_and_can_still_answer(self) -> None:
        queue = Queue(self.name(), arguments=CLASSIC)
        listener, consumer = self.consume(queue, prefetch=1)
        self.publish(queue, b"1", b"2")
        self.until(lambda: listener.deliveries)

        consumer.pause()
        self.settle()
        consumer.ack(listener.deliveries[0].tag)
        self.settle()
        assert listener.bodies == [b"1"]
        assert not consumer.is_consuming

        consumer.resume()
        self.until(lambda: len(listener.deliveries) == 2)

        assert listener.bodies == [b"1", b"2"]
        assert not listener.deliveries[1].redelivered

    def test_a_cancelled_queue_stops_and_a_new_one_starts(self) -> None:
        first, second = Queue(self.name(), arguments=CLASSIC), Queue(self.name(), arguments=CLASSIC)
        listener, consumer = self.consume(first)
        self.publish(first, b"1")
        self.until(lambda: listener.deliveries)

        consumer.cancel_queue(first.name)
        consumer.ack(listener.deliveries[0].tag)
        consumer.add_queue(second, prefetch=10)
        self.settle()
        self.publish(first, b"to nobody")
        self.publish(second, b"2")
        self.until(lambda: len(listener.deliveries) == 2)
        self.settle()

        assert listener.bodies == [b"1", b"2"]
        assert [delivery.queue for delivery in listener.deliveries] == [first.name, second.name]

    # -- time and priority

    def test_higher_priorities_come_first(self) -> None:
        self.need(RISING_PRIORITIES)
        queue = Queue(self.name(), arguments=(*CLASSIC, ("x-max-priority", 9)))
        for body, priority in ((b"none", None), (b"low", 1), (b"high", 9), (b"low too", 1)):
            self.publish(queue, body, priority=priority)

        listener, _ = self.consume(queue)
        self.until(lambda: len(listener.deliveries) == 4)

        assert listener.bodies == [b"high", b"low", b"low too", b"none"]

    @pytest.mark.parametrize("by", ["message", "queue"])
    def test_a_message_that_nobody_takes_in_time_is_dead_lettered(self, by: str) -> None:
        self.need(TIME_TO_LIVE)
        queue, dead = self.work_queue(**({"x-message-ttl": 50} if by == "queue" else {}))
        letters, _ = self.consume(dead, acks=True)

        self.publish(queue, b"late", expiration="50" if by == "message" else None)
        self.until(lambda: letters.deliveries)

        properties = letters.deliveries[0].properties
        (death,) = properties.headers["x-death"]
        assert (death["reason"], death["queue"]) == ("expired", queue.name)
        assert death.get("original-expiration") == ("50" if by == "message" else None)
        assert properties.expiration is None

    def test_a_delayed_message_comes_after_its_time_to_where_it_was_addressed(self) -> None:
        prefix = self.name("delay")
        plan = DelayPlan(prefix, "classic")
        exchange, queue = Exchange(self.name("x"), "topic"), Queue(self.name(), arguments=CLASSIC)
        plain = Message(b"plain", Properties(), "", queue.name, (queue,))
        bound = Message(
            b"bound", Properties(), exchange.name, "a.b", (exchange, queue, Binding(exchange, queue.name, "a.*"))
        )
        began = time.monotonic()
        # Nobody forwards them, so they wait for as long as their queue says: here no longer than they must.
        delayed = [_living(plan.delayed(message, seconds), 2.5) for message, seconds in ((plain, 0.3), (bound, 2.1))]
        for entity in [declared for message in delayed for declared in message.declare]:
            if isinstance(entity, (Queue, Exchange)):
                self._names.append(entity.name)
        listener, _ = self.consume(queue, acks=True)
        arrived: list[float] = []

        self.publisher.publish_many(delayed)
        # After a stall both may come at once, and in any order.
        for count in (1, 2):
            self.until(lambda count=count: len(listener.deliveries) >= count)  # type: ignore[misc]
            arrived.append(time.monotonic() - began)

        after = dict(zip(listener.bodies, arrived, strict=True))
        by_body = {delivery.body: delivery for delivery in listener.deliveries}
        assert after[b"plain"] >= 0.3
        assert after[b"bound"] >= 2.1
        assert (by_body[b"plain"].exchange, by_body[b"plain"].routing_key) == ("", queue.name)
        assert by_body[b"bound"].routing_key == "a.b"

    # -- what exists already, and what goes away

    def test_a_queue_that_exists_with_other_arguments_is_used_as_it_is_found(self) -> None:
        queue = Queue(self.name(), arguments=CLASSIC)
        self.publisher.declare([queue])
        changed = replace(queue, arguments=arguments({"x-queue-type": "classic", "x-max-priority": 5}))

        listener, _ = self.consume(changed)
        self.publish(changed, b"1", b"2")
        self.until(lambda: len(listener.deliveries) == 2)

        for warnings in (listener.warnings, self.warnings):
            assert len(warnings) == 1
            assert queue.name in warnings[0]
            assert "x-max-priority" in warnings[0]
        assert not listener.fatal

    def test_an_exclusive_queue_of_another_connection_is_fatal(self) -> None:
        self.need(EXCLUSIVE_QUEUES)
        queue = Queue(self.name(), exclusive=True, arguments=CLASSIC)
        self.consume(queue)

        second_listener, _ = self.consumer(queue)
        self.until(lambda: second_listener.fatal)

        assert queue.name in str(second_listener.fatal[0])
        assert not second_listener.consuming

    def test_an_exclusive_queue_goes_with_its_connection(self) -> None:
        queue = Queue(self.name(), exclusive=True, arguments=CLASSIC)
        _, consumer = self.consume(queue)
        message = Message(b"1", Properties(), "", queue.name)
        self.publisher.publish(message)

        self.stop(consumer)

        with pytest.raises(Unroutable):
            self.publisher.publish(message)

    def test_a_deleted_queue_is_set_up_again(self) -> None:
        queue = Queue(self.name(), arguments=CLASSIC)
        listener, _ = self.consume(queue)

        self.delete_queue(queue.name)
        self.until(lambda: listener.cancelled)
        self.until(lambda: self._is_routed(queue))
        self.until(lambda: listener.deliveries)

        assert listener.cancelled == [queue.name]

    def _is_routed(self, queue: Queue) -> bool:
        return self.publisher.publish_many([Message(b"1", Properties(), "", queue.name)]) == [None]

    def test_after_a_lost_connection_the_unanswered_come_again_under_a_new_epoch(self) -> None:
        self.need(DELIVERIES_OF_ONE_CONNECTION)
        queue, _ = self.work_queue()
        listener, consumer = self.consume(queue)
        self.publish(queue, b"1", b"2")
        self.until(lambda: len(listener.deliveries) == 2)
        consumer.ack(1)
        self.settle()

        self.cut()
        self.until(lambda: len(listener.deliveries) == 3)

        old, new = listener.deliveries[1], listener.deliveries[2]
        assert listener.lost
        assert (new.body, new.redelivered) == (b"2", True)
        assert new.epoch > old.epoch
        assert new.epoch == consumer.epoch == listener.consuming[-1]
        assert new.properties.headers["x-delivery-count"] == 1
