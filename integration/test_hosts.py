"""A publisher goes on with another host, within its deadline, whatever becomes of the one that it uses."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
from pika import spec

from amqtask import AmqTask, signals
from amqtask.exceptions import AccessRefused, BrokerUnreachable, PublishRefused, PublishTimeout, ResultLost
from amqtask.protocol.entities import Queue
from amqtask.protocol.message import Message, Properties
from amqtask.transport.async_publisher import AioPikaPublisher
from amqtask.transport.publisher import PikaPublisher
from amqtask.transport.url import parse_broker_urls
from integration.conftest import Broker
from integration.faults import Forwarder
from integration.looped import Looped, Sent
from integration.nodes import free_port
from integration.scripted import Script, scripted
from integration.waiting import eventually

Make = Callable[..., PikaPublisher]
Host = Callable[..., Script]


@pytest.fixture
def host() -> Iterator[Host]:
    """Servers that misbehave."""
    with ExitStack() as stack:
        yield lambda **script: stack.enter_context(scripted(**script))


@pytest.fixture
def make() -> Iterator[Make]:
    """Publishers that are closed after the test."""
    made: list[PikaPublisher] = []

    def publisher(*urls: str, **options: Any) -> PikaPublisher:
        made.append(PikaPublisher(parse_broker_urls(list(urls)), **{"timeout": 60.0, **options}))
        return made[-1]

    yield publisher
    for each in made:
        each.close()


def to(queue: str) -> Message:
    """A message that makes its queue."""
    return Message(b"body", Properties(), "", queue, (Queue(queue),))


# -- a refusal


def test_a_message_that_one_host_refuses_is_stored_by_the_next(host: Host, make: Make) -> None:
    refusing, other = host(verdict="nack"), host()

    make(refusing.url, other.url).publish(to("q"))

    assert other.published == ["q"]


def test_a_channel_that_has_begun_to_refuse_is_left_for_a_new_one(host: Host, make: Make) -> None:
    only = host()
    publisher = make(only.url)
    publisher.publish(to("q"))
    only.verdict = "nack"

    with pytest.raises(PublishRefused):
        publisher.publish(to("q"))

    assert only.connections >= 2  # whether the old channel was the reason was tried


def test_a_refusal_names_the_hosts_that_refused_and_guesses_no_reason(host: Host, make: Make) -> None:
    one, two = host(verdict="nack"), host(verdict="nack")

    with pytest.raises(PublishRefused, match="gives no reason") as caught:
        make(one.url, two.url).publish(to("q"))

    assert all(each.url.partition("@")[2].rstrip("/") in str(caught.value) for each in (one, two))


def test_a_refusal_that_was_final_is_believed_at_once_for_the_next_message(host: Host, make: Make) -> None:
    one, two = host(verdict="nack"), host(verdict="nack")
    publisher = make(one.url, two.url)
    with pytest.raises(PublishRefused):
        publisher.publish(to("q"))
    before = one.connections + two.connections

    with pytest.raises(PublishRefused):
        publisher.publish(to("q"))

    assert one.connections + two.connections <= before + 1


def test_a_host_that_refuses_and_one_that_is_away_are_both_told_before_the_deadline(host: Host, make: Make) -> None:
    refusing = host(verdict="nack")

    with pytest.raises(PublishRefused):
        make(refusing.url, f"amqp://127.0.0.1:{free_port()}/").publish(to("q"))


# -- the handshake

HANDSHAKE = (spec.Connection.StartOk, spec.Connection.TuneOk, spec.Connection.Open, spec.Channel.Open)


@pytest.mark.parametrize("step", HANDSHAKE, ids=lambda step: str(step.NAME))
def test_a_connection_that_is_lost_in_the_handshake_is_no_refusal(step: type[Any], host: Host, make: Make) -> None:
    lost, other = host(ends_at=step), host()

    make(lost.url, other.url).publish(to("q"))

    assert other.published == ["q"]
    with pytest.raises(BrokerUnreachable) as caught:
        make(lost.url, timeout=0.5).publish(to("q"))
    assert not isinstance(caught.value, AccessRefused)


@pytest.mark.parametrize(
    ("step", "says", "words"),
    [
        (spec.Connection.StartOk, (403, "ACCESS_REFUSED - Login was refused"), "password"),
        (spec.Connection.Open, (530, "NOT_ALLOWED - vhost x not found"), "virtual host"),
    ],
)
def test_a_refusal_in_the_brokers_own_words_is_told_at_once(
    step: type[Any], says: tuple[int, str], words: str, host: Host, make: Make
) -> None:
    refusing = host(ends_at=step, says=says)

    with pytest.raises(AccessRefused, match=words):
        make(refusing.url, timeout=1000.0).publish(to("q"))

    assert refusing.connections == 1


# -- silence


def test_a_host_that_falls_silent_is_left_for_another_within_the_deadline(host: Host, make: Make) -> None:
    silent, other = host(), host()
    publisher = make(silent.url, other.url, timeout=12.0)
    publisher.publish(to("q"))
    silent.verdict = "silence"

    publisher.publish(to("r"))

    assert other.published == ["r"]


def test_all_connections_to_a_silent_host_are_left_with_the_first(rabbit: Broker, broker_url: str, make: Make) -> None:
    queue = rabbit.queue("silent")
    with Forwarder(broker_url) as link:
        publisher = make(link.url, broker_url, timeout=12.0, pool_limit=4)
        barrier = threading.Barrier(4)

        def publish(_: int) -> None:
            barrier.wait(90)
            for _ in range(20):
                publisher.publish(to(queue), timeout=60)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(publish, range(4)))
        link.stall(new_ones=True)

        publisher.publish(to(queue))

    assert rabbit.count(queue) >= 81


def test_a_broker_that_is_slow_and_alive_is_waited_for(host: Host, make: Make) -> None:
    slow = host()
    publisher = make(slow.url, timeout=90.0)
    publisher.publish(to("q"))
    slow.verdict = "later"  # answers what it is asked, but publishes

    began = time.monotonic()
    with pytest.raises(Exception, match="confirm"):
        publisher.publish(to("q"), timeout=2.0)

    assert time.monotonic() - began < 60
    assert slow.connections == 1


def test_a_host_that_answers_and_confirms_nothing_is_left_for_another_within_the_deadline(
    host: Host, make: Make
) -> None:
    minority, other = host(verdict="later"), host()

    make(minority.url, other.url).publish(to("q"), timeout=10.0)

    assert other.published == ["q"]


def test_a_coroutine_leaves_a_host_that_answers_and_confirms_nothing_within_the_deadline(host: Host) -> None:
    minority, other = host(verdict="later"), host()

    async def publish() -> None:
        publisher = AioPikaPublisher(parse_broker_urls([minority.url, other.url]))
        await publisher.publish(to("q"), timeout=10.0)
        await publisher.close()

    asyncio.run(publish())

    assert other.published == ["q"]


@pytest.fixture
def deaf() -> Iterator[str]:
    """The URL of a server that takes connections and never says a word, as one that stands still."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"amqp://127.0.0.1:{server.getsockname()[1]}//"


def stand_still(*hosts: Script, verdict: str) -> None:
    """As the nodes of a cluster whose leader stands still: they take connections, declare nothing and confirm nothing."""
    for each in hosts:
        each.verdict = verdict
        each.mute.add("q")
        each.cut()


@pytest.mark.parametrize("verdict", ["silence", "later"])
def test_a_publish_ends_at_its_deadline_while_no_host_confirms_and_one_says_nothing_at_all(
    verdict: str, host: Host, make: Make, deaf: str
) -> None:
    one, other = host(), host()
    publisher = make(one.url, other.url, deaf, timeout=3.0)
    publisher.publish(to("q"))
    stand_still(one, other, verdict=verdict)

    with pytest.raises(PublishTimeout):
        publisher.publish(to("q"))


@pytest.mark.parametrize("verdict", ["silence", "later"])
def test_a_coroutines_publish_ends_at_its_deadline_while_no_host_confirms_and_one_says_nothing_at_all(
    verdict: str, host: Host, deaf: str
) -> None:
    one, other = host(), host()

    async def publish() -> None:
        publisher = AioPikaPublisher(parse_broker_urls([one.url, other.url, deaf]), timeout=3.0)
        await publisher.publish(to("q"))
        stand_still(one, other, verdict=verdict)
        try:
            await publisher.publish(to("q"))
        finally:
            await publisher.close()

    with pytest.raises(PublishTimeout, match=r"127\.0\.0\.1"):
        asyncio.run(publish())


def test_the_queue_of_results_takes_its_time_from_the_calls_one_deadline(host: Host, deaf: str) -> None:
    silent = host(verdict="silence")
    app = AmqTask("one deadline", broker=f"{deaf};{silent.url}", backend="rpc://")
    app.conf.update(broker_publish_timeout=12.0, broker_connection_timeout=12.0)
    began = time.monotonic()

    with pytest.raises(PublishTimeout):
        app.send_task("t", queue="q")

    assert time.monotonic() - began < 17  # the queue of results alone waits 6 s for the first host
    app.close()


# -- what somebody has deleted


def test_a_queue_that_was_declared_before_takes_messages_while_no_host_answers_its_declaration(
    host: Host, make: Make
) -> None:
    first, other = host(), host()
    publisher = make(first.url, other.url, timeout=8.0)
    publisher.publish(to("q"))
    first.mute.add("q")
    other.mute.add("q")
    first.cut()

    publisher.publish(to("q"))

    assert len(first.published) + len(other.published) == 2


def test_a_coroutine_sends_to_a_queue_that_was_declared_before_while_its_declaration_is_not_answered(
    host: Host,
) -> None:
    only = host()

    async def calls() -> None:
        publisher = AioPikaPublisher(parse_broker_urls([only.url]), timeout=20.0)
        await publisher.publish(to("q"))
        only.mute.add("q")
        only.cut()
        await publisher.publish(to("q"))
        await publisher.close()

    asyncio.run(calls())

    assert only.published == ["q", "q"]


def test_a_worker_sends_to_a_queue_that_was_declared_before_while_its_declaration_is_not_answered(
    host: Host, looped: Looped
) -> None:
    only = host()
    sent = Sent(looped.publisher(only.url))
    sent.publish(b"first", "q", declare=(Queue("q"),))
    looped.until(lambda: sent.done)
    only.mute.add("q")
    only.cut()

    sent.publish(b"second", "q", declare=(Queue("q"),))
    looped.until(lambda: len(sent.done) == 2)
    only.cut()  # pika closes no channel on which an answer is missing

    assert sent.errors == {}
    assert only.published == ["q", "q"]


def test_a_queue_that_was_deleted_is_declared_anew(rabbit: Broker, broker_url: str, make: Make) -> None:
    queue = rabbit.queue("deleted")
    publisher = make(broker_url)
    publisher.publish(to(queue))
    rabbit.channel().queue_delete(queue)

    publisher.publish(to(queue))
    errors = publisher.publish_many([to(queue), Message(b"", Properties(), "", "nobody-listens"), to(queue)])

    assert [error is None for error in errors] == [True, False, True]
    assert rabbit.count(queue) == 3


# -- the queue of results


def test_calls_go_on_and_who_waits_is_told_when_the_queue_of_results_is_on_a_node_that_is_away(host: Host) -> None:
    broker = host()
    app = AmqTask("away", broker=broker.url, backend="rpc://", broker_publish_timeout=60.0)
    try:
        lost = app.send_task("t")
        before = set(broker.declared)
        broker.away = {name for name in before if not name.startswith("amqtask")}
        broker.cut()

        with pytest.raises(ResultLost, match=lost.id):
            lost.get(timeout=60)

        assert not app.send_task("t").ready()
        assert len(broker.away) == len(set(broker.declared) - before) == 1
    finally:
        app.close()


@pytest.mark.parametrize("way", ["delay", "publish_many", "adelay"])
def test_who_calls_while_the_queue_of_results_is_given_up_is_told(host: Host, way: str) -> None:
    broker = host()
    app = AmqTask("away", broker=broker.url, backend="rpc://", broker_publish_timeout=60.0)
    call = app.signature("t")

    def give_up(**_: object) -> None:
        before = set(broker.declared)
        broker.away = {name for name in before if not name.startswith("amqtask")}
        broker.cut()
        eventually(lambda: first.ready() or len(set(broker.declared) - before) == 1, what="no other queue of results")

    try:
        first = app.send_task("t")
        signals.before_task_publish.connect(give_up)
        try:
            if way == "delay":
                lost = call.apply_async()
            elif way == "publish_many":
                (lost,) = app.publish_many([call])
            else:
                lost = asyncio.run(call.aapply_async())
        finally:
            signals.before_task_publish.disconnect(give_up)

        with pytest.raises(ResultLost, match=lost.id):
            lost.get(timeout=60)
    finally:
        app.close()
