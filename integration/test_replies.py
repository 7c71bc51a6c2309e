"""QueueReader on a real broker: whoever waits reads, nothing that came is lost, whatever happens to the connection."""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pika
import pytest

from amqtask.exceptions import BrokerUnreachable, PublishError
from amqtask.protocol.entities import Queue, arguments
from amqtask.protocol.message import Delivery
from amqtask.transport.queue_reader import QueueReader, guarded
from amqtask.transport.url import parse_broker_urls
from integration.conftest import Broker
from integration.faults import Forwarder

# Class and method of basic.ack on the wire.
BASIC_ACK = b"\x00\x3c\x00\x50"


class Inbox:
    """A QueueReader and what it got."""

    def __init__(self, url: str, queue: str) -> None:
        self.bodies: list[bytes] = []
        self.queue = Queue(queue, arguments=arguments({"x-expires": 60_000}))
        self.replies = QueueReader(parse_broker_urls(url), self.queue, guarded(self.on_reply))

    def on_reply(self, delivery: Delivery) -> None:
        if delivery.body == b"broken":
            raise ValueError("a callback's own fault")
        self.bodies.append(delivery.body)

    def await_body(self, *bodies: bytes) -> bool:
        return self.replies.drive(lambda: set(bodies) <= set(self.bodies), time.monotonic() + 90)


@pytest.fixture
def queue() -> str:
    """A queue's name; closing the consumer deletes it."""
    return f"replies-{uuid.uuid4().hex}"


@pytest.fixture
def link(broker_url: str) -> Iterator[Forwarder]:
    """The way to the broker, for breaking."""
    with Forwarder(broker_url) as forwarder:
        yield forwarder


@pytest.fixture
def inbox(link: Forwarder, queue: str) -> Iterator[Inbox]:
    """A consumer that consumes."""
    made = Inbox(link.url, queue)
    made.replies.ensure(60)
    yield made
    made.replies.close()


def send(rabbit: Broker, queue: str, *bodies: bytes) -> None:
    """Replies, as a worker publishes them."""
    for body in bodies:
        rabbit.publish(queue, body, pika.BasicProperties(delivery_mode=2))


def test_whoever_waits_gets_the_reply(rabbit: Broker, inbox: Inbox, queue: str) -> None:
    send(rabbit, queue, b"1", b"2")

    assert inbox.await_body(b"1", b"2")


def test_waiting_ends_at_the_deadline(inbox: Inbox) -> None:
    assert not inbox.replies.drive(lambda: False, time.monotonic() + 0.1)


def test_looking_reads_what_has_come(rabbit: Broker, inbox: Inbox, queue: str) -> None:
    send(rabbit, queue, b"1")

    deadline = time.monotonic() + 90
    while not inbox.bodies and time.monotonic() < deadline:
        inbox.replies.poll()

    assert inbox.bodies == [b"1"]


def test_threads_wait_each_for_its_own_and_hand_the_reading_over(rabbit: Broker, inbox: Inbox, queue: str) -> None:
    bodies = [str(number).encode() for number in range(8)]
    barrier = threading.Barrier(9)

    def wait(body: bytes) -> bool:
        barrier.wait()
        return inbox.await_body(body)

    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(wait, body) for body in bodies]
        barrier.wait()
        # One after the other, so that whoever reads goes and another one has to take over.
        for body, done in zip(bodies, waiting, strict=True):
            send(rabbit, queue, body)
            assert done.result(timeout=90)


def test_a_reply_that_came_while_the_connection_was_down_is_got(
    rabbit: Broker, inbox: Inbox, link: Forwarder, queue: str
) -> None:
    link.cut()
    send(rabbit, queue, b"1")

    assert inbox.await_body(b"1")


def test_a_reply_that_was_on_its_way_when_the_connection_broke_is_got(
    rabbit: Broker, inbox: Inbox, link: Forwarder, queue: str
) -> None:
    link.stall()
    send(rabbit, queue, b"1", b"2")  # the broker sends them into the stalled connection
    link.cut()

    assert inbox.await_body(b"1", b"2")


def test_a_queue_whose_declaration_no_host_answers_any_more_is_given_up_for_another(
    broker_url: str, link: Forwarder, queue: str
) -> None:
    lost: list[PublishError] = []

    def go_on(error: PublishError) -> Queue:
        lost.append(error)
        return Queue(f"{queue}.2", arguments=arguments({"x-expires": 60_000}))

    with Forwarder(broker_url) as other:
        addresses = parse_broker_urls([link.url, other.url])
        own = Queue(queue, arguments=arguments({"x-expires": 60_000}))
        replies = QueueReader(addresses, own, lambda delivery: None, on_queue_lost=go_on)
        replies.ensure(60)
        for host in (link, other):
            host.keep_secret(queue)
            host.cut()
        with pytest.raises(BrokerUnreachable):
            replies.drive(lambda: False, time.monotonic() + 0.5)

        replies.ensure(60)
        assert replies.is_consuming
        assert (len(lost), replies.queue.name) == (1, f"{queue}.2")
        replies.close()


def test_short_waits_end_at_their_time_while_the_connection_is_looked_at(
    inbox: Inbox, link: Forwarder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amqtask.transport.queue_reader.CHECK_AFTER", 0.0)
    link.stall()

    assert [inbox.replies.drive(lambda: False, time.monotonic() + 0.05) for _ in range(3)] == [False] * 3

    assert inbox.replies.drive(
        lambda: link.accepted == 2, time.monotonic() + 90
    )  # it was not forgotten that it owes an answer


def test_somebody_who_only_looks_gets_the_connection_back(
    rabbit: Broker, inbox: Inbox, link: Forwarder, queue: str
) -> None:
    link.cut()
    send(rabbit, queue, b"1")

    deadline = time.monotonic() + 90
    while not inbox.bodies and time.monotonic() < deadline:
        inbox.replies.poll()

    assert inbox.bodies == [b"1"]


def test_a_queue_that_somebody_deleted_is_made_again(rabbit: Broker, inbox: Inbox, queue: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(inbox.await_body, b"1")
        rabbit.channel().queue_delete(queue)
        deadline = time.monotonic() + 90
        while not rabbit.exists(queue) and time.monotonic() < deadline:
            pass
        send(rabbit, queue, b"1")

        assert waiting.result(timeout=90)


def test_a_reply_that_cannot_be_handled_costs_no_other(
    rabbit: Broker, inbox: Inbox, link: Forwarder, queue: str
) -> None:
    send(rabbit, queue, b"broken", b"1")

    assert inbox.await_body(b"1")
    assert link.accepted == 1


def test_a_background_thread_reads_for_callbacks_while_others_wait(rabbit: Broker, inbox: Inbox, queue: str) -> None:
    inbox.replies.start_thread()
    inbox.replies.start_thread()
    send(rabbit, queue, b"1")

    assert inbox.await_body(b"1")


def test_a_reply_read_is_gone_from_the_queue(rabbit: Broker, inbox: Inbox, link: Forwarder, queue: str) -> None:
    link.cut_after(BASIC_ACK)
    send(rabbit, queue, b"1")
    assert inbox.await_body(b"1")
    assert link.sprung.wait(90)

    send(rabbit, queue, b"2")
    assert inbox.await_body(b"2")

    assert inbox.bodies == [b"1", b"2"]


def test_waiting_inside_a_replys_callback_is_refused_instead_of_hanging(
    rabbit: Broker, broker_url: str, queue: str
) -> None:
    seen: list[str] = []

    def on_reply(delivery: Delivery) -> None:
        replies.poll()  # only looking is fine
        with pytest.raises(RuntimeError, match="callback") as caught:
            replies.drive(lambda: False, time.monotonic() + 90)
        seen.append(str(caught.value))

    replies = QueueReader(parse_broker_urls(broker_url), Queue(queue), on_reply)
    replies.ensure(60)
    send(rabbit, queue, b"1")

    assert replies.drive(lambda: bool(seen), time.monotonic() + 90)
    replies.close()


def test_closing_deletes_the_queue_and_ends_all_waiting(rabbit: Broker, inbox: Inbox, queue: str) -> None:
    waits = threading.Event()

    def wait() -> None:
        def never() -> bool:
            waits.set()
            return False

        with pytest.raises(BrokerUnreachable, match="closed"):
            inbox.replies.drive(never, None)

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait)
        assert waits.wait(90)
        inbox.replies.close()
        waiting.result(timeout=90)

    inbox.replies.close()
    assert not rabbit.exists(queue)


def test_a_forked_child_leaves_its_parents_consumer_alone(
    rabbit: Broker, inbox: Inbox, link: Forwarder, queue: str
) -> None:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(90)
            is_mine = inbox.replies.pid == os.getpid()
            inbox.replies.close()
            code = 1 if is_mine else 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

    send(rabbit, queue, b"1")

    assert inbox.await_body(b"1")
    assert link.accepted == 1


@pytest.mark.parametrize("moment", ["before it subscribes", "after it subscribed"])
def test_whoever_is_struck_while_connecting_leaves_a_queue_that_the_next_one_reads(
    rabbit: Broker, broker_url: str, queue: str, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    consume, strikes = QueueReader._consume, [KeyboardInterrupt()]

    def struck(self: QueueReader, *arguments: Any) -> None:
        if strikes and moment.startswith("before"):
            raise strikes.pop()
        consume(self, *arguments)
        if strikes:
            raise strikes.pop()

    monkeypatch.setattr(QueueReader, "_consume", struck)
    inbox = Inbox(broker_url, queue)
    with pytest.raises(KeyboardInterrupt):
        inbox.replies.ensure(60)

    inbox.replies.ensure(60)
    send(rabbit, queue, b"1")
    assert inbox.await_body(b"1")
    inbox.replies.close()
