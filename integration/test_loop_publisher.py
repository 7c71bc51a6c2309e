"""PikaLoopPublisher on a real broker: what is confirmed is stored, one bad message harms no other, nothing is given up.

What every transport keeps is in amqtask.testing.suites.transport; here is what needs a broker that fails.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from amqtask.exceptions import MessageTooLarge, PublishError, PublishRefused, Unroutable
from amqtask.protocol.entities import Binding, Exchange, Queue, arguments
from integration.conftest import Broker
from integration.faults import LOGIN, VIRTUAL_HOST, Forwarder
from integration.looped import Looped, Sent
from integration.nodes import RabbitNode
from integration.workers import eventually

QUORUM = arguments({"x-queue-type": "quorum"})
CLASSIC = arguments({"x-queue-type": "classic"})


@pytest.fixture
def queue(rabbit: Broker) -> Queue:
    """A quorum queue's entity; nothing declared it."""
    return Queue(rabbit.queue("loop-pub"), arguments=QUORUM)


@pytest.fixture
def other(rabbit: Broker) -> Queue:
    """Another one."""
    return Queue(rabbit.queue("loop-pub-2"), arguments=QUORUM)


@pytest.fixture
def way(broker_url: str) -> Iterator[Forwarder]:
    """The way to the broker, for breaking."""
    with Forwarder(broker_url) as forwarder:
        yield forwarder


def everything_in(rabbit: Broker, queue: str) -> list[bytes]:
    """The bodies of all messages of a queue."""
    channel = rabbit.channel()
    found = []
    while (body := channel.basic_get(queue, auto_ack=True)[2]) is not None:
        found.append(body)
    channel.close()
    return found


def numbered(count: int) -> list[bytes]:
    """So many bodies."""
    return [b"%05d" % number for number in range(count)]


# -- what arrives


def test_the_first_publish_connects_and_all_arrive_in_order(rabbit: Broker, looped: Looped, queue: Queue) -> None:
    publisher = looped.publisher()
    sent = Sent(publisher)
    bodies = numbered(5000)  # more than may be unconfirmed at once
    assert not publisher.host
    for body in bodies:
        sent.publish(body, queue.name, declare=(queue,))
    assert publisher.outstanding == 5000

    looped.until(lambda: len(sent.done) == 5000)

    assert publisher.outstanding == 0
    assert sent.errors == {}
    assert rabbit.count(queue.name) == 5000
    assert [rabbit.take(queue.name)[1] for _ in range(3)] == bodies[:3]  # type: ignore[index]


def test_a_stop_writes_out_what_was_published_before(rabbit: Broker, looped: Looped) -> None:
    # Nobody waits for confirms here. A channel that ends takes with it what a quorum queue has not accepted by then.
    queue = Queue(rabbit.queue("loop-pub-stop"), arguments=CLASSIC)
    publisher = looped.publisher()
    sent = Sent(publisher)
    sent.publish(b"first", queue.name, declare=(queue,))
    looped.until(lambda: sent.done)

    for body in numbered(200):
        sent.publish(body, queue.name)
    looped.stop(publisher)

    eventually(lambda: rabbit.count(queue.name) == 201)


# -- what is declared for messages


def test_messages_wait_in_line_for_what_one_of_them_needs(rabbit: Broker, looped: Looped, queue: Queue) -> None:
    publisher = looped.publisher()
    sent = Sent(publisher)
    exchange = Exchange(f"{queue.name}.x", type="fanout", auto_delete=True)
    sent.publish(b"1", queue.name, declare=(queue,))
    sent.publish(b"2", queue.name, declare=(exchange, queue))
    sent.publish(b"3", queue.name)

    looped.until(lambda: len(sent.done) == 3)

    assert everything_in(rabbit, queue.name) == [b"1", b"2", b"3"]
    rabbit.channel().exchange_delete(exchange.name)


def test_a_queue_that_exists_with_other_arguments_makes_no_message_go_twice(
    rabbit: Broker, looped: Looped, queue: Queue, other: Queue
) -> None:
    rabbit.channel().queue_declare(other.name, durable=True, arguments=dict(CLASSIC))
    sent = Sent(looped.publisher())
    bodies = numbered(600)
    for body in bodies[:500]:
        sent.publish(body, queue.name, declare=(queue,))
    sent.publish(b"found", other.name, declare=(other,))
    for body in bodies[500:]:
        sent.publish(body, queue.name, declare=(queue,))

    looped.until(lambda: len(sent.done) == 601)

    assert everything_in(rabbit, queue.name) == bodies
    assert everything_in(rabbit, other.name) == [b"found"]
    assert ["'classic'" in text for text in looped.warnings] == [True]


def test_a_queue_that_was_deleted_since_is_declared_again(rabbit: Broker, looped: Looped, queue: Queue) -> None:
    sent = Sent(looped.publisher())
    sent.publish(b"1", queue.name, declare=(queue,))
    looped.until(lambda: sent.done)

    rabbit.channel().queue_delete(queue.name)
    sent.publish(b"2", queue.name, declare=(queue,))
    looped.until(lambda: len(sent.done) == 2)

    assert sent.errors == {}
    assert everything_in(rabbit, queue.name) == [b"2"]


def test_what_cannot_be_declared_fails_the_message_that_needs_it(
    rabbit: Broker, looped: Looped, queue: Queue, other: Queue
) -> None:
    rabbit.channel().queue_declare(other.name, exclusive=True)
    sent = Sent(looped.publisher())
    sent.publish(b"1", queue.name, declare=(queue,))
    sent.publish(b"locked", other.name, declare=(Queue(other.name, durable=False, exclusive=True),))
    sent.publish(b"nonsense", "n", declare=(Queue("n", arguments=arguments({"x-queue-type": object})),))
    sent.publish(b"two lines", "a\nb", declare=(Queue("a\nb"),))
    sent.publish(b"2", queue.name, declare=(queue,))

    looped.until(lambda: len(sent.done) == 5)

    assert set(sent.errors) == {b"locked", b"nonsense", b"two lines"}
    assert "line end" in str(sent.errors[b"two lines"])
    assert other.name in str(sent.errors[b"locked"])
    assert everything_in(rabbit, queue.name) == [b"1", b"2"]


# -- messages that the broker does not take


def test_each_of_two_unroutable_messages_with_one_id_is_told(looped: Looped, rabbit: Broker, queue: Queue) -> None:
    sent = Sent(looped.publisher())
    sent.publish(b"1", "nowhere", message_id="same")
    sent.publish(b"2", queue.name, declare=(queue,), message_id="same")
    sent.publish(b"3", "nowhere", message_id="same")

    looped.until(lambda: len(sent.done) == 3)

    assert set(sent.errors) == {b"1", b"3"}
    assert all(isinstance(error, Unroutable) for error in sent.errors.values())


def test_a_full_queue_refuses_what_is_too_much_and_keeps_the_rest(rabbit: Broker, looped: Looped) -> None:
    limits = {"x-queue-type": "classic", "x-max-length": 3, "x-overflow": "reject-publish"}
    full = Queue(rabbit.queue("full"), arguments=arguments(limits))
    sent = Sent(looped.publisher(nack_patience=0.5))
    for body in numbered(10):
        sent.publish(body, full.name, declare=(full,))

    looped.until(lambda: len(sent.done) == 10)

    stored = everything_in(rabbit, full.name)
    assert all(isinstance(error, PublishRefused) for error in sent.errors.values())
    assert sorted(stored) == sorted(set(numbered(10)) - set(sent.errors))


def test_a_message_that_amqp_cannot_write_fails_alone(rabbit: Broker, looped: Looped, queue: Queue) -> None:
    sent = Sent(looped.publisher())
    sent.publish(b"1", queue.name, declare=(queue,))
    sent.publish(b"odd", queue.name, headers={"odd": object()})
    sent.publish(b"long", "k" * 300)
    sent.publish(b"nowhere", "nowhere")
    sent.publish(b"2", queue.name)

    looped.until(lambda: len(sent.done) == 5)

    assert {body: type(error) for body, error in sent.errors.items()} == {
        b"odd": PublishError,
        b"long": PublishError,
        b"nowhere": Unroutable,
    }
    assert everything_in(rabbit, queue.name) == [b"1", b"2"]


def test_arguments_that_would_close_the_connection_fail_the_message_that_needs_them(
    rabbit: Broker, looped: Looped, queue: Queue, way: Forwarder
) -> None:
    large = Queue("too-much", arguments=arguments({"x-queue-type": "classic", "note": "x" * 200_000}))
    sent = Sent(looped.publisher(way.url))
    sent.publish(b"bad", large.name, declare=(large,))
    sent.publish(b"1", queue.name, declare=(queue,))

    looped.until(lambda: len(sent.done) == 2)

    assert list(sent.errors) == [b"bad"]
    assert way.accepted == 1


def test_a_message_with_which_no_connection_lasts_fails_and_the_others_are_stored(
    rabbit: Broker, looped: Looped, queue: Queue, way: Forwarder
) -> None:
    sent = Sent(looped.publisher(way.url))
    sent.publish(b"first", queue.name, declare=(queue,))
    looped.until(lambda: sent.done)
    way.ban(b"the-culprit")
    for body in (b"before", b"the-culprit", b"after"):
        sent.publish(body, queue.name)

    looped.until(lambda: len(sent.done) == 4)

    assert list(sent.errors) == [b"the-culprit"]
    assert "with it on its way" in str(sent.errors[b"the-culprit"])
    assert set(everything_in(rabbit, queue.name)) == {b"first", b"before", b"after"}


def test_an_exchange_that_was_deleted_since_is_declared_again(rabbit: Broker, looped: Looped, queue: Queue) -> None:
    exchange = Exchange(f"{queue.name}.x", type="direct", auto_delete=True)
    declare = (exchange, queue, Binding(exchange, queue.name, "k"))
    sent = Sent(looped.publisher())
    sent.publish(b"1", "k", exchange=exchange.name, declare=declare)
    looped.until(lambda: sent.done)

    rabbit.channel().exchange_delete(exchange.name)
    sent.publish(b"2", "k", exchange=exchange.name, declare=declare)
    looped.until(lambda: len(sent.done) == 2)

    assert sent.errors == {}
    assert everything_in(rabbit, queue.name) == [b"1", b"2"]


def test_a_refused_message_goes_again_and_is_stored_when_there_is_room(
    rabbit: Broker, looped: Looped, other: Queue, queue: Queue
) -> None:
    limits = {"x-queue-type": "classic", "x-max-length": 1, "x-overflow": "reject-publish"}
    full = Queue(rabbit.queue("full"), arguments=arguments(limits))
    publisher = looped.publisher(nack_patience=60.0)
    sent = Sent(publisher)
    sent.publish(b"1", full.name, declare=(full,))
    looped.until(lambda: sent.done)
    sent.publish(b"2", full.name)
    sent.publish(b"3", queue.name, declare=(queue,))
    looped.until(lambda: len(sent.done) == 2)  # nobody else waits for it
    assert publisher.outstanding == 1

    assert everything_in(rabbit, full.name) == [b"1"]
    looped.until(lambda: len(sent.done) == 3)

    assert sent.errors == {}
    assert everything_in(rabbit, full.name) == [b"2"]


def test_a_queue_that_stays_full_is_believed_and_costs_others_no_connection(
    rabbit: Broker, looped: Looped, queue: Queue, way: Forwarder
) -> None:
    limits = {"x-queue-type": "classic", "x-max-length": 1, "x-overflow": "reject-publish"}
    full = Queue(rabbit.queue("full"), arguments=arguments(limits))
    sent = Sent(looped.publisher(way.url, nack_patience=0.5))
    for body in numbered(50):
        sent.publish(body, full.name, declare=(full,))
    looped.until(lambda: len(sent.done) == 50)
    assert len(sent.errors) == 49

    sent.publish(b"more", full.name)
    sent.publish(b"other", queue.name, declare=(queue,))
    looped.until(lambda: len(sent.done) == 52)

    assert isinstance(sent.errors[b"more"], PublishRefused)
    assert everything_in(rabbit, queue.name) == [b"other"]
    assert way.accepted == 1


def test_all_messages_for_an_exchange_that_is_not_there_fail_and_no_other(
    rabbit: Broker, looped: Looped, queue: Queue
) -> None:
    sent = Sent(looped.publisher())
    for body in numbered(100):
        if int(body) % 10:
            sent.publish(body, queue.name, declare=(queue,))
        else:
            sent.publish(body, queue.name, exchange="no-such-exchange")

    looped.until(lambda: len(sent.done) == 100)

    assert set(sent.errors) == {body for body in numbered(100) if not int(body) % 10}
    assert all(isinstance(error, Unroutable) for error in sent.errors.values())
    assert everything_in(rabbit, queue.name) == [body for body in numbered(100) if body not in sent.errors]


def test_a_message_that_the_broker_closes_the_channel_for_is_found_and_fails_alone(
    rabbit: Broker, looped: Looped, queue: Queue
) -> None:
    sent = Sent(looped.publisher())
    for body in numbered(60):
        bad = {"expiration": "soon"} if body in (b"00020", b"00040") else {}
        sent.publish(body, queue.name, declare=(queue,), **bad)

    looped.until(lambda: len(sent.done) == 60)

    assert set(sent.errors) == {b"00020", b"00040"}
    assert all(isinstance(error, PublishRefused) for error in sent.errors.values())
    assert everything_in(rabbit, queue.name) == [body for body in numbered(60) if body not in sent.errors]


def test_a_message_over_the_brokers_limit_is_named(hurt_node: RabbitNode, looped: Looped) -> None:
    queue = Queue("loop-large", arguments=CLASSIC)
    sent = Sent(looped.publisher(hurt_node.url))
    large = b"x" * 2_000_000
    sent.publish(b"1", queue.name, declare=(queue,))
    sent.publish(large, queue.name)
    sent.publish(b"2", queue.name)

    looped.until(lambda: len(sent.done) == 3)

    assert list(sent.errors) == [large]
    assert isinstance(sent.errors[large], MessageTooLarge)


def test_exchanges_that_nobody_declared_here_take_many_messages_once_each(
    rabbit: Broker, looped: Looped, queue: Queue
) -> None:
    exchange = "amq.direct"
    channel = rabbit.channel()
    channel.queue_declare(queue.name, durable=True, arguments=dict(queue.arguments))
    channel.queue_bind(queue.name, exchange, queue.name)
    sent = Sent(looped.publisher())
    for body in numbered(500):
        sent.publish(body, queue.name, exchange=exchange)

    looped.until(lambda: len(sent.done) == 500)

    assert not sent.errors
    assert sorted(everything_in(rabbit, queue.name)) == numbered(500)


def test_a_message_that_waits_for_the_broker_alone_goes_over_the_next_connection(
    rabbit: Broker, looped: Looped, queue: Queue, way: Forwarder
) -> None:
    sent = Sent(looped.publisher(way.url))
    sent.publish(b"first", queue.name, declare=(queue,))
    looped.until(lambda: sent.done)
    sent.publish(b"x" * 2_000_000, queue.name)
    looped.loop.run_once(0.0)
    way.cut()

    looped.until(lambda: len(sent.done) == 2)

    assert not sent.errors
    assert {len(body) for body in everything_in(rabbit, queue.name)} == {5, 2_000_000}


# -- connections that break


def test_what_is_unconfirmed_when_the_connection_breaks_is_sent_again_in_order(
    rabbit: Broker, looped: Looped, queue: Queue, way: Forwarder
) -> None:
    publisher = looped.publisher(way.url)
    sent = Sent(publisher)
    sent.publish(b"first", queue.name, declare=(queue,))
    looped.until(lambda: sent.done)
    way.cut_after(b"00007")  # the broker gets it; its confirm does not come back
    bodies = numbered(20)
    for body in bodies:
        sent.publish(body, queue.name)

    looped.until(lambda: len(sent.done) == 21)

    assert sent.errors == {}
    stored = everything_in(rabbit, queue.name)
    assert set(stored) == {b"first", *bodies}
    assert stored[-20:] == bodies
    assert max(Counter(stored).values()) <= 2


def test_what_is_published_while_there_is_no_connection_goes_when_there_is(
    rabbit: Broker, looped: Looped, queue: Queue, way: Forwarder
) -> None:
    way.stall(new_ones=True)
    publisher = looped.publisher(way.url, connect_timeout=1.0)
    sent = Sent(publisher)
    sent.publish(b"patient", queue.name, declare=(queue,))
    looped.until(lambda: way.accepted >= 2)
    assert publisher.outstanding == 1

    way.heal()
    looped.until(lambda: sent.done)

    assert everything_in(rabbit, queue.name) == [b"patient"]


def test_declarations_are_made_again_on_a_new_connection(
    rabbit: Broker, looped: Looped, queue: Queue, way: Forwarder
) -> None:
    sent = Sent(looped.publisher(way.url))
    sent.publish(b"1", queue.name, declare=(queue,))
    looped.until(lambda: sent.done)

    rabbit.channel().queue_delete(queue.name)
    way.cut()
    sent.publish(b"2", queue.name, declare=(queue,))
    looped.until(lambda: len(sent.done) == 2)

    assert sent.errors == {}
    assert everything_in(rabbit, queue.name) == [b"2"]


@pytest.mark.parametrize("said", [LOGIN, VIRTUAL_HOST], ids=["login", "virtual host"])
def test_a_connection_lost_in_the_handshake_is_made_again(
    rabbit: Broker, looped: Looped, queue: Queue, way: Forwarder, said: bytes
) -> None:
    way.cut_after(said)
    sent = Sent(looped.publisher(way.url))

    sent.publish(b"1", queue.name, declare=(queue,))
    looped.until(lambda: sent.done)

    assert way.sprung.is_set()
    assert everything_in(rabbit, queue.name) == [b"1"]


def test_a_login_that_was_refused_is_tried_until_it_is_accepted(hurt_node: RabbitNode, looped: Looped) -> None:
    url = hurt_node.url.replace("guest:guest", "latecomer:secret")
    sent = Sent(looped.publisher(url))
    sent.publish(b"1", "loop-late", declare=(Queue("loop-late", arguments=CLASSIC),))
    looped.until(lambda: looped.warnings)

    hurt_node.ctl("add_user", "latecomer", "secret")
    hurt_node.ctl("set_permissions", "latecomer", ".*", ".*", ".*")
    looped.until(lambda: sent.done)

    assert sent.errors == {}
    assert len(looped.warnings) <= 2  # the login, and perhaps the virtual host
    hurt_node.ctl("delete_user", "latecomer")


def test_what_a_silent_host_does_not_confirm_goes_to_the_next_long_before_its_heartbeats(
    rabbit: Broker, looped: Looped, queue: Queue, way: Forwarder, broker_url: str
) -> None:
    sent = Sent(looped.publisher([way.url, broker_url], heartbeat=600))
    sent.publish(b"1", queue.name, declare=(queue,))
    looped.until(lambda: sent.done)

    way.stall(new_ones=True)
    sent.publish(b"2", queue.name)
    looped.until(lambda: len(sent.done) == 2, timeout=30)

    assert sent.errors == {}
    assert everything_in(rabbit, queue.name) == [b"1", b"2"]


def test_a_declaration_that_is_not_answered_fails_its_own_message_and_stops_no_other(
    rabbit: Broker, looped: Looped, queue: Queue, other: Queue, way: Forwarder
) -> None:
    sent = Sent(looped.publisher([way.url]))
    sent.publish(b"1", queue.name, declare=(queue,))
    looped.until(lambda: sent.done)
    way.keep_secret(other.name)

    sent.publish(b"2", other.name, declare=(other,))
    sent.publish(b"3", queue.name)
    looped.until(lambda: b"3" in sent.done)
    assert b"2" not in sent.done
    looped.until(lambda: len(sent.done) == 3)

    assert everything_in(rabbit, queue.name) == [b"1", b"3"]
    assert isinstance(sent.errors[b"2"], PublishRefused)


def test_a_blocked_broker_is_waited_for(hurt_node: RabbitNode, looped: Looped) -> None:
    queue = Queue("loop-blocked", arguments=CLASSIC)
    publisher = looped.publisher(hurt_node.url)
    sent = Sent(publisher)
    sent.publish(b"before", queue.name, declare=(queue,))
    looped.until(lambda: sent.done)

    hurt_node.ctl("set_vm_memory_high_watermark", "0.00001")
    try:
        for body in numbered(10):
            sent.publish(body, queue.name)
        looped.until(lambda: looped.warnings)
        assert "blocks publishing" in looped.warnings[0]
        assert publisher.outstanding == 10
    finally:
        hurt_node.ctl("set_vm_memory_high_watermark", "0.6")
    looped.until(lambda: len(sent.done) == 11)

    assert sent.errors == {}
