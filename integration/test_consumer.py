"""PikaConsumer on a real broker: what breaks, what changes while it runs, and that no delivery gets lost in between.

What every transport keeps is in amqtask.testing.suites.transport; here is what needs a broker that fails.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Iterator

import pika
import pytest

from amqtask.exceptions import AccessRefused, OperationalError
from amqtask.protocol.entities import Binding, Exchange, Queue, arguments
from amqtask.testing.suites.transport import Listener
from integration.conftest import Broker
from integration.faults import LOGIN, VIRTUAL_HOST, Forwarder
from integration.looped import Looped, Sent
from integration.nodes import RabbitNode, free_port

QUORUM = arguments({"x-queue-type": "quorum"})
CLASSIC = arguments({"x-queue-type": "classic"})


@pytest.fixture
def queue(rabbit: Broker) -> Queue:
    """A quorum queue's entity; nothing declared it."""
    return Queue(rabbit.queue("consume"), arguments=QUORUM)


@pytest.fixture
def other(rabbit: Broker) -> Queue:
    """Another one."""
    return Queue(rabbit.queue("other"), arguments=QUORUM)


@pytest.fixture
def way(broker_url: str) -> Iterator[Forwarder]:
    """The way to the broker, for breaking."""
    with Forwarder(broker_url) as forwarder:
        yield forwarder


def fill(rabbit: Broker, queue: Queue, *bodies: bytes) -> None:
    """Into a queue that exists."""
    for body in bodies:
        rabbit.publish(queue.name, body, pika.BasicProperties(delivery_mode=2))


# -- answering while something else is set up


def test_an_answer_counts_although_another_queue_is_being_declared(
    rabbit: Broker, looped: Looped, queue: Queue, other: Queue
) -> None:
    listener, consumer = looped.consuming(queue)
    fill(rabbit, queue, b"one", b"two")
    looped.until(lambda: len(listener.deliveries) == 2)

    consumer.add_queue(other, prefetch=1)
    consumer.ack(listener.deliveries[0].tag)
    consumer.reject(listener.deliveries[1].tag, requeue=False)
    looped.stop(consumer)

    assert rabbit.count(queue.name) == 0


def test_a_queue_that_exists_with_other_arguments_costs_no_delivery_of_the_others(
    rabbit: Broker, looped: Looped, queue: Queue, other: Queue
) -> None:
    rabbit.channel().queue_declare(other.name, durable=True, arguments=dict(CLASSIC))
    listener, consumer = looped.consuming(queue)
    fill(rabbit, queue, b"held")
    looped.until(lambda: listener.deliveries)
    epoch = consumer.epoch

    consumer.add_queue(other, prefetch=1)
    fill(rabbit, other, b"found")
    looped.until(lambda: b"found" in listener.bodies)

    assert consumer.epoch == epoch
    assert listener.bodies == [b"held", b"found"]
    assert [other.name in text and "'classic'" in text for text in listener.warnings] == [True]


def test_a_queue_of_which_nobody_has_said_that_it_is_of_another_type_is_consumed(
    rabbit: Broker, looped: Looped, queue: Queue
) -> None:
    # As for a user that may not declare. RabbitMQ 4.3 takes some arguments only for consumers of quorum queues.
    rabbit.channel().queue_declare(queue.name, durable=True, arguments=dict(CLASSIC))
    listener, consumer = looped.consuming()
    consumer.add_queue(queue, prefetch=1, declare=())

    fill(rabbit, queue, b"found")

    looped.until(lambda: listener.bodies == [b"found"])


def test_a_queue_stops_while_another_one_is_being_declared(
    rabbit: Broker, looped: Looped, queue: Queue, other: Queue
) -> None:
    listener, consumer = looped.consuming(queue)

    consumer.add_queue(other, prefetch=1)
    consumer.cancel_queue(queue.name)
    looped.until(lambda: rabbit.exists(other.name))
    fill(rabbit, queue, b"not for us")
    fill(rabbit, other, b"for us")
    looped.until(lambda: listener.deliveries)

    assert listener.bodies == [b"for us"]
    assert rabbit.count(queue.name) == 1


def test_a_window_changes_while_another_queue_is_being_declared(
    rabbit: Broker, looped: Looped, queue: Queue, other: Queue
) -> None:
    listener, consumer = looped.consuming(queue, prefetch=1)
    fill(rabbit, queue, b"1", b"2", b"3", b"4")

    consumer.add_queue(other, prefetch=1)
    consumer.set_prefetch(queue.name, 3)
    looped.until(lambda: len(listener.deliveries) == 3)

    assert rabbit.count(queue.name) == 1


def test_a_pause_before_all_is_set_up_lets_nothing_through(rabbit: Broker, looped: Looped, queue: Queue) -> None:
    rabbit.channel().queue_declare(queue.name, durable=True, arguments=dict(QUORUM))
    fill(rabbit, queue, b"waiting")
    listener, consumer = looped.consumer(queue)
    # Its channel is open in this very turn, and its queue not yet declared.
    looped.until(lambda: consumer.epoch, turn=0)
    consumer.pause()
    witness, _ = looped.consuming(Queue(rabbit.queue("witness"), arguments=QUORUM))  # many round trips later
    assert witness.consuming
    assert not listener.deliveries
    assert not listener.consuming

    consumer.resume()
    looped.until(lambda: listener.deliveries and listener.consuming)

    assert listener.bodies == [b"waiting"]


# -- on the wire


def test_deliveries_of_all_sizes_arrive_whole_and_in_order(rabbit: Broker, looped: Looped, queue: Queue) -> None:
    # None, one or several body frames (of 131,072 bytes at most), in front of, across and after the ends of what is read.
    sizes = [0, 1, 60, 4000, 0, 4096, 131_064, 131_065, 7, 300_000, 0, 131_064 * 2, 3] * 8 + [500] * 300
    listener, _ = looped.consuming(queue, prefetch=1000)
    channel = rabbit.channel()
    channel.confirm_delivery()
    for number, size in enumerate(sizes):
        headers = {"number": number, "text": "é" * (number % 50)}
        properties = pika.BasicProperties(headers=headers, correlation_id=str(number), delivery_mode=2)
        channel.basic_publish("", queue.name, bytes([number % 256]) * size, properties)
    looped.until(lambda: len(listener.deliveries) == len(sizes))

    assert [len(body) for body in listener.bodies] == sizes
    for number, delivery in enumerate(listener.deliveries):
        assert delivery.body == bytes([number % 256]) * sizes[number]
        assert delivery.properties.headers == {"number": number, "text": "é" * (number % 50)}
        assert (delivery.properties.correlation_id, delivery.routing_key) == (str(number), queue.name)


# -- windows


def test_a_window_that_changes_all_the_time_loses_and_repeats_nothing(
    rabbit: Broker, looped: Looped, queue: Queue
) -> None:
    listener, consumer = looped.consuming(queue, prefetch=10)
    publisher = looped.publisher()
    sent = Sent(publisher)
    bodies = [str(number).encode() for number in range(3000)]
    for body in bodies:
        sent.publish(body, queue.name)
    answered = 0
    windows = [3, 40, 7, 8, 200, 1, 50]

    def answer() -> bool:
        nonlocal answered
        for delivery in listener.deliveries[answered:]:
            consumer.ack(delivery.tag)
            answered += 1
            if answered % 50 == 0:
                consumer.set_prefetch(queue.name, windows[answered // 50 % len(windows)])
        return answered >= len(bodies)

    looped.until(answer)

    assert Counter(listener.bodies) == Counter(bodies)
    # Some come as redelivered: what is between the queue and our channel when a consumer is cancelled, RabbitMQ takes back.
    looped.stop(consumer)
    assert rabbit.count(queue.name) == 0


def test_after_the_broker_cancelled_a_queue_its_window_is_whole_again(
    rabbit: Broker, looped: Looped, queue: Queue
) -> None:
    listener, consumer = looped.consuming(queue, prefetch=2)
    consumer.set_prefetch(queue.name, 5)  # two consumers: 2 and 3

    rabbit.channel().queue_delete(queue.name)
    looped.until(lambda: rabbit.exists(queue.name))
    fill(rabbit, queue, *[b"x"] * 8)
    looped.until(lambda: len(listener.deliveries) == 5)

    assert listener.cancelled == [queue.name]
    assert rabbit.count(queue.name) == 3


@pytest.mark.parametrize("prefetch", [2, 100], ids=["a window that the old deliveries fill", "a larger one"])
def test_a_queue_that_is_deleted_and_made_anew_at_once_is_consumed_again(
    rabbit: Broker, looped: Looped, queue: Queue, prefetch: int
) -> None:
    listener, consumer = looped.consuming(queue, prefetch=prefetch)
    consumer.set_prefetch(queue.name, prefetch + 1)  # two consumers
    fill(rabbit, queue, *[b"old"] * (prefetch + 1))
    looped.until(lambda: len(listener.deliveries) == prefetch + 1)
    # When one comes again, the broker has done all that was asked of it before.
    consumer.nack(listener.deliveries.pop().tag)
    looped.until(lambda: len(listener.deliveries) == prefetch + 1)
    for delivery in listener.deliveries:
        consumer.ack(delivery.tag)
    listener.deliveries.clear()

    channel = rabbit.channel()
    channel.queue_delete(queue.name)
    channel.queue_declare(queue.name, durable=True, arguments=dict(QUORUM))
    fill(rabbit, queue, b"1", b"2", b"3")
    looped.until(lambda: len(listener.deliveries) == min(3, prefetch + 1))

    assert set(listener.bodies) == {b"1", b"2", b"3"}
    assert listener.lost == []


def mix_up(rabbit: Broker, looped: Looped, queue: Queue, other: Queue, url: list[str]) -> Listener:
    """RabbitMQ 3 drops as many deliveries of a remade queue as the old one had made, and stops when they fill the window. (Beside
    a classic queue there is no global prefetch that would prevent it.)"""
    classic = Queue(other.name, arguments=CLASSIC)
    listener, consumer = looped.consuming(queue, classic, url=url, prefetch=2)
    fill(rabbit, queue, b"old", b"old")
    looped.until(lambda: len(listener.deliveries) == 2)
    listener.acks = True
    consumer.ack(listener.deliveries[1].tag, multiple=True)
    listener.deliveries.clear()
    channel = rabbit.channel()
    channel.queue_delete(queue.name)
    channel.queue_declare(queue.name, durable=True, arguments=dict(QUORUM))
    fill(rabbit, queue, b"1", b"2", b"3", b"4")
    return listener


def test_a_queue_that_has_messages_for_us_and_delivers_nothing_is_consumed_anew(
    rabbit: Broker, looped: Looped, queue: Queue, other: Queue, broker_url: str
) -> None:
    listener = mix_up(rabbit, looped, queue, other, [broker_url])

    looped.until(lambda: {b"3", b"4"} <= set(listener.bodies))

    assert listener.lost == []


def test_a_host_that_has_messages_for_us_and_delivers_nothing_is_left_for_the_next(
    rabbit: Broker, looped: Looped, queue: Queue, other: Queue, broker_url: str
) -> None:
    listener = mix_up(rabbit, looped, queue, other, [broker_url, broker_url])

    looped.until(lambda: {b"1", b"2", b"3", b"4"} <= set(listener.bodies))

    assert listener.fatal == []


def test_a_full_window_is_no_reason_to_begin_anew(
    rabbit: Broker, looped: Looped, queue: Queue, broker_url: str
) -> None:
    listener, consumer = looped.consuming(queue, url=[broker_url, broker_url], prefetch=2)
    fill(rabbit, queue, b"1", b"2", b"3")
    looped.until(lambda: len(listener.deliveries) == 2)
    epoch, began = consumer.epoch, time.monotonic()

    looped.until(lambda: time.monotonic() - began > 6, turn=0.1)

    assert consumer.epoch == epoch
    assert listener.bodies == [b"1", b"2"]
    assert listener.warnings == []


# -- what exists, what does not


def test_what_a_queue_hangs_on_is_declared_too(rabbit: Broker, looped: Looped) -> None:
    exchange = Exchange(f"{rabbit.queue('x')}", type="topic", auto_delete=True)
    queue = Queue(rabbit.queue("bound"), exchange, "a.*", arguments=QUORUM)
    queue = Queue(queue.name, exchange, "a.*", arguments=QUORUM, bindings=(Binding(exchange, queue.name, "b.#"),))
    listener, consumer = looped.consuming(queue)

    channel = rabbit.channel()
    channel.basic_publish(exchange.name, "a.x", b"1")
    channel.basic_publish(exchange.name, "b.x.y", b"2")
    looped.until(lambda: len(listener.deliveries) == 2)

    assert [delivery.routing_key for delivery in listener.deliveries] == ["a.x", "b.x.y"]
    assert {delivery.exchange for delivery in listener.deliveries} == {exchange.name}
    looped.stop(consumer)


def test_a_queue_that_differed_and_was_deleted_is_made_as_it_was_asked_for(
    rabbit: Broker, looped: Looped, queue: Queue
) -> None:
    rabbit.channel().queue_declare(queue.name, durable=True, arguments=dict(CLASSIC))
    listener, _ = looped.consuming(queue)
    assert len(listener.warnings) == 1

    rabbit.channel().queue_delete(queue.name)
    looped.until(lambda: rabbit.exists(queue.name))
    fill(rabbit, queue, b"again")
    looped.until(lambda: listener.deliveries)

    rabbit.channel().queue_declare(queue.name, durable=True, arguments=dict(QUORUM))  # the same, so no error
    assert len(listener.warnings) == 1


def test_a_queue_that_cannot_be_made_does_not_keep_the_others_waiting(
    rabbit: Broker, looped: Looped, queue: Queue
) -> None:
    absent = Queue(rabbit.queue("absent"), arguments=QUORUM, passive=True)
    listener, consumer = looped.consumer(absent, queue)
    looped.until(lambda: rabbit.exists(queue.name))
    fill(rabbit, queue, b"served")
    looped.until(lambda: listener.deliveries and listener.warnings)

    assert absent.name in listener.warnings[0]
    assert not consumer.is_consuming
    rabbit.channel().queue_declare(absent.name, durable=True, arguments=dict(QUORUM))
    looped.until(lambda: consumer.is_consuming)
    assert len(listener.warnings) == 1


def test_a_queue_that_belongs_to_somebody_else_is_not_consumed_and_the_others_go_on(
    rabbit: Broker, looped: Looped, queue: Queue
) -> None:
    theirs = Queue(rabbit.queue("theirs"), durable=False, exclusive=True)
    rabbit.channel().queue_declare(theirs.name, exclusive=True)
    listener, consumer = looped.consuming(queue)

    consumer.add_queue(theirs, prefetch=1)
    looped.until(lambda: listener.warnings)
    fill(rabbit, queue, b"goes on")
    looped.until(lambda: listener.deliveries)

    assert theirs.name in listener.warnings[0]
    assert not listener.fatal
    assert not listener.lost


# -- channels and connections that break


def test_a_channel_that_the_broker_closes_is_opened_again_under_another_epoch(
    rabbit: Broker, looped: Looped, queue: Queue
) -> None:
    listener, consumer = looped.consuming(queue)
    fill(rabbit, queue, b"unanswered")
    looped.until(lambda: listener.deliveries)
    first = listener.deliveries[0]

    consumer.ack(4711)  # the broker closes the channel: 406, unknown delivery tag
    looped.until(lambda: listener.lost)
    assert consumer.epoch != first.epoch
    consumer.ack(first.tag)  # nobody to tell
    looped.until(lambda: len(listener.deliveries) == 2)

    again = listener.deliveries[1]
    assert (again.body, again.redelivered, again.epoch) == (b"unanswered", True, consumer.epoch)
    consumer.ack(again.tag)
    looped.stop(consumer)
    assert rabbit.count(queue.name) == 0


def test_a_connection_that_breaks_while_its_channel_is_about_to_be_reopened_has_one_channel_after(
    rabbit: Broker, looped: Looped, queue: Queue, way: Forwarder
) -> None:
    listener, consumer = looped.consuming(queue, url=way.url)
    consumer.ack(4711)
    looped.until(lambda: listener.lost)
    way.cut()
    looped.until(lambda: len(listener.consuming) == 2)

    fill(rabbit, queue, *[b"x"] * 20)
    looped.until(lambda: len(listener.deliveries) == 20)

    assert {delivery.epoch for delivery in listener.deliveries} == {consumer.epoch}
    for delivery in listener.deliveries:
        consumer.ack(delivery.tag)
    looped.stop(consumer)
    assert rabbit.count(queue.name) == 0


def test_a_host_that_takes_connections_and_says_nothing_is_left_for_the_next(
    rabbit: Broker, looped: Looped, queue: Queue, way: Forwarder
) -> None:
    way.stall(new_ones=True)
    hosts = [f"amqp://guest:guest@127.0.0.1:{free_port()}/", way.url, rabbit.url]

    listener, _ = looped.consuming(queue, url=hosts, connect_timeout=5.0)

    assert listener.warnings == []


@pytest.mark.parametrize("said", [LOGIN, VIRTUAL_HOST], ids=["login", "virtual host"])
def test_a_connection_lost_in_the_handshake_is_no_refusal(
    looped: Looped, queue: Queue, way: Forwarder, said: bytes
) -> None:
    way.cut_after(said)

    listener, _ = looped.consuming(queue, url=way.url)

    assert way.sprung.is_set()
    assert listener.fatal == []


def test_a_host_that_falls_silent_is_left_for_the_next_long_before_its_heartbeats(
    rabbit: Broker, looped: Looped, queue: Queue, way: Forwarder, broker_url: str
) -> None:
    listener, consumer = looped.consuming(queue, url=[way.url, broker_url], heartbeat=600)
    epoch = consumer.epoch

    way.stall(new_ones=True)
    looped.until(lambda: len(listener.consuming) == 2, timeout=60)

    way.cut()  # now the broker knows, too
    fill(rabbit, queue, b"1")
    looped.until(lambda: listener.deliveries)
    assert consumer.epoch > epoch
    assert "has not answered" in str(listener.lost[0])


def test_a_busy_host_that_falls_silent_has_no_more_time_because_another_one_was_silent_before(
    rabbit: Broker, looped: Looped, queue: Queue, broker_url: str
) -> None:
    sent = Sent(looped.publisher(broker_url))
    with Forwarder(broker_url) as first, Forwarder(broker_url) as second:
        listener, _ = looped.consuming(queue, url=[first.url, second.url])
        listener.acks = True
        first.stall(new_ones=True)
        looped.until(lambda: len(listener.consuming) == 2)

        def is_busy() -> bool:
            sent.publish(b"", queue.name)
            return len(listener.deliveries) > 300

        looped.until(is_busy, turn=0.01)
        second.stall(new_ones=True)
        first.heal()
        looped.until(lambda: len(listener.lost) == 2)

    assert [str(error) for error in listener.lost] == ["the broker has not answered for 2 s"] * 2


def test_a_firewall_that_forgot_the_connection_to_the_only_host_is_noticed(
    looped: Looped, queue: Queue, way: Forwarder
) -> None:
    listener, _ = looped.consuming(queue, url=way.url, heartbeat=600)

    way.stall()
    looped.until(lambda: len(listener.consuming) == 2, timeout=60)


def test_a_quiet_connection_stays(looped: Looped, queue: Queue, way: Forwarder, broker_url: str) -> None:
    listener, _ = looped.consuming(queue, url=[way.url, broker_url])
    began = time.monotonic()

    looped.until(lambda: time.monotonic() - began > 6, turn=0.1)

    assert listener.lost == []


def test_a_broker_that_is_not_there_is_tried_until_it_is(looped: Looped, queue: Queue, way: Forwarder) -> None:
    way.stall(new_ones=True)
    listener, _ = looped.consumer(queue, url=way.url, connect_timeout=1.0)
    looped.until(lambda: way.accepted >= 3)
    assert len(listener.warnings) == 1

    way.heal()
    looped.until(lambda: listener.consuming)

    assert "no broker answers" in listener.warnings[0]
    assert "guest:guest" not in listener.warnings[0]
    assert not listener.fatal


def test_a_connection_that_fell_silent_is_given_up_after_its_heartbeats(
    rabbit: Broker, looped: Looped, queue: Queue, way: Forwarder
) -> None:
    listener, _ = looped.consuming(queue, url=way.url, heartbeat=1)

    way.stall()
    before = len(listener.consuming)  # heartbeats of a second: a machine that stood still lost some connections already
    looped.until(lambda: len(listener.consuming) > before)
    fill(rabbit, queue, b"after")
    looped.until(lambda: b"after" in listener.bodies)

    assert listener.lost
    assert len(listener.lost) == len(listener.consuming) - 1


def test_all_queues_are_consumed_again_with_their_windows_after_a_lost_connection(
    rabbit: Broker, looped: Looped, queue: Queue, other: Queue, way: Forwarder
) -> None:
    listener, consumer = looped.consuming(queue, other, url=way.url, prefetch=1)
    consumer.set_prefetch(other.name, 3)

    way.cut()
    looped.until(lambda: len(listener.consuming) == 2)
    for each in (queue, other):
        fill(rabbit, each, b"1", b"2", b"3", b"4")
    looped.until(lambda: len(listener.deliveries) == 4)

    assert Counter(delivery.queue for delivery in listener.deliveries) == {queue.name: 1, other.name: 3}


# -- stopping


def test_answers_given_before_a_stop_reach_the_broker(rabbit: Broker, looped: Looped, queue: Queue) -> None:
    listener, consumer = looped.consuming(queue, prefetch=500)
    sent = Sent(looped.publisher())
    for _ in range(300):
        sent.publish(b"x", queue.name)
    looped.until(lambda: len(listener.deliveries) == 300)

    for delivery in listener.deliveries:
        consumer.ack(delivery.tag)
    looped.stop(consumer)

    assert rabbit.count(queue.name) == 0


def test_everybody_who_stops_a_consumer_hears_that_it_has(looped: Looped, queue: Queue) -> None:
    _, consumer = looped.consuming(queue)
    heard: list[int] = []

    consumer.stop(on_stopped=lambda: heard.append(1))
    consumer.stop(on_stopped=lambda: heard.append(2))
    looped.until(lambda: len(heard) == 2)
    consumer.stop(on_stopped=lambda: heard.append(3))
    looped.until(lambda: len(heard) == 3)


def test_a_consumer_that_never_started_can_be_stopped(looped: Looped) -> None:
    _, consumer = looped.consumer(url=f"amqp://127.0.0.1:{free_port()}/")
    looped.stop(consumer)


# -- refusals


def test_a_wrong_password_is_fatal_and_not_told(looped: Looped, queue: Queue, broker_url: str) -> None:
    wrong = broker_url.replace("guest:guest@", "guest:hunter2@")

    listener, _ = looped.consumer(queue, url=wrong)
    looped.until(lambda: listener.fatal)

    assert isinstance(listener.fatal[0], AccessRefused)
    assert "hunter2" not in str(listener.fatal[0])


def test_a_virtual_host_that_does_not_exist_is_fatal(looped: Looped, queue: Queue, broker_url: str) -> None:
    listener, _ = looped.consumer(queue, url=broker_url.rstrip("/") + "/no-such-vhost")
    looped.until(lambda: listener.fatal)

    assert isinstance(listener.fatal[0], AccessRefused)
    assert "no-such-vhost" in str(listener.fatal[0])


@pytest.fixture
def vhost(hurt_node: RabbitNode) -> Iterator[str]:
    """The name of a virtual host that a test may take away."""
    name = f"v{uuid.uuid4().hex[:8]}"
    hurt_node.add_vhost(name)
    yield name
    hurt_node.ctl("delete_vhost", name)


def test_a_refusal_by_a_broker_that_had_accepted_us_is_waited_out(
    hurt_node: RabbitNode, looped: Looped, vhost: str
) -> None:
    listener, consumer = looped.consuming(Queue("q", arguments=QUORUM), url=f"{hurt_node.url}{vhost}")

    hurt_node.ctl("delete_vhost", vhost)
    looped.until(lambda: listener.lost and listener.warnings)
    assert vhost in listener.warnings[0]
    hurt_node.add_vhost(vhost)
    looped.until(lambda: consumer.is_consuming)

    assert not listener.fatal


@pytest.fixture
def reader_url(hurt_node: RabbitNode, vhost: str) -> str:
    """A user who may read what is called readable, and declare nothing."""
    user = f"u{uuid.uuid4().hex[:8]}"
    hurt_node.ctl("add_user", user, "secret")
    hurt_node.ctl("set_permissions", "-p", vhost, user, "^$", "^$", "^readable$")
    return f"amqp://{user}:secret@127.0.0.1:{hurt_node.port}/{vhost}"


def test_a_user_who_may_only_consume_uses_what_the_operator_made(
    hurt_node: RabbitNode, looped: Looped, vhost: str, reader_url: str
) -> None:
    owner = Broker(f"{hurt_node.url}{vhost}")
    owner.channel().queue_declare("readable", durable=True, arguments=dict(CLASSIC))

    listener, _ = looped.consuming(Queue("readable", arguments=QUORUM), url=reader_url)
    fill(owner, Queue("readable"), b"read")
    looped.until(lambda: listener.deliveries)

    assert len(listener.warnings) == 1
    assert "may not declare queue 'readable'" in listener.warnings[0]
    owner.close()


def test_a_queue_that_may_not_be_consumed_is_fatal_at_the_start_and_only_a_warning_later(
    hurt_node: RabbitNode, looped: Looped, vhost: str, reader_url: str
) -> None:
    owner = Broker(f"{hurt_node.url}{vhost}")
    for name in ("readable", "secret"):
        owner.channel().queue_declare(name, durable=True, arguments=dict(QUORUM))
    readable, secret = Queue("readable", arguments=QUORUM), Queue("secret", arguments=QUORUM)

    early, _ = looped.consumer(secret, url=reader_url)
    looped.until(lambda: early.fatal)
    late, consumer = looped.consuming(readable, url=reader_url)
    consumer.add_queue(secret, prefetch=1)
    looped.until(lambda: any("'secret' is not consumed" in text for text in late.warnings))
    looped.until(lambda: consumer.is_consuming)

    assert isinstance(early.fatal[0], OperationalError)
    assert not late.fatal
    owner.close()
