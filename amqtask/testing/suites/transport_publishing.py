"""The promises of every transport about publishing: what is routed where, which error is whose, from a thread and from a loop."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from amqtask.exceptions import MessageTooLarge, PublishError, PublishRefused, Unroutable
from amqtask.protocol.entities import Arguments, Binding, Declaration, Exchange, Queue
from amqtask.protocol.message import Message, Properties
from amqtask.testing.suites.transport_parts import (
    CLASSIC,
    EXCHANGE_BINDINGS,
    HEADERS_EXCHANGES,
    STORED_FANOUTS,
    UNWRITABLE_HEADERS,
    TransportParts,
)

if TYPE_CHECKING:
    from amqtask.ground.shapes import FieldTable


class PublishingSuite(TransportParts):
    """A part of TransportSuite."""

    # -- errors

    def test_an_unroutable_message_is_an_error_of_its_own_publish(self) -> None:
        queue = Queue(self.name(), arguments=CLASSIC)
        good = Message(b"good", Properties(), "", queue.name, (queue,))
        bad = Message(b"bad", Properties(), "", self.name("nobody"))

        with pytest.raises(Unroutable, match="nobody"):
            self.publisher.publish(bad)
        errors = self.publisher.publish_many([good, bad, replace(bad, mandatory=False), good])

        assert [type(error) for error in errors] == [type(None), Unroutable, type(None), type(None)]

    def test_an_exchange_that_does_not_exist_is_an_error_of_its_own_publish(self) -> None:
        queue = Queue(self.name(), arguments=CLASSIC)
        good = Message(b"good", Properties(), "", queue.name, (queue,))
        bad = Message(b"bad", Properties(), self.name("no-exchange"), "key")

        errors = self.publisher.publish_many([good, bad, good])

        assert [type(error) for error in errors] == [type(None), Unroutable, type(None)]
        assert "no-exchange" in str(errors[1])

    def test_a_message_that_cannot_be_taken_makes_no_copy_of_others(self) -> None:
        queue = Queue(self.name(), arguments=CLASSIC)
        bad = Message(b"bad", Properties(), self.name("no-exchange"), "key")
        batch = [Message(b"%d" % number, Properties(), "", queue.name, (queue,)) for number in range(20)]
        batch.insert(10, bad)

        errors = self.publisher.publish_many(batch)

        assert [type(error) for error in errors if error is not None] == [Unroutable]
        assert self.stored(queue) == 20

    def test_a_full_queue_refuses(self) -> None:
        queue = Queue(self.name(), arguments=(*CLASSIC, ("x-max-length", 2), ("x-overflow", "reject-publish")))
        self.publish(queue, b"1", b"2")

        with pytest.raises(PublishRefused, match="full"):
            self.publish(queue, b"3")

    @pytest.mark.parametrize("headers", UNWRITABLE_HEADERS.values(), ids=UNWRITABLE_HEADERS)
    def test_headers_that_amqp_cannot_write_are_refused_and_do_no_harm(self, headers: FieldTable) -> None:
        queue = Queue(self.name(), arguments=CLASSIC)
        good = Message(b"good", Properties(), "", queue.name, (queue,))
        bad = Message(b"bad", Properties(headers=headers), "", queue.name)

        errors = self.publisher.publish_many([good, bad, good])

        assert errors[0] is errors[2] is None
        assert isinstance(errors[1], PublishError)
        assert len(str(errors[1])) < 1000
        assert self.stored(queue) == 2

    def test_the_error_of_headers_larger_than_a_frame_names_the_limit(self) -> None:
        message = Message(b"", Properties(headers={"large": "x" * 200_000}), "", self.name())

        with pytest.raises(MessageTooLarge, match=r"200,\d\d\d bytes.*frame_max"):
            self.publisher.publish(message)

    # -- routing

    @pytest.mark.parametrize(
        ("exchange_type", "binding_key", "binding_arguments", "hits", "misses"),
        [
            ("direct", "a", (), [("a", {})], [("b", {}), ("", {})]),
            ("fanout", "a", (), [("a", {}), ("b", {})], []),
            ("topic", "a.*.c", (), [("a.b.c", {})], [("a.c", {}), ("a.b.b.c", {})]),
            ("topic", "a.#", (), [("a", {}), ("a.b.c", {})], [("b.a", {})]),
            ("topic", "#.z", (), [("z", {}), ("x.y.z", {})], [("z.x", {})]),
            ("headers", "", (("a", "1"), ("b", 2)), [("k", {"a": "1", "b": 2})], [("k", {"a": "1"}), ("k", {})]),
            (
                "headers",
                "",
                (("a", "1"), ("b", 2), ("x-match", "any")),
                [("k", {"a": "1"}), ("k", {"b": 2})],
                [("k", {"a": "2"}), ("k", {})],
            ),
        ],
    )
    def test_an_exchange_routes_as_its_type_says(
        self, exchange_type: str, binding_key: str, binding_arguments: Arguments, hits: list[Any], misses: list[Any]
    ) -> None:
        for needed_by, feature in (("headers", HEADERS_EXCHANGES), ("fanout", STORED_FANOUTS)):
            if exchange_type == needed_by:
                self.need(feature)
        exchange, queue = Exchange(self.name("x"), exchange_type), Queue(self.name(), arguments=CLASSIC)
        declare = (exchange, queue, Binding(exchange, queue.name, binding_key, binding_arguments))
        messages = [
            Message(b"", Properties(headers=dict(headers)), exchange.name, key, declare)
            for key, headers in [*hits, *misses]
        ]

        errors = self.publisher.publish_many(messages)

        assert [error is None for error in errors] == [True] * len(hits) + [False] * len(misses)

    def test_an_exchange_bound_to_an_exchange_passes_messages_on_once(self) -> None:
        self.need(EXCHANGE_BINDINGS)
        first, second = Exchange(self.name("x"), "fanout"), Exchange(self.name("x"), "direct")
        queue = Queue(self.name(), arguments=CLASSIC)
        declare: tuple[Declaration, ...] = (
            first,
            second,
            queue,
            Binding(first, second.name, to_exchange=True),
            Binding(first, queue.name),
            Binding(second, queue.name, "key"),
        )
        self.publisher.publish(Message(b"1", Properties(), first.name, "key", declare))

        listener, _ = self.consume(queue)
        self.until(lambda: listener.deliveries)
        self.settle()

        assert listener.bodies == [b"1"]

    # -- from the loop

    def test_a_loop_publisher_confirms_each_message_or_names_what_failed(self) -> None:
        queue = Queue(self.name(), arguments=(*CLASSIC, ("x-max-length", 1), ("x-overflow", "reject-publish")))
        publisher = self.loop_publisher()
        answers: list[tuple[str, str]] = []

        def publish(name: str, message: Message) -> None:
            publisher.publish(message, lambda error: answers.append((name, type(error).__name__)))

        publish("stored", Message(b"1", Properties(), "", queue.name, (queue,)))
        publish("refused", Message(b"2", Properties(), "", queue.name, (queue,)))
        publish("returned", Message(b"3", Properties(), "", self.name("nobody")))
        publish("not mandatory", Message(b"4", Properties(), "", self.name("nobody"), mandatory=False))
        assert publisher.outstanding == 4
        assert answers == []
        self.until(lambda: publisher.outstanding == 0)

        assert len(answers) == 4
        assert dict(answers) == {
            "stored": "NoneType",
            "refused": "PublishRefused",
            "returned": "Unroutable",
            "not mandatory": "NoneType",
        }

    def test_a_message_that_a_loop_publisher_cannot_publish_makes_no_copy_of_others(self) -> None:
        queue = Queue(self.name(), arguments=CLASSIC)
        publisher = self.loop_publisher()
        missing = self.name("no-exchange")
        answers: list[tuple[bytes, str]] = []

        for number in range(60):
            body, is_bad = b"%d" % number, number % 20 == 10
            message = Message(body, Properties(), missing if is_bad else "", queue.name, () if is_bad else (queue,))
            publisher.publish(message, lambda error, body=body: answers.append((body, type(error).__name__)))  # type: ignore[misc]
            if not number % 7:
                self.loop.run_once(0.0)
        self.until(lambda: len(answers) == 60)

        assert {body for body, error in answers if error == "Unroutable"} == {b"10", b"30", b"50"}
        assert self.stored(queue) == 57

    def test_a_loop_publisher_stores_all_over_a_lost_connection(self) -> None:
        queue = Queue(self.name(), arguments=CLASSIC)
        publisher = self.loop_publisher()
        listener, _ = self.consume(queue, acks=True)
        confirmed: list[object] = []

        for number in range(200):
            publisher.publish(Message(b"%d" % number, Properties(), "", queue.name, (queue,)), confirmed.append)
            if number == 100:
                self.loop.run_once(0.0)
                self.cut()
        self.until(lambda: len(confirmed) == 200 and len(set(listener.bodies)) == 200)

        assert confirmed == [None] * 200

    def test_a_loop_publisher_refuses_headers_that_amqp_cannot_write_and_sends_the_others_once(self) -> None:
        queue = Queue(self.name(), arguments=CLASSIC)
        publisher = self.loop_publisher()
        answers: list[PublishError | None] = []
        for headers in UNWRITABLE_HEADERS.values():
            publisher.publish(Message(b"good", Properties(), "", queue.name, (queue,)), answers.append)
            publisher.publish(Message(b"bad", Properties(headers=headers), "", queue.name), answers.append)

        self.until(lambda: len(answers) == 2 * len(UNWRITABLE_HEADERS))

        assert sum(isinstance(error, PublishError) for error in answers) == len(UNWRITABLE_HEADERS)
        assert self.stored(queue) == len(UNWRITABLE_HEADERS)
