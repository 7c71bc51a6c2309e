"""PikaPublisher on a real broker: what is confirmed is stored, and each failure is its own error in its own call."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from amqtask.exceptions import (
    AccessRefused,
    BrokerUnreachable,
    MessageRefused,
    PublishError,
    PublishRefused,
    PublishTimeout,
    Unroutable,
)
from amqtask.protocol.entities import Binding, Exchange, Queue, arguments
from amqtask.protocol.message import Message, Properties
from amqtask.transport.link import Link
from amqtask.transport.publisher import PikaPublisher
from amqtask.transport.url import HostTurns, parse_broker_urls
from integration.conftest import Broker
from integration.faults import Forwarder, hangs_up_once
from integration.nodes import free_port
from integration.waiting import eventually

# Class and method of connection.close on the wire.
CONNECTION_CLOSE = b"\x00\x0a\x00\x32"
MakePublisher = Callable[..., PikaPublisher]


@pytest.fixture
def make(broker_url: str) -> Iterator[MakePublisher]:
    """Publishers that are closed after the test."""
    made: list[PikaPublisher] = []

    def publisher(*urls: str, **options: Any) -> PikaPublisher:
        addresses = parse_broker_urls(list(urls) or broker_url)
        made.append(PikaPublisher(addresses, **{"timeout": 60.0, **options}))
        return made[-1]

    yield publisher
    for each in made:
        each.close()


@pytest.fixture
def link(broker_url: str) -> Iterator[Forwarder]:
    """The way to the broker, for breaking."""
    with Forwarder(broker_url) as forwarder:
        yield forwarder


@pytest.fixture
def queue(rabbit: Broker) -> str:
    """A queue's name."""
    return rabbit.queue("pub")


def to(queue: str, body: bytes = b"body", **properties: Any) -> Message:
    """A message that makes its queue."""
    return Message(body, Properties(**properties), "", queue, (Queue(queue),))


def everything_in(rabbit: Broker, queue: str) -> list[bytes]:
    """The bodies of all messages of a queue."""
    channel = rabbit.channel()
    found = []
    while (body := channel.basic_get(queue, auto_ack=True)[2]) is not None:
        found.append(body)
    channel.close()
    return found


# -- what arrives


def test_a_published_message_is_in_its_queue_as_it_was_given(rabbit: Broker, queue: str, make: MakePublisher) -> None:
    headers = {
        "task": "add",
        "retries": 3,
        "limit": 0.5,
        "none": None,
        "yes": True,
        "list": [1, "two"],
        "map": {"a": 1},
    }

    make().publish(
        to(queue, b"\x00\xff", headers=headers, correlation_id="c", priority=2, expiration="60000", type="t")
    )

    taken = rabbit.take(queue)
    assert taken is not None
    properties, body = taken
    assert (body, properties.headers) == (b"\x00\xff", headers)
    assert (properties.correlation_id, properties.priority, properties.expiration) == ("c", 2, "60000")
    assert (properties.type, properties.delivery_mode) == ("t", 2)


def test_a_batch_larger_than_the_window_arrives_in_order(rabbit: Broker, queue: str, make: MakePublisher) -> None:
    bodies = [str(number).encode() for number in range(4500)]

    errors = make().publish_many([to(queue, body) for body in bodies])

    assert errors == [None] * len(bodies)
    assert rabbit.count(queue) == len(bodies)
    assert [rabbit.take(queue) for _ in range(3)][2][1] == b"2"  # type: ignore[index]


def test_an_empty_batch_needs_no_broker(make: MakePublisher) -> None:
    assert make(f"amqp://127.0.0.1:{free_port()}/").publish_many([]) == []


def test_a_large_message_arrives_whole(rabbit: Broker, queue: str, make: MakePublisher) -> None:
    body = os.urandom(3_000_000)

    make().publish(to(queue, body))

    assert everything_in(rabbit, queue) == [body]


def test_an_exchange_its_queue_and_its_binding_are_declared_in_order(
    rabbit: Broker, queue: str, make: MakePublisher
) -> None:
    exchange = Exchange(f"{queue}.topic", type="topic", auto_delete=True)
    declare = (exchange, Queue(queue), Binding(exchange, queue, "a.#"))

    make().publish(Message(b"body", Properties(), exchange.name, "a.b", declare))

    assert everything_in(rabbit, queue) == [b"body"]


def test_a_queue_that_exists_with_other_arguments_is_used_with_one_warning(
    rabbit: Broker, queue: str, make: MakePublisher
) -> None:
    rabbit.channel().queue_declare(queue, durable=True)
    warnings: list[str] = []
    publisher = make(on_warning=warnings.append)
    wanted = (Queue(queue, arguments=arguments({"x-max-length": 5})),)

    for _ in range(3):
        publisher.publish(Message(b"body", Properties(), "", queue, wanted))

    assert rabbit.count(queue) == 3
    assert len(warnings) == 1
    assert queue in warnings[0]
    assert "x-max-length" in warnings[0]


# -- what goes wrong with one message


def test_an_unroutable_message_is_an_error_and_the_next_is_none(
    rabbit: Broker, queue: str, make: MakePublisher
) -> None:
    publisher = make()

    with pytest.raises(Unroutable, match="nobody-listens"):
        publisher.publish(Message(b"body", Properties(), "", "nobody-listens"))
    publisher.publish(to(queue))

    assert rabbit.count(queue) == 1


def test_an_unroutable_message_that_nobody_asked_about_is_none(make: MakePublisher) -> None:
    make().publish(Message(b"body", Properties(), "", "nobody-listens", mandatory=False))


def test_a_missing_exchange_is_named(make: MakePublisher) -> None:
    with pytest.raises(Unroutable, match="no-such-exchange"):
        make().publish(Message(b"body", Properties(), "no-such-exchange", "key"))


def test_in_a_batch_each_message_has_its_own_outcome(rabbit: Broker, queue: str, make: MakePublisher) -> None:
    lost = Message(b"lost", Properties(message_id="one"), "", "nobody-listens")
    nowhere = Message(b"nowhere", Properties(), "no-such-exchange", "key")
    headers = Message(b"headers", Properties(headers={"what": object()}), "", queue)
    long = Message(b"long", Properties(), "", "k" * 300)

    # The same message twice, and another one under its id: a return is matched by more than the id.
    batch = [to(queue, message_id="one"), lost, lost, nowhere, headers, long, nowhere, to(queue)]
    errors = make().publish_many(batch)

    kinds = [type(error) for error in errors]
    none = type(None)
    assert kinds == [none, Unroutable, Unroutable, Unroutable, PublishError, PublishError, Unroutable, none]
    assert rabbit.count(queue) == 2


def test_a_message_that_the_broker_refuses_in_other_words_fails_alone(
    rabbit: Broker, queue: str, make: MakePublisher
) -> None:
    wrong = to(queue, b"wrong", user_id="somebody-else")

    errors = make().publish_many([to(queue, b"1"), wrong, to(queue, b"2")])

    assert [type(error) for error in errors] == [type(None), MessageRefused, type(None)]
    assert "user_id" in str(errors[1])
    assert everything_in(rabbit, queue) == [b"1", b"2"]


def test_a_full_queue_refuses(rabbit: Broker, queue: str, make: MakePublisher) -> None:
    full = (Queue(queue, arguments=arguments({"x-max-length": 1, "x-overflow": "reject-publish"})),)
    publisher = make()

    errors = publisher.publish_many([Message(b"body", Properties(), "", queue, full) for _ in range(3)])

    assert [type(error) for error in errors] == [type(None), PublishRefused, PublishRefused]


def test_what_was_refused_is_stored_once_the_queue_takes_it_within_the_deadline(
    rabbit: Broker, queue: str, make: MakePublisher
) -> None:
    full = (Queue(queue, arguments=arguments({"x-max-length": 1, "x-overflow": "reject-publish"})),)
    publisher, channel = make(timeout=60.0), rabbit.channel()
    publisher.publish(Message(b"first", Properties(), "", queue, full))
    room = threading.Timer(1.5, lambda: channel.queue_purge(queue))
    room.start()

    publisher.publish(Message(b"second", Properties(), "", queue, full))

    room.join()
    assert everything_in(rabbit, queue) == [b"second"]


def test_a_queue_that_cannot_be_declared_fails_its_own_messages_only(
    rabbit: Broker, queue: str, make: MakePublisher
) -> None:
    locked = rabbit.queue("locked")
    rabbit.channel().queue_declare(locked, exclusive=True)

    errors = make().publish_many([to(locked), to("two\r\nlines"), to(queue), to(locked)])

    assert [type(error) for error in errors] == [PublishError, PublishError, type(None), PublishError]
    assert "RESOURCE_LOCKED" in str(errors[0])
    assert "line end" in str(errors[1])
    assert rabbit.count(queue) == 1


# -- what goes wrong with the connection


def test_a_wrong_password_is_said_at_once(broker_url: str, make: MakePublisher) -> None:
    url = broker_url.replace("guest:guest", "guest:wrong")
    publisher = make(url, timeout=100.0)

    with pytest.raises(AccessRefused, match="password") as caught:
        publisher.publish(to("any"))

    assert "wrong" not in str(caught.value)


def test_a_wrong_virtual_host_is_said_at_once(broker_url: str, make: MakePublisher) -> None:
    url = broker_url.rpartition("/")[0] + "/no-such-vhost"

    with pytest.raises(AccessRefused, match="virtual host 'no-such-vhost'"):
        make(url, timeout=100.0).publish(to("any"))


def test_no_broker_is_said_at_the_deadline(make: MakePublisher) -> None:
    began = time.monotonic()

    with pytest.raises(BrokerUnreachable, match=r"127\.0\.0\.1"):
        make(f"amqp://127.0.0.1:{free_port()}/", timeout=0.5).publish(to("any"))

    assert time.monotonic() - began < 60


def test_a_broker_that_accepts_and_says_nothing_costs_the_deadline_only(link: Forwarder, make: MakePublisher) -> None:
    link.stall(new_ones=True)

    with pytest.raises(BrokerUnreachable, match="did not answer"):
        make(link.url, timeout=0.5).publish(to("any"))


def test_the_error_is_that_of_the_last_attempt_that_had_its_time(make: MakePublisher) -> None:
    with hangs_up_once() as url, pytest.raises(BrokerUnreachable) as caught:
        make(url, timeout=5.0, connect_timeout=60.0).publish(to("any"))

    assert "did not answer" not in str(caught.value)


def test_the_next_host_has_its_share_of_the_deadline(
    rabbit: Broker, queue: str, broker_url: str, link: Forwarder, make: MakePublisher
) -> None:
    link.stall(new_ones=True)
    publisher = make(link.url, f"amqp://127.0.0.1:{free_port()}/", broker_url, timeout=12.0)

    publisher.publish(to(queue))
    publisher.publish(to(queue))

    assert rabbit.count(queue) == 2


def test_a_declaration_that_is_not_answered_is_made_over_the_next_host(
    rabbit: Broker, queue: str, broker_url: str, link: Forwarder, make: MakePublisher
) -> None:
    publisher = make(link.url, broker_url, timeout=12.0)
    link.keep_secret(queue)

    publisher.publish(
        Message(
            b"1", Properties(), "", queue, declare=(Queue(queue, arguments=arguments({"x-queue-type": "classic"})),)
        )
    )

    assert everything_in(rabbit, queue) == [b"1"]


def test_a_connection_that_was_cut_while_idle_is_replaced_without_a_word(
    rabbit: Broker, queue: str, link: Forwarder, make: MakePublisher
) -> None:
    publisher = make(link.url)
    publisher.publish(to(queue, b"1"))
    link.cut()

    publisher.publish(to(queue, b"2"))

    assert everything_in(rabbit, queue) == [b"1", b"2"]
    assert link.accepted == 2


def test_a_connection_that_a_firewall_forgot_is_replaced_without_a_word(
    rabbit: Broker, queue: str, link: Forwarder, make: MakePublisher
) -> None:
    publisher = make(link.url, timeout=12.0)
    publisher.publish(to(queue, b"1"))
    link.stall()

    publisher.publish(to(queue, b"2"))

    assert everything_in(rabbit, queue) == [b"1", b"2"]


def test_a_message_whose_confirm_was_lost_is_published_again_under_the_same_id(
    rabbit: Broker, queue: str, link: Forwarder, make: MakePublisher
) -> None:
    publisher = make(link.url)
    publisher.publish(to(queue, b"first"))
    link.cut_after(b"the-marker")

    publisher.publish(to(queue, b"the-marker", message_id="same"))

    assert link.sprung.is_set()
    taken = [rabbit.take(queue) for _ in range(3)]
    assert {found[0].message_id for found in taken if found is not None and found[1] == b"the-marker"} == {"same"}


def test_a_batch_gets_through_connections_that_live_for_less_than_it_takes(
    rabbit: Broker, queue: str, link: Forwarder, make: MakePublisher
) -> None:
    bodies = [b"%04d" % number + b"x" * 1000 for number in range(500)]
    publisher = make(link.url)
    link.fray(1)

    errors = publisher.publish_many([to(queue, body) for body in bodies], timeout=60.0)

    assert errors == [None] * 500
    assert set(everything_in(rabbit, queue)) == set(bodies)


def test_a_batch_survives_a_cut_in_its_middle(rabbit: Broker, queue: str, link: Forwarder, make: MakePublisher) -> None:
    bodies = [f"body-{number:05}".encode() for number in range(5000)]
    publisher = make(link.url)
    link.cut_after(b"body-03000")

    assert publisher.publish_many([to(queue, body) for body in bodies]) == [None] * 5000

    assert link.sprung.is_set()
    assert set(everything_in(rabbit, queue)) == set(bodies)


def test_a_confirm_that_does_not_come_is_a_timeout(queue: str, link: Forwarder, make: MakePublisher) -> None:
    publisher = make(link.url)
    publisher.publish(to(queue))
    link.stall()

    with pytest.raises(PublishTimeout, match="confirm"):
        publisher.publish(to(queue), timeout=0.3)


def test_a_late_confirm_is_not_taken_for_the_next_messages(
    rabbit: Broker, queue: str, link: Forwarder, make: MakePublisher
) -> None:
    publisher = make(link.url)
    publisher.publish(to(queue))
    link.stall()
    with pytest.raises(PublishTimeout):
        publisher.publish(to(queue), timeout=0.3)
    link.heal()

    with pytest.raises(Unroutable):
        publisher.publish(Message(b"body", Properties(), "", "nobody-listens"))


# -- threads, forks, greenlets


def test_threads_publish_at_once_over_a_limited_number_of_connections(
    rabbit: Broker, queue: str, link: Forwarder, make: MakePublisher
) -> None:
    publisher = make(link.url, pool_limit=3)
    barrier = threading.Barrier(8)

    def publish(thread: int) -> None:
        barrier.wait()
        for number in range(50):
            publisher.publish(to(queue, f"{thread}-{number}".encode()))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(publish, range(8)))

    assert rabbit.count(queue) == 400
    assert link.accepted <= 3


def test_waiting_for_a_connection_counts_towards_the_deadline(
    rabbit: Broker, queue: str, link: Forwarder, make: MakePublisher
) -> None:
    publisher = make(link.url, pool_limit=1)
    publisher.publish(to(queue))
    link.hold_after(b"the-marker")
    with ThreadPoolExecutor(1) as pool:
        stuck = pool.submit(publisher.publish, to(queue, b"the-marker"))
        assert link.sprung.wait(90)  # the other thread has the only connection, and waits for its confirm

        with pytest.raises(PublishTimeout, match="broker_pool_limit"):
            publisher.publish(to(queue), timeout=0.1)

        link.heal()
        stuck.result()
    assert rabbit.count(queue) == 2


def test_a_fork_leaves_both_sides_with_a_working_publisher(
    rabbit: Broker, queue: str, link: Forwarder, make: MakePublisher
) -> None:
    publisher = make(link.url)
    publisher.publish(to(queue, b"before"))

    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(90)
            publisher.publish(to(queue, b"child"))
            publisher.close()
            code = 0
        finally:
            os._exit(code)
    publisher.publish(to(queue, b"parent"))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    publisher.publish(to(queue, b"parent again"))

    assert set(everything_in(rabbit, queue)) == {b"before", b"child", b"parent", b"parent again"}
    assert link.accepted == 2  # the parent went on with its own, the child made one


def test_threads_that_come_first_in_a_forked_child_share_its_connections(
    rabbit: Broker, queue: str, make: MakePublisher
) -> None:
    publisher = make(pool_limit=3)
    publisher.publish(to(queue))

    def child() -> None:
        signal.alarm(90)
        sys.setswitchinterval(1e-6)
        barrier = threading.Barrier(16)

        def publish(_: int) -> None:
            barrier.wait()
            publisher.publish(to(queue))

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(publish, range(16)))

    for _ in range(15):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                child()
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

    assert rabbit.count(queue) == 1 + 15 * 16


def test_an_answer_that_came_while_the_caller_stood_still_until_its_deadline_counts(broker_url: str) -> None:
    link = Link(heartbeat=None, name="late")
    HostTurns(parse_broker_urls(broker_url), time.monotonic() + 60, 60).connect(link.open)
    link.ask()
    link.flush()
    now = time.monotonic()

    eventually(lambda: link.run(lambda: not link.is_asked, now))

    link.close()


def test_closing_twice_and_publishing_after_it_is_fine(rabbit: Broker, queue: str, make: MakePublisher) -> None:
    publisher = make()
    publisher.publish(to(queue))
    publisher.close()
    publisher.close()

    publisher.publish(to(queue))

    assert rabbit.count(queue) == 2


GREEN = """
    import sys
    if sys.argv[1] == "gevent":
        from gevent import monkey, spawn, sleep, joinall
        monkey.patch_all()
    else:
        import eventlet
        eventlet.monkey_patch()
        from eventlet import spawn, sleep
        def joinall(all, raise_error): [each.wait() for each in all]
    from amqtask.protocol.entities import Queue
    from amqtask.protocol.message import Message, Properties
    from amqtask.transport.publisher import PikaPublisher
    from amqtask.transport.url import parse_broker_urls

    publisher = PikaPublisher(parse_broker_urls(sys.argv[2]), timeout=60, pool_limit=4)
    ticks = [0]

    def tick():
        while True:
            ticks[0] += 1
            sleep(0.001)

    def publish(number):
        for _ in range(20):
            publisher.publish(Message(b"green", Properties(), "", sys.argv[3], (Queue(sys.argv[3]),)))

    spawn(tick)
    joinall([spawn(publish, number) for number in range(10)], raise_error=True)
    publisher.close()
    print("ticked" if ticks[0] > 10 else f"starved: {ticks[0]}")
"""


@pytest.mark.parametrize("library", ["gevent", "eventlet"])
def test_greenlets_publish_at_once_and_others_run_meanwhile(
    library: str, broker_url: str, rabbit: Broker, queue: str
) -> None:
    pytest.importorskip(library) if library == "gevent" else None
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(GREEN), library, broker_url, queue],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert (done.returncode, done.stdout.strip()) == (0, "ticked"), done.stderr
    assert rabbit.count(queue) == 200


def test_the_program_ends_without_leaving_the_broker_a_lost_client(link: Forwarder, queue: str) -> None:
    link.cut_after(CONNECTION_CLOSE)
    program = f"""
        from amqtask.protocol.entities import Queue
        from amqtask.protocol.message import Message, Properties
        from amqtask.transport.publisher import PikaPublisher
        from amqtask.transport.url import parse_broker_urls
        publisher = PikaPublisher(parse_broker_urls({link.url!r}), timeout=60)
        publisher.publish(Message(b"", Properties(), "", {queue!r}, (Queue({queue!r}),)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert link.sprung.wait(90)


def test_message_ids_that_are_missing_are_made_up_uniquely(rabbit: Broker, queue: str, make: MakePublisher) -> None:
    publisher = make()
    messages = [to(queue, str(number).encode()) for number in range(10)]
    messages[3].properties.message_id = given = str(uuid.uuid4())

    publisher.publish_many(messages)

    taken = [rabbit.take(queue) for _ in range(10)]
    ids = [found[0].message_id for found in taken if found is not None]
    assert len(set(ids)) == 10
    assert ids[3] == given
