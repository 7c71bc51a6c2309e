"""The forwarder: holds delayed messages until their time, then publishes them to where they were addressed."""

from __future__ import annotations

import itertools
from typing import Any

from pika.exceptions import ChannelClosedByBroker

from amqtask.exceptions import AccessRefused, MessageRefused, PublishError, PublishRefused, PublishTimeout, Unroutable
from amqtask.protocol.message import Delivery, Message, Properties
from amqtask.services import forwarder
from amqtask.services.forwarder import Forwarder
from amqtask.topology.delays import DelayPlan
from amqtask.transport.contract import ConsumerListener
from tests.worker.fakes import HandLoop, HandPublisher, ToldConsumer


class Place:
    """A forwarder, its two ends, and a clock that is turned by hand."""

    def __init__(self) -> None:
        self.loop = HandLoop()
        self.plan = DelayPlan(clock=self.now)
        self.consumer = ToldConsumer()
        # Those that were made beside it, and who listens to them.
        self.further: list[tuple[ToldConsumer, ConsumerListener]] = []
        self.publisher = HandPublisher()
        self.tags = itertools.count(1)
        self.forwarder = Forwarder(
            loop=self.loop,
            delays=self.plan,
            make_ends=lambda listener: (self.consumer, self.publisher, self.make_further),
            wall_clock=self.now,
            monotonic=lambda: self.loop.now,
        )
        # Seconds by which the wall clock was set.
        self.set_by = 0.0
        self.forwarder.start()
        self.loop.advance(forwarder.START_SECONDS)

    def now(self) -> float:
        return 1_700_000_000 + self.loop.now + self.set_by

    def make_further(self, listener: ConsumerListener) -> ToldConsumer:
        consumer = ToldConsumer()
        self.further.append((consumer, listener))
        return consumer

    def message(self, seconds: float, *, to: str = "", body: bytes = b"", eta: str | None = None) -> Message:
        return self.plan.delayed(Message(body, Properties(headers={"task": "t", "eta": eta}), to, "work"), seconds)

    def deliver(self, message: Message, queue: str | None = None, *, epoch: int = 1, further: int | None = None) -> int:
        """As the broker does when the message is at the head of its queue, to the first consumer or a `further` one; the tag."""
        if queue is None:
            headers = message.properties.headers
            level = max(level for level in range(9) if f"amqtask-delay-{level}" in headers)
            queue = self.plan.queue_name(level, int(headers[f"amqtask-delay-{level}"], 16))
        tag = next(self.tags)
        delivery = Delivery(
            message.body, message.properties, message.exchange, message.routing_key, False, queue, tag, epoch
        )
        listener = self.forwarder if further is None else self.further[further][1]
        listener.on_delivery(delivery)
        return tag

    @property
    def sent(self) -> list[tuple[str, str, bytes]]:
        return [(message.exchange, message.routing_key, message.body) for message in self.publisher.sent]


def test_what_it_holds_is_told_the_soonest_first() -> None:
    place = Place()
    for seconds in (100, 10, 50):
        place.deliver(place.message(seconds, body=str(seconds).encode()))

    assert [(due - place.now(), delivery.body) for due, delivery in place.forwarder.soonest(2)] == [
        (10, b"10"),
        (50, b"50"),
    ]


def test_what_it_holds_for_an_address_is_counted_and_dropped_and_the_rest_goes_on() -> None:
    place = Place()
    tags = [place.deliver(place.message(10, body=b"queue")) for _ in range(2)]
    place.deliver(place.message(5, to="x", body=b"exchange"))
    place.deliver(place.message(20, body=b"queue"))

    assert place.forwarder.count(("", "work")) == 3
    assert place.forwarder.count(("x", "work")) == 1
    assert place.forwarder.count(("", "other")) == 0
    assert place.forwarder.drop(("", "work")) == 3
    assert sorted(place.consumer.frames)[:2] == [("ack", tag, False) for tag in tags]
    assert place.forwarder.count(("", "work")) == 0
    place.loop.advance(30)
    assert [body for _, _, body in place.sent] == [b"exchange"]


def test_what_is_being_published_is_not_dropped() -> None:
    place = Place()
    tag = place.deliver(place.message(1))
    place.loop.advance(2)

    assert place.forwarder.drop(("", "work")) == 0
    place.publisher.confirm()
    assert place.consumer.frames == [("ack", tag, False)]


def test_a_message_is_held_until_its_time_then_published_then_acknowledged() -> None:
    place = Place()
    tag = place.deliver(place.message(10, body=b"b"))

    place.loop.advance(9.9)
    assert place.sent == []
    place.loop.advance(0.2)
    assert place.sent == [("", "work", b"b")]
    assert place.consumer.frames == []
    place.publisher.confirm()
    assert place.consumer.frames == [("ack", tag, False)]


def test_messages_go_in_the_order_of_their_times() -> None:
    place = Place()
    for seconds in (3, 1, 2):
        place.deliver(place.message(seconds, body=b"%d" % seconds))

    place.loop.advance(5)

    assert [body for _, _, body in place.sent] == [b"1", b"2", b"3"]


def test_what_comes_late_goes_at_once() -> None:
    place = Place()
    waiting = place.message(1, to="topics")
    place.loop.advance(60)

    place.deliver(waiting)

    assert place.sent == [("amqtask.delay.out", "work", b"")]


def test_what_was_held_on_a_lost_channel_is_forgotten_and_comes_again() -> None:
    place = Place()
    waiting = place.message(10)
    place.deliver(waiting)
    place.forwarder.on_connection_lost(ConnectionResetError())

    place.loop.advance(20)
    assert place.sent == []
    tag = place.deliver(waiting, epoch=2)
    place.publisher.confirm()

    assert place.consumer.frames == [("ack", tag, False)]


def test_a_publish_that_is_lost_with_the_connection_is_neither_repeated_nor_acknowledged() -> None:
    place = Place()
    place.deliver(place.message(1))
    place.loop.advance(1)
    place.forwarder.on_connection_lost(ConnectionResetError())

    place.publisher.confirm(PublishTimeout("lost"))
    place.loop.advance(60)

    assert (len(place.sent), place.consumer.frames) == (1, [])


def test_a_refused_message_is_tried_again_and_then_waits_in_the_broker_so_that_others_have_its_place() -> None:
    place = Place()
    place.deliver(place.message(1))
    place.loop.advance(1)
    place.publisher.confirm(PublishRefused("full"))
    assert place.consumer.words == ["start", "leave"], "first another connection is tried"
    place.publisher.sent.clear()
    tag = place.deliver(place.message(0.001), epoch=2)
    place.loop.advance(0.1)

    for _ in range(forwarder.TRIES):
        place.publisher.confirm(PublishRefused("full"))
        place.loop.advance(forwarder.PAUSE_SECONDS)

    assert place.sent[:-1] == [("", "work", b"")] * forwarder.TRIES
    assert place.sent[-1][0] == "amqtask.delay.level.0"
    place.publisher.confirm()
    assert place.consumer.frames == [("ack", tag, False)]


def test_a_message_that_the_broker_takes_from_nobody_costs_the_others_no_connection() -> None:
    place = Place()
    place.deliver(place.message(1))
    place.loop.advance(1)
    place.publisher.confirm(MessageRefused("406"))

    assert place.consumer.words == ["start"]


def test_a_publish_that_is_not_confirmed_gets_another_connection() -> None:
    place = Place()
    waiting = place.message(1)
    place.deliver(waiting)
    place.loop.advance(1)

    for _ in range(5):
        place.loop.advance(forwarder.WATCH_SECONDS)
    assert place.consumer.words == ["start", "leave"]
    tag = place.deliver(waiting, epoch=2)
    place.publisher.confirm()  # of the old connection: it is void
    assert place.consumer.frames == []
    place.publisher.confirm()

    assert place.consumer.frames == [("ack", tag, False)]


def test_a_message_whose_queue_is_gone_waits_in_the_broker() -> None:
    place = Place()
    place.deliver(place.message(1))
    place.loop.advance(1)

    place.publisher.confirm(Unroutable("no queue"))
    place.loop.advance(forwarder.PAUSE_SECONDS)

    assert [exchange for exchange, _, _ in place.sent] == ["", "amqtask.delay.level.0"]


def test_a_message_that_cannot_be_published_at_all_is_left_to_the_broker() -> None:
    place = Place()
    tag = place.deliver(place.message(1))
    place.loop.advance(1)

    while not place.consumer.frames:
        place.publisher.confirm(PublishError("headers that nobody can write"))
        place.loop.advance(forwarder.PAUSE_SECONDS)

    assert place.consumer.frames == [("reject", tag, False)]


def test_who_may_not_publish_to_the_default_exchange_lets_the_broker_do_it() -> None:
    place = Place()
    place.deliver(place.message(1))
    place.loop.advance(1)

    place.publisher.confirm(AccessRefused("no"))
    place.loop.advance(forwarder.PAUSE_SECONDS)

    assert [exchange for exchange, _, _ in place.sent] == ["", "amqtask.delay.out"]
    assert place.publisher.sent[-1].properties.headers["amqtask-delay-to"] == ""


def test_a_message_that_says_no_place_is_dropped_and_does_not_go_round() -> None:
    place = Place()

    tag = place.deliver(Message(b"", Properties(), "", "amqtask.delay.0s"), "amqtask.delay.0s")

    assert (place.sent, place.consumer.frames) == ([], [("ack", tag, False)])


def test_a_message_that_claims_a_time_beyond_its_queue_is_held_no_longer_than_the_queue_is_for() -> None:
    place = Place()
    message = place.message(6)
    message.properties.headers["amqtask-delay-until"] = 2**60

    place.deliver(message)
    place.loop.advance(9)

    assert len(place.sent) == 1


def fill(place: Place, *, further: int | None = None) -> None:
    """As many messages as the first consumer of a queue may hold, due in 3 s."""
    for _ in range(forwarder.WINDOW):
        place.deliver(place.message(3), further=further)


def test_a_window_grows_beside_the_consumers_that_are_there_while_messages_that_are_soon_due_fill_it() -> None:
    place = Place()
    before = dict(place.consumer.windows)
    fill(place)

    assert [consumer.windows for consumer, _ in place.further] == [{"amqtask.delay.0s": forwarder.WINDOW}]
    fill(place, further=0)
    assert [consumer.windows["amqtask.delay.0s"] for consumer, _ in place.further] == [
        forwarder.WINDOW,
        2 * forwarder.WINDOW,
    ]
    # A channel that starts or cancels a consumer may stand still, with all that it has.
    assert (place.consumer.windows, place.consumer.words) == (before, ["start"])
    assert place.further[0][0].words == ["start"]


def test_what_a_further_consumer_gets_is_forwarded_and_answered_where_it_came() -> None:
    place = Place()
    fill(place)
    tag = place.deliver(place.message(2, body=b"further"), further=0)

    place.loop.advance(2.5)
    assert place.sent == [("", "work", b"further")]
    place.publisher.confirm()

    assert (place.further[0][0].frames, place.consumer.frames) == ([("ack", tag, False)], [])


def test_a_window_shrinks_as_its_last_consumer_ends_once_that_publishes_nothing() -> None:
    place = Place()
    place.loop.advance(forwarder.SHRINK_SECONDS - 3.5)
    fill(place)
    place.deliver(place.message(3.3), further=0)
    place.loop.advance(3.1)
    for _ in range(forwarder.WINDOW):
        place.publisher.confirm()

    place.loop.advance(0.5)
    assert place.publisher.outstanding == 1
    assert place.further[0][0].words == ["start"]
    place.publisher.confirm()
    place.loop.advance(forwarder.SHRINK_SECONDS - 1)
    sent = len(place.sent)
    place.deliver(place.message(3), further=0)
    place.loop.advance(5)

    assert place.further[0][0].words == ["start", "stop"]
    assert place.consumer.words == ["start"]
    assert len(place.sent) == sent, "what it held comes again"


def test_what_a_further_consumer_held_is_forgotten_with_its_channel_and_the_rest_is_kept() -> None:
    place = Place()
    fill(place)
    lost = place.message(2, body=b"further")
    place.deliver(lost, further=0)

    place.further[0][1].on_connection_lost(ConnectionResetError())
    place.loop.advance(4)

    assert [body for _, _, body in place.sent] == [b""] * forwarder.WINDOW
    assert place.further[0][0].words[-1] == "stop"
    place.deliver(lost)
    assert place.sent[-1] == ("", "work", b"further")


def test_where_a_further_channel_ends_the_connection_there_is_none_for_a_minute() -> None:
    place = Place()
    fill(place)

    # As RabbitMQ does where the user may open so many channels and no more.
    place.forwarder.on_connection_lost(ConnectionResetError("no more channels"))
    for epoch in (2, 3):
        for _ in range(forwarder.WINDOW):
            place.deliver(place.message(3), epoch=epoch)
        assert len(place.further) == epoch - 1
        place.loop.advance(forwarder.RETRY_SECONDS)


def test_further_consumers_end_with_the_first_ones_channel() -> None:
    place = Place()
    fill(place)
    place.deliver(place.message(2, body=b"further"), further=0)

    place.forwarder.on_connection_lost(ConnectionResetError())
    place.loop.advance(4)

    assert (place.sent, place.further[0][0].words) == ([], ["start", "stop"])


def test_long_waits_are_held_to_their_end_while_there_is_room_and_go_down_a_level_when_there_is_not() -> None:
    place = Place()
    for _ in range(forwarder.WINDOW):
        place.deliver(place.message(100))

    place.loop.advance(100 - 36 - 9)
    moved = len(place.sent)
    place.publisher.confirm_all()
    place.loop.advance(60)

    assert 0 < moved <= forwarder.WINDOW
    exchanges = [exchange for exchange, _, _ in place.sent]
    assert set(exchanges[:moved]) == {"amqtask.delay.level.0"}
    assert exchanges[moved:] == [""] * (forwarder.WINDOW - moved)


def test_what_is_being_published_when_the_worker_stops_is_still_acknowledged() -> None:
    place = Place()
    tag = place.deliver(place.message(1))
    place.deliver(place.message(30))
    place.loop.advance(1)

    place.forwarder.stop()
    assert place.consumer.words[-1] == "pause"
    place.publisher.confirm()

    assert place.consumer.frames == [("ack", tag, False)]
    assert place.consumer.words[-1] == "stop"
    place.forwarder.stop()


def test_without_the_right_to_the_queues_the_worker_says_so_once_and_looks_again(caplog: Any) -> None:
    place = Place()

    for _ in range(2):
        place.forwarder.on_fatal(AccessRefused("no"))
        place.loop.advance(forwarder.RETRY_SECONDS)

    assert place.consumer.words.count("start") == 3
    assert [record.message.count("topology declare") for record in caplog.records] == [1]


def test_a_broker_that_takes_back_what_is_held_is_told_once_with_what_to_do(caplog: Any) -> None:
    place = Place()
    text = "PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out. Timeout value used: 3000 ms. This timeout …"

    for _ in range(2):
        place.deliver(place.message(10))
        place.forwarder.on_connection_lost(ChannelClosedByBroker(406, text))

    assert [record.message.count("Raise consumer_timeout") for record in caplog.records] == [1]


def test_what_it_holds_and_is_meant_runs_now_or_not_at_all() -> None:
    place = Place()
    for body in (b"now", b"never", b"later"):
        place.deliver(place.message(10, body=body))

    assert place.forwarder.release(lambda delivery: delivery.body == b"now") == 1
    assert place.forwarder.release(lambda delivery: delivery.body == b"never", revoked=True) == 1
    assert place.forwarder.release(lambda delivery: delivery.body == b"never") == 0

    assert place.sent == [("", "work", b"now"), ("", "work", b"never")]
    now, never = (message.properties.headers for message in place.publisher.sent)
    assert (now["eta"], now.get("expires")) == (None, None)
    assert never["expires"] < "2001"
    place.publisher.confirm_all()
    place.loop.advance(11)
    assert place.sent[-1] == ("", "work", b"later")


def test_what_waits_for_so_long_does_not_wait_longer_when_the_clock_is_put_back() -> None:
    place = Place()
    place.deliver(place.message(10, body=b"so long"))
    place.deliver(place.message(10, body=b"until then", eta="2023-11-14T22:30:10"))
    place.loop.advance(5)
    place.set_by = -86400.0
    place.deliver(place.message(2, body=b"new"))

    place.loop.advance(5.1)
    assert [body for _, _, body in place.sent] == [b"new", b"so long"]
    place.publisher.confirm()
    place.publisher.confirm()
    # No message stays longer than its queue's are to wait: the worker that gets it delays it again.
    place.loop.advance(20)
    assert [body for _, _, body in place.sent] == [b"new", b"so long", b"until then"]


def test_a_clock_that_is_put_back_keeps_nobody_from_seeing_a_publish_without_a_confirm() -> None:
    place = Place()
    place.deliver(place.message(1))
    place.loop.advance(2)
    place.set_by = -86400.0

    place.loop.advance(forwarder.STUCK_SECONDS + 2)

    assert "leave" in place.consumer.words
