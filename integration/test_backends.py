"""The stores on real servers keep the backends' contract, across forks, cut connections and bad input too."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import shutil
import ssl
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pika
import pytest
import redis
import trustme

from amqtask import states
from amqtask.backends.contract import BackendOptions, ResultBackend
from amqtask.backends.redis import RedisBackend
from amqtask.backends.rpc import RpcBackend
from amqtask.exceptions import BackendUnreachable, TimeoutError, Undecodable
from amqtask.protocol.message import Message, Properties
from amqtask.protocol.result import ResultMessage
from amqtask.result import AsyncResult
from amqtask.testing.suites.backend import PATIENCE, BackendSuite, eventually
from amqtask.transport.publisher import PikaPublisher
from amqtask.transport.redis import lines
from amqtask.transport.url import parse_broker_urls
from integration.conftest import Broker
from integration.faults import Forwarder
from integration.nodes import free_port

# As a caller's queue of replies is named.
CALLER = "8d0f7b1c-3c52-4b55-9a35-0f7a64e0f5d3"


def success(value: Any = None) -> ResultMessage:
    return ResultMessage(str(uuid.uuid4()), states.SUCCESS, value)


def in_a_child(work: Callable[[], None]) -> int:
    """Fork, run it there; the exit code."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# -- rpc


@pytest.fixture
def publisher(broker_url: str) -> Iterator[PikaPublisher]:
    made = PikaPublisher(parse_broker_urls(broker_url), timeout=60.0)
    yield made
    made.close()


def rpc(url: str, **options: Any) -> RpcBackend:
    given = {"expires": 60.0, "connect_timeout": 60.0, **options}
    return RpcBackend(BackendOptions(url="rpc://", brokers=parse_broker_urls(url), **given))


class TestRpc(BackendSuite):
    # Only the process that published a task reads its result.
    is_shared = False

    @pytest.fixture(autouse=True)
    def broker(self, broker_url: str, publisher: PikaPublisher) -> None:
        self.broker_url = broker_url
        self.publisher = publisher

    def make(self) -> ResultBackend:
        return rpc(self.broker_url)

    def publish(self, message: Message) -> None:
        self.publisher.publish(message)


@pytest.fixture
def client(broker_url: str) -> Iterator[RpcBackend]:
    made = rpc(broker_url)
    made.prepare(())
    yield made
    made.close()


def answer(backend: RpcBackend, publisher: PikaPublisher, result: ResultMessage, reply_to: str = "") -> None:
    message = backend.message_for(result, reply_to or backend.reply_to(), result.task_id)
    assert message is not None
    publisher.publish(message)


@pytest.mark.parametrize(("persistent", "mode"), [(True, 2), (False, 1)])
def test_a_result_message_is_celerys(broker_url: str, persistent: bool, mode: int) -> None:
    # But for the mandatory flag: the broker says when its reader's queue is away.
    message = rpc(broker_url, persistent=persistent).message_for(success(1), CALLER, "the-task")

    assert message is not None
    assert (message.exchange, message.routing_key, message.mandatory) == ("", CALLER, True)
    assert (message.properties.correlation_id, message.properties.delivery_mode) == ("the-task", mode)
    assert (message.properties.content_type, message.properties.content_encoding) == ("application/json", "utf-8")
    assert message.properties.expiration == "60000"


def test_compressed_results_are_read_whatever_the_reader_asks_for(
    client: RpcBackend, publisher: PikaPublisher, broker_url: str
) -> None:
    result = success("long " * 10_000)
    message = rpc(broker_url, compression="gzip").message_for(result, client.reply_to(), result.task_id)
    assert message is not None
    assert len(message.body) < 1000
    publisher.publish(message)

    assert client.wait(result.task_id, timeout=PATIENCE).result == result.result


def test_nobody_asked_means_no_message(broker_url: str) -> None:
    assert rpc(broker_url).message_for(success(1), "", "the-task") is None
    assert rpc(broker_url).message_for(success(1), None, "the-task") is None


def test_the_reply_queue_outlives_its_connection_and_goes_with_its_process(client: RpcBackend, rabbit: Broker) -> None:
    queue = client.reply_to()
    channel = rabbit.channel()
    arguments = {"x-queue-type": "classic", "x-expires": 60_000}

    channel.queue_declare(queue, durable=True, exclusive=False, auto_delete=False, arguments=arguments)
    client.close()

    with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="NOT_FOUND"):
        rabbit.channel().queue_declare(queue, passive=True)


def test_a_forked_child_has_a_reply_queue_of_its_own(client: RpcBackend, publisher: PikaPublisher) -> None:
    before, during, after = success("before"), success("during"), success("after")
    answer(client, publisher, before)
    assert client.wait(before.task_id, timeout=PATIENCE).result == "before"
    parents_queue = client.reply_to()

    def child() -> None:
        assert client.reply_to() != parents_queue
        client.prepare(())
        answer(client, publisher, during)
        assert client.wait(during.task_id, timeout=PATIENCE).result == "during"
        client.close()

    assert in_a_child(child) == 0
    assert client.reply_to() == parents_queue
    answer(client, publisher, after)
    assert client.wait(after.task_id, timeout=PATIENCE).result == "after"


def test_results_that_come_while_the_connection_is_cut_are_not_lost(broker_url: str, publisher: PikaPublisher) -> None:
    with Forwarder(broker_url) as forwarder:
        client = rpc(forwarder.url)
        client.prepare(())
        results = [success(number) for number in range(200)]
        for result in results[:100]:
            answer(client, publisher, result)
        forwarder.cut()
        for result in results[100:]:
            answer(client, publisher, result)

        found = dict(client.iter_ready([result.task_id for result in results], timeout=PATIENCE))

        assert [found[result.task_id].result for result in results] == list(range(200))
        client.close()


def test_a_coroutine_is_told_that_the_application_was_closed(client: RpcBackend) -> None:
    async def main() -> BaseException | None:
        waiting = asyncio.ensure_future(client.await_result("it", timeout=None))
        await asyncio.sleep(0)
        await asyncio.to_thread(client.close)
        await asyncio.wait({waiting}, timeout=PATIENCE)
        return waiting.exception()

    with pytest.raises(BackendUnreachable, match="is closed"):
        raise asyncio.run(main()) or AssertionError("it has a result")


def test_a_reply_that_cannot_be_read_is_that_tasks_failure(client: RpcBackend, publisher: PikaPublisher) -> None:
    bad, good = AsyncResult[Any]("bad", client), success("good")
    publisher.publish(
        Message(b"{", Properties("application/json", "utf-8", correlation_id="bad"), "", client.reply_to())
    )
    answer(client, publisher, good)

    assert client.wait(good.task_id, timeout=PATIENCE).result == "good"
    with pytest.raises(Undecodable):
        bad.get(timeout=PATIENCE)


def test_a_process_that_never_asks_does_not_leave_its_results_in_the_broker(
    client: RpcBackend, publisher: PikaPublisher, rabbit: Broker
) -> None:
    for _ in range(50):
        answer(client, publisher, success())

    def is_drained() -> bool:
        client.prepare(())
        return rabbit.count(client.reply_to()) == 0 and client.find("x") is None

    eventually(is_drained)


def test_no_broker_is_a_named_error_without_the_password() -> None:
    client = rpc(f"amqp://guest:secret@127.0.0.1:{free_port()}/", connect_timeout=0.5)

    with pytest.raises(BackendUnreachable) as caught:
        client.wait("a", timeout=0.3)

    assert "secret" not in str(caught.value)


# -- redis


def redis_backend(url: str, **options: Any) -> RedisBackend:
    return RedisBackend(BackendOptions(url=url, **{"expires": 60.0, **options}))


@pytest.fixture
def store(redis_url: str) -> Iterator[RedisBackend]:
    made = redis_backend(redis_url)
    yield made
    made.close()


@pytest.fixture
def seen(redis_url: str) -> Iterator[Any]:
    """The server as others see it."""
    with redis.Redis.from_url(redis_url) as found:
        yield found


def test_results_lie_under_celerys_keys_and_expire(redis_url: str, seen: Any) -> None:
    plain, other = success(1), success(2)

    redis_backend(redis_url, expires=100.0).store(plain)
    redis_backend(redis_url, expires=None, transport_options=(("global_keyprefix", "mine"),)).store(other)

    assert b'"status": "SUCCESS"' in seen.get(f"celery-task-meta-{plain.task_id}")
    assert 90 <= seen.ttl(f"celery-task-meta-{plain.task_id}") <= 100
    assert seen.ttl(f"mine_celery-task-meta-{other.task_id}") == -1
    seen.delete(f"mine_celery-task-meta-{other.task_id}")


def test_connections_that_were_idle_are_used_again(
    store: RedisBackend, seen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def store_and_wait() -> None:
        result = success(1)
        with stored_when_somebody_waits(store, seen, result):
            assert store.wait(result.task_id, timeout=PATIENCE).result == 1

    store_and_wait()
    connections = {client["id"] for client in seen.client_list()}
    monkeypatch.setattr(lines, "IDLE_SECONDS", 0.0)
    store_and_wait()
    store_and_wait()

    assert {client["id"] for client in seen.client_list()} == connections


@pytest.mark.parametrize("value", [b"{", b"[1]", b"\x80\x04K\x01."], ids=["cut off", "a list", "pickled"])
def test_a_value_that_is_no_result_is_that_tasks_failure(store: RedisBackend, seen: Any, value: bytes) -> None:
    bad, good = success(1), success("good")
    seen.set(f"celery-task-meta-{bad.task_id}", value, ex=60)
    store.store(good)
    called: queue.SimpleQueue[str] = queue.SimpleQueue()

    AsyncResult[Any](bad.task_id, store).then(lambda result: called.put(result.state))
    found = dict(store.iter_ready([bad.task_id, good.task_id], timeout=PATIENCE))
    with pytest.raises(Undecodable):
        asyncio.run(AsyncResult[Any](bad.task_id, store).aget(PATIENCE))

    assert found[good.task_id].result == "good"
    assert found[bad.task_id].status == states.FAILURE
    assert called.get(timeout=PATIENCE) == states.FAILURE
    store.store(bad)  # as a worker does at the end of the task
    assert store.wait(bad.task_id, timeout=PATIENCE).result == 1


def test_a_stored_result_is_published_too(store: RedisBackend, seen: Any) -> None:
    result = success(1)
    key = f"celery-task-meta-{result.task_id}"
    with seen.pubsub() as listening:
        listening.subscribe(key)
        assert listening.get_message(timeout=PATIENCE)["type"] == "subscribe"

        store.store(result)

        assert listening.get_message(timeout=PATIENCE)["data"] == seen.get(key)


def test_a_value_of_another_type_under_the_key_is_written_over(store: RedisBackend, seen: Any) -> None:
    result = success(1)
    seen.lpush(f"celery-task-meta-{result.task_id}", "something else")

    store.store(result)

    assert store.find(result.task_id) == result


def test_a_forked_child_has_connections_of_its_own(store: RedisBackend, redis_url: str, seen: Any) -> None:
    before, during, after = success("before"), success("during"), success("after")
    with stored_when_somebody_waits(store, seen, before):
        store.wait(before.task_id, timeout=PATIENCE)

    def child() -> None:
        with redis.Redis.from_url(redis_url) as seen, stored_when_somebody_waits(store, seen, during):
            assert store.wait(during.task_id, timeout=PATIENCE).result == "during"

    assert in_a_child(child) == 0
    store.store(after)
    assert store.wait(after.task_id, timeout=PATIENCE).result == "after"
    assert store.wait(during.task_id, timeout=0).result == "during"


@pytest.fixture
def forwarder(redis_url: str) -> Iterator[Forwarder]:
    split = urlsplit(redis_url)
    with Forwarder(f"redis://{split.hostname}:{split.port or 6379}{split.path}") as made:
        made.url = f"redis://127.0.0.1:{made.port}{split.path}"
        yield made


def is_subscribed(seen: Any, *results: ResultMessage) -> bool:
    names = [f"celery-task-meta-{result.task_id}" for result in results]
    return all(count for _, count in seen.pubsub_numsub(*names))


@contextlib.contextmanager
def stored_when_somebody_waits(store: RedisBackend, seen: Any, result: ResultMessage) -> Iterator[None]:
    """Stores the result as soon as the block waits for it."""

    def work() -> None:
        eventually(lambda: is_subscribed(seen, result))
        store.store(result)

    thread = threading.Thread(target=work)
    thread.start()
    yield
    thread.join(PATIENCE)


def test_who_waits_sees_what_was_stored_while_the_connection_was_cut(
    store: RedisBackend, forwarder: Forwarder, seen: Any
) -> None:
    client = redis_backend(forwarder.url)
    waited, called, awaited = success("waited"), success("called"), success("awaited")
    outcomes: dict[str, Any] = {}
    arrived = threading.Event()

    def call_back(result: AsyncResult[Any]) -> None:
        outcomes["called"] = result.get()
        arrived.set()

    AsyncResult[Any](called.task_id, client).then(call_back)
    threads = [
        threading.Thread(target=lambda: outcomes.update(waited=client.wait(waited.task_id, timeout=PATIENCE).result)),
        threading.Thread(
            target=lambda: outcomes.update(
                awaited=asyncio.run(client.await_result(awaited.task_id, timeout=PATIENCE)).result
            )
        ),
    ]
    for thread in threads:
        thread.start()
    eventually(lambda: is_subscribed(seen, waited, called, awaited))

    forwarder.cut()
    for result in (waited, called, awaited):
        store.store(result)

    for thread in threads:
        thread.join(PATIENCE)
    assert arrived.wait(PATIENCE)
    assert outcomes == {"waited": "waited", "called": "called", "awaited": "awaited"}
    client.close()


def test_an_idle_connection_that_was_cut_is_replaced(store: RedisBackend, forwarder: Forwarder, seen: Any) -> None:
    client = redis_backend(forwarder.url)
    first, second, third = success(1), success(2), success(3)
    with stored_when_somebody_waits(store, seen, first):
        client.wait(first.task_id, timeout=PATIENCE)

    forwarder.cut()
    client.store(second)

    assert client.wait(second.task_id, timeout=PATIENCE).result == 2
    with stored_when_somebody_waits(store, seen, third):
        assert client.wait(third.task_id, timeout=PATIENCE).result == 3
    client.close()


def test_waiting_again_and_again_uses_one_connection(store: RedisBackend, forwarder: Forwarder, seen: Any) -> None:
    client = redis_backend(forwarder.url)
    for number in range(30):
        result = success(number)

        with stored_when_somebody_waits(store, seen, result):
            assert client.wait(result.task_id, timeout=PATIENCE).result == number

    assert forwarder.accepted == 2
    client.close()


def test_coroutines_leave_no_subscriptions_behind_while_others_wait(store: RedisBackend, seen: Any) -> None:
    async def main() -> int:
        longest = asyncio.ensure_future(store.await_result(success(0).task_id, timeout=PATIENCE))
        for _ in range(15):
            results = [success(number) for number in range(100)]
            for result in results:
                await asyncio.to_thread(store.store, result)
            await asyncio.gather(*(store.await_result(result.task_id, timeout=PATIENCE) for result in results))
        found = len(seen.pubsub_channels("celery-task-meta-*"))
        longest.cancel()
        await asyncio.wait({longest})
        return found

    assert asyncio.run(main()) < 1100
    eventually(lambda: not seen.pubsub_channels("celery-task-meta-*"))


def test_threads_that_wait_go_on_when_the_store_is_closed(redis_url: str) -> None:
    """It opens again when it is needed."""
    store = RedisBackend(BackendOptions(url=redis_url))
    ends: list[BaseException] = []

    def wait() -> None:
        try:
            store.wait(str(uuid.uuid4()), timeout=0.2)
        except BaseException as error:
            ends.append(error)

    for step in range(10):
        threads = [threading.Thread(target=wait) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(step * 0.004)  # at another moment each time
        store.close()
        for thread in threads:
            thread.join(PATIENCE)
    store.close()

    assert [type(end) for end in ends] == [TimeoutError] * 30, ends


def test_no_redis_is_a_named_error_without_the_password() -> None:
    port = free_port()
    client = redis_backend(f"redis://:secret@127.0.0.1:{port}/1", transport_options=(("retry_for", 0.2),))

    def ask_and_see(ask: Callable[[], Any]) -> None:
        with pytest.raises(BackendUnreachable, match=f"redis://127.0.0.1:{port}/1 does not answer") as caught:
            ask()
        assert "secret" not in str(caught.value)

    ask_and_see(lambda: client.find("a"))
    ask_and_see(lambda: client.wait("a", timeout=PATIENCE))
    ask_and_see(lambda: client.store(success()))
    ask_and_see(lambda: asyncio.run(client.await_result("a", timeout=PATIENCE)))


class PrivateRedis:
    """A server with arguments of its own."""

    def __init__(self, *arguments: str) -> None:
        if not shutil.which("redis-server"):
            pytest.skip("redis-server is not installed")
        command = ["redis-server", "--bind", "127.0.0.1", "--save", "", *arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        said = []
        for line in self._process.stdout:
            said.append(line)
            if "Ready to accept connections" in line:
                return
        self.stop()
        pytest.skip(f"redis-server did not start: {''.join(said)}")

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def test_a_refused_password_is_said_at_once() -> None:
    port = free_port()
    server = PrivateRedis("--port", str(port), "--requirepass", "right")
    try:
        right, wrong = (redis_backend(f"redis://:{word}@127.0.0.1:{port}/0") for word in ("right", "wrong"))
        right.store(success())
        with pytest.raises(BackendUnreachable, match="refuses us"):
            wrong.store(success())
        with pytest.raises(BackendUnreachable, match="refuses us"):
            asyncio.run(wrong.await_result("a", timeout=PATIENCE))
        right.close()
    finally:
        server.stop()


def test_results_travel_over_tls(tmp_path: Path) -> None:
    authority, port = trustme.CA(), free_port()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    key, certificate, trusted = (tmp_path / name for name in ("key.pem", "cert.pem", "ca.pem"))
    issued.private_key_pem.write_to_path(key)
    issued.cert_chain_pems[0].write_to_path(certificate)
    authority.cert_pem.write_to_path(trusted)
    server = PrivateRedis(
        *("--port", "0", "--tls-port", str(port), "--tls-auth-clients", "no"),
        *("--tls-cert-file", str(certificate), "--tls-key-file", str(key), "--tls-ca-cert-file", str(trusted)),
    )
    try:
        # Celery's spelling of the options.
        url = f"rediss://127.0.0.1:{port}/0?ssl_cert_reqs=CERT_REQUIRED&ssl_ca_certs={trusted}"
        store, result = redis_backend(url), success("secret")
        storing = threading.Thread(target=store.store, args=(result,))
        storing.start()

        assert store.wait(result.task_id, timeout=PATIENCE).result == "secret"
        assert asyncio.run(store.await_result(result.task_id, timeout=PATIENCE)).result == "secret"
        settings = {"redis_backend_use_ssl": {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_ca_certs": str(trusted)}}
        by_settings = redis_backend(f"redis://127.0.0.1:{port}/0", settings=settings)
        assert by_settings.wait(result.task_id, timeout=PATIENCE).result == "secret"
        by_settings.close()
        with pytest.raises(BackendUnreachable, match="certificate"):
            redis_backend(f"rediss://127.0.0.1:{port}/0").find("a")
        storing.join(PATIENCE)
        store.close()
    finally:
        server.stop()
