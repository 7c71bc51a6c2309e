"""AioPikaPublisher on a real broker: the same promises as the blocking publisher's, for tasks of an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import ssl
import threading
import warnings
import weakref
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from amqtask.exceptions import (
    AccessRefused,
    BrokerUnreachable,
    MessageRefused,
    PublishError,
    PublishTimeout,
    Unroutable,
)
from amqtask.protocol.entities import Binding, Exchange, Queue, arguments
from amqtask.protocol.message import Message, Properties
from amqtask.testing.suites.transport import UNWRITABLE_HEADERS
from amqtask.transport.async_publisher import AioPikaPublisher
from amqtask.transport.url import parse_broker_urls
from integration.cancelled import cancel, is_well
from integration.conftest import Broker
from integration.faults import LOGIN, VIRTUAL_HOST, Forwarder, hangs_up_once
from integration.nodes import free_port
from integration.test_publisher import everything_in, to

# Of a loop that ends before its connection has, aio-pika leaves callbacks behind that complain when they are collected.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Here, and not in the midst of another module's test, which would fail for it."""
    yield
    collect_sockets()


@pytest.fixture
def queue(rabbit: Broker) -> str:
    """A queue's name."""
    return rabbit.queue("apub")


def using(urls: str | list[str], act: Callable[[AioPikaPublisher], Awaitable[Any]], **options: Any) -> Any:
    """What `act` returns, given a publisher on an event loop of its own."""

    async def main() -> Any:
        publisher = AioPikaPublisher(parse_broker_urls(urls), **{"timeout": 60.0, **options})
        try:
            return await act(publisher)
        finally:
            await publisher.close()

    return asyncio.run(main())


def collect_sockets() -> None:
    """Of a loop that ended before its connection could: nobody else closes them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def test_a_published_message_is_in_its_queue_as_it_was_given(rabbit: Broker, broker_url: str, queue: str) -> None:
    headers = {
        "task": "add",
        "retries": 3,
        "limit": 0.5,
        "none": None,
        "yes": True,
        "list": [1, "two"],
        "map": {"a": 1},
    }
    message = to(
        queue, b"\x00\xff", headers=headers, correlation_id="c", priority=2, expiration="60000", timestamp=1700000000
    )

    using(broker_url, lambda publisher: publisher.publish(message))

    taken = rabbit.take(queue)
    assert taken is not None
    properties, body = taken
    assert (body, properties.headers) == (b"\x00\xff", headers)
    assert (properties.correlation_id, properties.priority, properties.expiration) == ("c", 2, "60000")
    assert (properties.timestamp, properties.delivery_mode) == (1700000000, 2)


def test_a_batch_larger_than_the_window_is_stored(rabbit: Broker, broker_url: str, queue: str) -> None:
    messages = [to(queue, str(number).encode()) for number in range(1500)]

    assert using(broker_url, lambda publisher: publisher.publish_many(messages)) == [None] * 1500

    assert rabbit.count(queue) == 1500


def test_in_a_batch_each_message_has_its_own_outcome(rabbit: Broker, broker_url: str, queue: str) -> None:
    lost = Message(b"lost", Properties(message_id="one"), "", "nobody-listens")
    nowhere = Message(b"nowhere", Properties(), "no-such-exchange", "key")
    headers = Message(b"headers", Properties(headers={"what": object()}), "", queue)
    batch = [to(queue, message_id="one"), lost, lost, nowhere, headers, nowhere, to(queue)]

    errors = using(broker_url, lambda publisher: publisher.publish_many(batch))

    none = type(None)
    kinds = [type(error) for error in errors]
    assert kinds == [none, Unroutable, Unroutable, Unroutable, PublishError, Unroutable, none]
    assert "no-such-exchange" in str(errors[3])
    assert rabbit.count(queue) == 2


def test_headers_that_the_broker_would_close_the_connection_for_fail_alone(
    rabbit: Broker, broker_url: str, queue: str
) -> None:
    batch = []
    for headers in UNWRITABLE_HEADERS.values():
        batch += [to(queue, b"good"), to(queue, b"bad", headers=headers)]

    errors = using(broker_url, lambda publisher: publisher.publish_many(batch))

    assert [isinstance(error, PublishError) for error in errors] == [False, True] * len(UNWRITABLE_HEADERS)
    assert everything_in(rabbit, queue) == [b"good"] * len(UNWRITABLE_HEADERS)


def test_a_message_that_the_broker_refuses_in_other_words_fails_alone(
    rabbit: Broker, broker_url: str, queue: str
) -> None:
    batch = [to(queue, b"1"), to(queue, b"wrong", user_id="somebody-else"), to(queue, b"2")]

    errors = using(broker_url, lambda publisher: publisher.publish_many(batch))

    assert [type(error) for error in errors] == [type(None), MessageRefused, type(None)]
    assert sorted(everything_in(rabbit, queue)) == [b"1", b"2"]


def test_a_message_that_the_broker_refuses_in_other_words_is_not_tried_again(broker_url: str, queue: str) -> None:
    wrong = to(queue, b"wrong", user_id="somebody-else")

    with pytest.raises(MessageRefused, match="user_id"):  # and without a deadline it would never end
        using(broker_url, lambda publisher: publisher.publish(wrong), timeout=None)


def test_a_full_queue_refuses(rabbit: Broker, broker_url: str, queue: str) -> None:
    full = (Queue(queue, arguments=arguments({"x-max-length": 1, "x-overflow": "reject-publish"})),)
    batch = [Message(b"body", Properties(), "", queue, full) for _ in range(3)]

    errors = using(broker_url, lambda publisher: publisher.publish_many(batch), nack_patience=0.5)

    assert sorted(type(error).__name__ for error in errors) == ["NoneType", "PublishRefused", "PublishRefused"]


def test_a_queue_that_exists_with_other_arguments_is_used_with_one_warning(
    rabbit: Broker, broker_url: str, queue: str
) -> None:
    rabbit.channel().queue_declare(queue, durable=True)
    warnings: list[str] = []
    wanted = (Queue(queue, arguments=arguments({"x-max-length": 5})),)
    batch = [Message(b"body", Properties(), "", queue, wanted) for _ in range(10)]

    errors = using(broker_url, lambda publisher: publisher.publish_many(batch), on_warning=warnings.append)

    assert errors == [None] * 10
    assert len(warnings) == 1
    assert "x-max-length" in warnings[0]


def test_an_exchange_its_queue_and_its_binding_are_declared_in_order(
    rabbit: Broker, broker_url: str, queue: str
) -> None:
    exchange = Exchange(f"{queue}.topic", type="topic", auto_delete=True)
    declare = (exchange, Queue(queue), Binding(exchange, queue, "a.#"))
    message = Message(b"body", Properties(), exchange.name, "a.b", declare)

    using(broker_url, lambda publisher: publisher.publish(message))

    assert everything_in(rabbit, queue) == [b"body"]


def test_a_wrong_password_is_said_at_once(broker_url: str) -> None:
    url = broker_url.replace("guest:guest", "guest:wrong")

    with pytest.raises(AccessRefused, match="password") as caught:
        using(url, lambda publisher: publisher.publish(to("any")), timeout=100.0)

    assert "wrong" not in str(caught.value)


def test_a_wrong_virtual_host_is_said_at_once(broker_url: str) -> None:
    url = broker_url.rpartition("/")[0] + "/no-such-vhost"

    with pytest.raises(AccessRefused, match="virtual host 'no-such-vhost'"):
        using(url, lambda publisher: publisher.publish(to("any")), timeout=100.0)


def test_no_broker_is_said_at_the_deadline() -> None:
    with pytest.raises(BrokerUnreachable, match=r"127\.0\.0\.1"):
        using(f"amqp://127.0.0.1:{free_port()}/", lambda publisher: publisher.publish(to("any")), timeout=0.5)


def test_the_error_is_that_of_the_last_attempt_that_had_its_time() -> None:
    with hangs_up_once() as url, pytest.raises(BrokerUnreachable) as caught:
        using(url, lambda publisher: publisher.publish(to("any")), timeout=5.0, connect_timeout=60.0)

    assert "did not answer" not in str(caught.value)


def test_a_failed_attempt_leaves_nothing_to_be_closed() -> None:
    asyncio.run(asyncio.sleep(0))  # from now on there is no loop in this thread but a running one
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()  # what other tests have left
    loop = asyncio.new_event_loop()
    with hangs_up_once() as url:
        publisher = AioPikaPublisher(parse_broker_urls(url), timeout=0.3)
        with pytest.raises(BrokerUnreachable):
            loop.run_until_complete(publisher.publish(to("any")))
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            gc.collect()
        loop.run_until_complete(publisher.close())
    loop.close()

    assert [str(warning.message) for warning in warned] == []


def test_the_next_host_has_its_share_of_the_deadline(rabbit: Broker, broker_url: str, queue: str) -> None:
    with Forwarder(broker_url) as link:
        link.stall(new_ones=True)
        using([link.url, broker_url], lambda publisher: publisher.publish(to(queue)), timeout=12.0)

    assert rabbit.count(queue) == 1


def test_a_connection_that_was_cut_while_idle_is_replaced_without_a_word(
    rabbit: Broker, broker_url: str, queue: str
) -> None:
    async def act(publisher: AioPikaPublisher) -> None:
        await publisher.publish(to(queue, b"1"))
        link.cut()
        await publisher.publish(to(queue, b"2"))

    with Forwarder(broker_url) as link:
        using(link.url, act)

    assert set(everything_in(rabbit, queue)) == {b"1", b"2"}


def test_a_connection_that_a_firewall_forgot_is_replaced_without_a_word(
    rabbit: Broker, broker_url: str, queue: str
) -> None:
    async def act(publisher: AioPikaPublisher) -> None:
        await publisher.publish(to(queue, b"1"))
        link.stall()
        await publisher.publish(to(queue, b"2"))

    with Forwarder(broker_url) as link:
        using(link.url, act, timeout=12.0)

    assert sorted(everything_in(rabbit, queue)) == [b"1", b"2"]


def test_a_lost_connection_is_no_line_in_the_users_log(
    broker_url: str, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def act(publisher: AioPikaPublisher) -> None:
        for _ in range(3):
            await publisher.publish(to(queue))
            link.cut()
        await publisher.publish(to(queue))

    with Forwarder(broker_url) as link:
        using(link.url, act)

    assert [record for record in caplog.records if record.name.startswith(("aiormq", "aio_pika"))] == []


def test_a_host_that_falls_silent_is_left_within_one_publish(rabbit: Broker, broker_url: str, queue: str) -> None:
    async def act(publisher: AioPikaPublisher) -> None:
        await publisher.publish(to(queue, b"1"))
        link.stall(new_ones=True)
        await publisher.publish(to(queue, b"2"), timeout=20.0)
        await publisher.publish(to(queue, b"3"), timeout=20.0)

    with Forwarder(broker_url) as link:
        using([link.url, broker_url], act)

    assert everything_in(rabbit, queue) == [b"1", b"2", b"3"]


def test_after_a_publish_that_was_too_late_the_next_one_finds_another_host(
    rabbit: Broker, broker_url: str, queue: str
) -> None:
    async def act(publisher: AioPikaPublisher) -> None:
        await publisher.publish(to(queue, b"1"))
        link.stall(new_ones=True)
        with pytest.raises(PublishTimeout):
            await publisher.publish(to(queue, b"2"), timeout=0.3)
        await publisher.publish(to(queue, b"3"), timeout=20.0)

    with Forwarder(broker_url) as link:
        using([link.url, broker_url], act)

    assert everything_in(rabbit, queue) == [b"1", b"3"]


@pytest.mark.parametrize("said", [LOGIN, VIRTUAL_HOST], ids=["login", "virtual host"])
def test_a_connection_lost_in_the_handshake_is_no_refusal(
    rabbit: Broker, broker_url: str, queue: str, said: bytes
) -> None:
    with Forwarder(broker_url) as link:
        link.cut_after(said)
        using(link.url, lambda publisher: publisher.publish(to(queue)))
        assert link.sprung.is_set()

    assert rabbit.count(queue) == 1


def test_a_message_with_which_no_connection_lasts_fails_alone(rabbit: Broker, broker_url: str, queue: str) -> None:
    batch = [to(queue, body) for body in (b"1", b"the-culprit", b"2")]

    with Forwarder(broker_url) as link:
        link.ban(b"the-culprit")
        errors = using(link.url, lambda publisher: publisher.publish_many(batch))

    assert [type(error) for error in errors] == [type(None), MessageRefused, type(None)]
    assert set(everything_in(rabbit, queue)) == {b"1", b"2"}


@pytest.mark.parametrize("deleted", ["queue", "exchange"])
def test_what_was_deleted_since_is_declared_again(rabbit: Broker, broker_url: str, queue: str, deleted: str) -> None:
    exchange = Exchange(f"{queue}.x", type="direct", auto_delete=True)
    declare = (exchange, Queue(queue), Binding(exchange, queue, "k"))

    async def act(publisher: AioPikaPublisher) -> None:
        await publisher.publish(Message(b"1", Properties(), exchange.name, "k", declare))
        channel = rabbit.channel()
        if deleted == "queue":
            channel.queue_delete(queue)
        else:
            channel.exchange_delete(exchange.name)
        await publisher.publish(Message(b"2", Properties(), exchange.name, "k", declare))

    using(broker_url, act)

    assert everything_in(rabbit, queue)[-1] == b"2"


def test_a_refused_message_goes_again_and_is_stored_when_there_is_room(
    rabbit: Broker, broker_url: str, queue: str
) -> None:
    full = (Queue(queue, arguments=arguments({"x-max-length": 1, "x-overflow": "reject-publish"})),)

    async def act(publisher: AioPikaPublisher) -> None:
        await publisher.publish(Message(b"1", Properties(), "", queue, full))
        refused = asyncio.ensure_future(publisher.publish(Message(b"2", Properties(), "", queue, full)))
        await asyncio.wait({refused}, timeout=0.3)
        assert not refused.done()
        assert everything_in(rabbit, queue) == [b"1"]
        await refused

    using(broker_url, act, nack_patience=60.0)

    assert everything_in(rabbit, queue) == [b"2"]


def test_a_batch_survives_a_cut_in_its_middle(rabbit: Broker, broker_url: str, queue: str) -> None:
    bodies = [f"body-{number:05}".encode() for number in range(1200)]
    batch = [to(queue, body) for body in bodies]

    with Forwarder(broker_url) as link:
        link.cut_after(b"body-00700")
        assert using(link.url, lambda publisher: publisher.publish_many(batch)) == [None] * 1200
        assert link.sprung.is_set()

    assert set(everything_in(rabbit, queue)) == set(bodies)


def test_a_confirm_that_does_not_come_is_a_timeout(broker_url: str, queue: str) -> None:
    async def act(publisher: AioPikaPublisher) -> None:
        await publisher.publish(to(queue))
        link.stall()
        await publisher.publish(to(queue), timeout=0.3)

    with Forwarder(broker_url) as link, pytest.raises(PublishTimeout):
        using(link.url, act)


def test_a_publish_that_is_cancelled_troubles_no_other(rabbit: Broker, broker_url: str, queue: str) -> None:
    async def act(publisher: AioPikaPublisher) -> None:
        await publisher.publish(to(queue, b"1"))
        link.hold_after(b"the-marker")
        held = asyncio.ensure_future(publisher.publish(to(queue, b"the-marker")))
        await asyncio.get_running_loop().run_in_executor(None, link.sprung.wait, 60)
        held.cancel()
        with pytest.raises(asyncio.CancelledError):
            await held
        link.heal()
        await publisher.publish(to(queue, b"2"))

    with Forwarder(broker_url) as link:
        using(link.url, act)

    assert everything_in(rabbit, queue) == [b"1", b"the-marker", b"2"]


def test_cancellations_at_random_moments_are_never_lost_and_leave_nothing_behind(broker_url: str) -> None:
    ends = cancel(broker_url, 300, seed=1)

    assert is_well(ends), ends


def test_those_who_wait_to_write_when_the_connection_is_lost_write_to_the_next(
    rabbit: Broker, broker_url: str, queue: str
) -> None:
    async def act(publisher: AioPikaPublisher) -> list[BaseException | None]:
        await publisher.publish(to(queue))
        link.stall()
        waiting = [asyncio.ensure_future(publisher.publish(to(queue, bytes(100_000)))) for _ in range(200)]
        with pytest.raises(PublishTimeout):  # by now all that can be written is
            await publisher.publish(to(queue), timeout=0.3)
        link.cut()
        return await asyncio.gather(*waiting, return_exceptions=True)

    with Forwarder(broker_url) as link:
        assert set(using(link.url, act)) == {None}

    assert rabbit.count(queue) >= 201


def test_closing_does_not_keep_those_who_publish_waiting(rabbit: Broker, broker_url: str, queue: str) -> None:
    async def act(publisher: AioPikaPublisher) -> list[BaseException | None]:
        await publisher.publish(to(queue))
        waiting = [asyncio.ensure_future(publisher.publish(to(queue, bytes(100_000)))) for _ in range(50)]
        await asyncio.sleep(0)
        await publisher.close()
        return await asyncio.gather(*waiting, return_exceptions=True)

    assert set(using(broker_url, act)) == {None}
    assert rabbit.count(queue) >= 51


def test_closing_waits_for_nobody_who_does_not_read(broker_url: str, queue: str) -> None:
    async def act(publisher: AioPikaPublisher) -> bool:
        await publisher.publish(to(queue))
        link.stall()
        large = [to(queue, bytes(2_000_000)) for _ in range(10)]
        assert [type(error) for error in await publisher.publish_many(large, timeout=0.3)] == [PublishTimeout] * 10
        closing = asyncio.ensure_future(publisher.close())
        await asyncio.wait({closing}, timeout=30.0)
        return closing.done()

    with Forwarder(broker_url) as link:
        assert using(link.url, act)
    collect_sockets()


def test_the_deadline_is_kept_with_a_host_that_is_silent_after_the_tls_handshake(tmp_path: Path) -> None:
    authority, trusted = trustme.CA(), tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(trusted)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    kept: list[socket.socket] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                kept.append(context.wrap_socket(listener.accept()[0], server_side=True))

    async def main(url: str) -> BaseException | None:
        addresses = parse_broker_urls(url, use_ssl={"ca_certs": str(trusted)})
        publishing = asyncio.ensure_future(AioPikaPublisher(addresses, timeout=1.0).publish(to("any")))
        await asyncio.wait({publishing}, timeout=20.0)
        return publishing.exception()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        error = asyncio.run(main(f"amqps://localhost:{listener.getsockname()[1]}/"))
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(30)
    for each in kept:
        each.close()
    collect_sockets()

    assert isinstance(error, BrokerUnreachable)
    assert len(kept) >= 1


def test_event_loops_that_have_ended_are_forgotten(broker_url: str, queue: str) -> None:
    publisher = AioPikaPublisher(parse_broker_urls(broker_url), timeout=20.0)
    loops: list[weakref.ref[asyncio.AbstractEventLoop]] = []

    async def publish() -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        await publisher.publish(to(queue))

    for _ in range(4):
        asyncio.run(publish())
    collect_sockets()

    assert [loop() for loop in loops[:-1]] == [None] * 3


def test_each_event_loop_has_its_own_connection(rabbit: Broker, broker_url: str, queue: str) -> None:
    publisher = AioPikaPublisher(parse_broker_urls(broker_url), timeout=60.0)

    async def once() -> None:
        await publisher.publish(to(queue))
        await publisher.close()

    asyncio.run(once())
    asyncio.run(once())

    assert rabbit.count(queue) == 2


def test_a_forked_child_publishes_over_its_own_connection(rabbit: Broker, broker_url: str, queue: str) -> None:
    with Forwarder(broker_url) as link:
        publisher = AioPikaPublisher(parse_broker_urls(link.url), timeout=60.0)
        loop = asyncio.new_event_loop()
        loop.run_until_complete(publisher.publish(to(queue, b"before")))

        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                signal.alarm(90)
                asyncio.set_event_loop(None)
                asyncio.new_event_loop().run_until_complete(publisher.publish(to(queue, b"child")))
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        loop.run_until_complete(publisher.publish(to(queue, b"parent")))
        loop.run_until_complete(publisher.close())
        loop.close()

        assert set(everything_in(rabbit, queue)) == {b"before", b"child", b"parent"}
        assert link.accepted == 2
