"""Bad input gets a clear answer and loses nothing: each case on a real broker."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pika
import pytest

from amqtask import AmqTask
from amqtask.exceptions import (
    AccessRefused,
    BrokerUnreachable,
    ConnectionBlocked,
    EncodeError,
    MessageTooLarge,
    NotRegistered,
    TimeLimitExceeded,
    Unroutable,
    WorkerLostError,
)
from integration.conftest import Broker
from integration.nodes import RabbitNode, free_port
from integration.waiting import PATIENT
from integration.workers import WorkerProcess, eventually, run_cli

SAMPLE = "integration.apps.limited"


@pytest.fixture
def client(rabbit: Broker) -> Iterator[AmqTask]:
    """A producer with results."""
    app = AmqTask("client", broker=rabbit.url, backend="rpc://", **PATIENT)
    yield app
    app.close()


@pytest.fixture
def queue(rabbit: Broker) -> str:
    """A queue for this test."""
    return rabbit.queue()


@pytest.fixture
def worker(queue: str) -> Iterator[WorkerProcess]:
    """A prefork worker with two children."""
    with WorkerProcess(SAMPLE, "-Q", queue, "-c", "2") as process:
        yield process


def dead(rabbit: Broker, queue: str) -> tuple[dict[str, Any], bytes]:
    """The message in the dead-letter queue, once it is there."""
    name = f"{queue}.dead"
    eventually(lambda: rabbit.count(name) > 0, what=f"nothing in {name}")
    taken = rabbit.take(name)
    assert taken is not None
    properties, body = taken
    return dict(properties.headers or {}), body


def raw(task: str, content_type: str = "application/json") -> pika.BasicProperties:
    """The properties of a task message made by hand."""
    task_id = str(uuid.uuid4())
    return pika.BasicProperties(
        content_type=content_type,
        content_encoding="utf-8",
        correlation_id=task_id,
        delivery_mode=2,
        headers={"lang": "py", "task": task, "id": task_id, "retries": 0},
    )


def test_an_unknown_task_fails_and_is_kept_with_the_reason(
    rabbit: Broker, client: AmqTask, queue: str, worker: WorkerProcess
) -> None:
    result = client.send_task("sample.ad", (1, 2), queue=queue)

    with pytest.raises(NotRegistered, match=r"sample\.ad"):
        result.get(timeout=90)
    headers, body = dead(rabbit, queue)
    assert "sample.add" in headers["x-amqtask-reason"]  # the near name is suggested
    assert json.loads(body)[0] == [1, 2]


def test_an_undecodable_body_is_kept_with_the_reason(rabbit: Broker, queue: str, worker: WorkerProcess) -> None:
    rabbit.publish(queue, b"[[1, 2", raw("sample.add"))

    headers, body = dead(rabbit, queue)
    assert body == b"[[1, 2"
    assert "application/json" in headers["x-amqtask-reason"]
    assert headers["x-amqtask-host"]


def test_a_message_that_is_no_task_is_kept(rabbit: Broker, queue: str, worker: WorkerProcess) -> None:
    rabbit.publish(queue, b"hello", pika.BasicProperties(content_type="text/plain", delivery_mode=2))

    headers, body = dead(rabbit, queue)
    assert body == b"hello"
    assert headers["x-amqtask-reason"]


def test_a_refused_content_type_is_kept_and_never_loaded(rabbit: Broker, queue: str, worker: WorkerProcess) -> None:
    rabbit.publish(queue, b"\x80\x04.", raw("sample.add", "application/x-python-serialize"))

    headers, _ = dead(rabbit, queue)
    assert "accept_content" in headers["x-amqtask-reason"]


def test_wrong_arguments_are_an_error_before_publishing(rabbit: Broker, queue: str) -> None:
    app = AmqTask("typed", broker=rabbit.url, **PATIENT)

    @app.task
    def add(x: int, y: int) -> int:
        return x + y

    with pytest.raises(TypeError, match="add"):
        add.apply_async((1,), queue=queue)
    assert rabbit.count(queue) == 0
    app.close()


def test_wrong_arguments_from_a_stranger_fail_the_task(client: AmqTask, queue: str, worker: WorkerProcess) -> None:
    with pytest.raises(TypeError, match="positional argument"):
        client.send_task("sample.add", (1,), queue=queue).get(timeout=90)


def test_a_result_that_cannot_be_encoded_fails_and_says_so(client: AmqTask, queue: str, worker: WorkerProcess) -> None:
    with pytest.raises(EncodeError, match="set"):
        client.send_task("sample.unencodable", queue=queue).get(timeout=90)


def test_an_exception_that_cannot_be_pickled_comes_back_by_name(
    client: AmqTask, queue: str, worker: WorkerProcess
) -> None:
    result = client.send_task("sample.fail_unpicklable", queue=queue)

    with pytest.raises(Exception, match="no pickle for this") as caught:
        result.get(timeout=90)
    assert type(caught.value).__name__ == "Unpicklable"
    assert client.send_task("sample.add", (1, 1), queue=queue).get(timeout=90) == 2


def test_a_task_that_exits_fails_and_the_worker_goes_on(client: AmqTask, queue: str, worker: WorkerProcess) -> None:
    with pytest.raises(BaseException, match="3") as caught:
        client.send_task("sample.exit", (3,), queue=queue).get(timeout=90)
    assert "SystemExit" in repr(caught.value)
    assert client.send_task("sample.add", (1, 1), queue=queue).get(timeout=90) == 2


def test_a_message_that_kills_its_child_each_time_is_tried_later_and_later_and_says_in_the_end_how(
    rabbit: Broker, client: AmqTask, queue: str, worker: WorkerProcess, tmp_path: Path
) -> None:
    ends = {
        "sample.segfault": "was killed by signal SIGSEGV (11)",
        "sample.kill_self": "was killed by signal SIGKILL (9)",
        "sample.exit_hard": "exited with code 3",
    }
    started = time.monotonic()
    results = {task: client.send_task(task, (str(tmp_path / task),), queue=queue) for task in ends}

    for task, how in ends.items():
        with pytest.raises(WorkerLostError) as caught:
            results[task].get(timeout=90)
        assert str(caught.value).endswith(
            f"delivered 5 times without an end: the process that ran {task}[{results[task].id}] {how}"
        )
        assert len((tmp_path / task).read_text().split()) == 5
    assert time.monotonic() - started > 5.0
    found: dict[str, str] = {}
    while len(found) < 3:
        headers, _ = dead(rabbit, queue)
        assert headers["x-amqtask-attempts"] == 5
        found[headers["task"]] = headers["x-amqtask-reason"]
    assert all(found[task].endswith(how) for task, how in ends.items())
    assert client.send_task("sample.add", (1, 1), queue=queue).get(timeout=90) == 2


def test_a_child_that_ate_too_much_memory_is_replaced(client: AmqTask, queue: str, rabbit: Broker) -> None:
    with WorkerProcess(SAMPLE, "-Q", queue, "-c", "1", "--max-memory-per-child", "150000"):
        eater = client.send_task("sample.eat_memory", (200,), queue=queue).get(timeout=90)
        assert client.send_task("sample.pid", queue=queue).get(timeout=90) != eater


def test_a_task_that_ignores_its_soft_limit_is_killed_at_the_hard_one(
    client: AmqTask, queue: str, worker: WorkerProcess
) -> None:
    assert client.send_task("sample.heed_soft_limit", queue=queue).get(timeout=90) == "cleaned up"
    with pytest.raises(TimeLimitExceeded):
        client.send_task("sample.ignore_soft_limit", queue=queue).get(timeout=90)
    assert client.send_task("sample.add", (1, 1), queue=queue).get(timeout=90) == 2


def test_a_rejected_task_is_kept(rabbit: Broker, client: AmqTask, queue: str, worker: WorkerProcess) -> None:
    client.send_task("sample.reject", queue=queue)

    headers, _ = dead(rabbit, queue)
    assert "not for me" in headers["x-amqtask-reason"]


def test_a_queue_with_other_arguments_is_used_as_it_is_found(rabbit: Broker, client: AmqTask, queue: str) -> None:
    channel = rabbit.channel()
    channel.queue_declare(queue, durable=True, arguments={"x-max-length": 1000})
    channel.close()

    with WorkerProcess(SAMPLE, "-Q", queue, "-c", "1") as worker:
        assert client.send_task("sample.add", (1, 2), queue=queue).get(timeout=90) == 3
        log = worker.log
    assert log.count("used as found") == 1
    assert queue in log


def test_a_refused_login_is_said_at_once(rabbit: Broker) -> None:
    app = AmqTask("client", broker=rabbit.url.replace("guest:guest", "guest:wrong"), **PATIENT)

    with pytest.raises(AccessRefused, match=r"(?i)user.*guest|guest.*password") as caught:
        app.send_task("sample.add", (1, 2))
    assert "wrong" not in str(caught.value)
    app.close()


def test_a_worker_with_a_refused_login_ends_with_an_error(rabbit: Broker) -> None:
    url = rabbit.url.replace("guest:guest", "guest:wrong")
    code, output = run_cli("-A", SAMPLE, "-b", url, "worker", "-P", "prefork", "-c", "1")

    assert code == 1
    assert "guest" in output
    assert "guest:wrong" not in output
    assert "AMQPConnector" not in output  # pika's own words for it


def test_a_wrong_vhost_is_said_at_once(rabbit: Broker) -> None:
    address, _, _ = rabbit.url.rpartition("/")
    app = AmqTask("client", broker=f"{address}/nosuchvhost", **PATIENT)

    with pytest.raises(AccessRefused, match="nosuchvhost"):
        app.send_task("sample.add", (1, 2))
    app.close()


def test_no_broker_is_an_error_within_the_deadline() -> None:
    app = AmqTask("client", broker=f"amqp://guest:guest@127.0.0.1:{free_port()}//")
    app.conf.broker_publish_timeout = 1.0

    with pytest.raises(BrokerUnreachable, match=r"127\.0\.0\.1"):
        app.send_task("sample.add", (1, 2))
    app.close()


@pytest.mark.parametrize("is_told_by_the_call", [True, False])
def test_the_deadline_covers_the_connection_for_results(is_told_by_the_call: bool) -> None:
    app = AmqTask("client", broker=f"amqp://guest:guest@127.0.0.1:{free_port()}//", backend="rpc://")
    app.conf.broker_connection_timeout = 3600.0
    app.conf.broker_publish_timeout = 3600.0 if is_told_by_the_call else 0.5
    told: dict[str, Any] = {"timeout": 0.5} if is_told_by_the_call else {}

    with pytest.raises(BrokerUnreachable, match=r"127\.0\.0\.1"):
        app.send_task("sample.add", (1, 2), **told)
    with pytest.raises(BrokerUnreachable, match=r"127\.0\.0\.1"):
        asyncio.run(app.asend_task("sample.add", (1, 2), **told))
    app.close()


def test_a_worker_waits_for_a_broker_that_is_not_there_yet(hurt_node: RabbitNode) -> None:
    hurt_node.stop()
    environment = {"AMQTASK_BROKER_URL": hurt_node.url}
    process = WorkerProcess(SAMPLE, "-Q", "late", "-c", "1", environment=environment)
    process.start(wait=False)
    try:
        process.await_log("127.0.0.1")
        hurt_node.start()
        app = AmqTask("client", broker=hurt_node.url, backend="rpc://", **PATIENT)
        assert app.send_task("sample.add", (1, 2), queue="late").get(timeout=90) == 3
        hurt_node.stop()
        hurt_node.start()
        assert app.send_task("sample.add", (2, 2), queue="late").get(timeout=90) == 4
        assert process.stop() == 0
        assert "AMQPConnector" not in process.log
        app.close()
    finally:
        process.kill()


def test_an_unroutable_message_is_an_error_of_its_own_call(rabbit: Broker, client: AmqTask, queue: str) -> None:
    with pytest.raises(Unroutable, match="nobody-listens"):
        client.send_task("sample.add", (1, 2), exchange="amq.direct", routing_key="nobody-listens")
    client.send_task("sample.add", (1, 2), queue=queue)  # the next call is not troubled


def test_a_message_over_the_brokers_limit_is_named_so(hurt_node: RabbitNode) -> None:
    app = AmqTask("client", broker=hurt_node.url, **PATIENT)

    with pytest.raises(MessageTooLarge, match=r"1048576|1 ?MiB"):
        app.send_task("sample.fail", ("x" * 2_000_000,), queue="large")
    app.send_task("sample.fail", ("small",), queue="large")
    app.close()


def test_a_blocked_connection_is_named_so(hurt_node: RabbitNode) -> None:
    app = AmqTask("client", broker=hurt_node.url, **PATIENT)
    app.send_task("sample.add", (1, 2), queue="alarm")
    app.conf.broker_publish_timeout = 5.0
    hurt_node.ctl("set_vm_memory_high_watermark", "0.00001")
    try:
        # The broker blocks a connection at its first publish after the alarm, and takes that one.
        with suppress(ConnectionBlocked):
            app.send_task("sample.add", (1, 2), queue="alarm")
        with pytest.raises(ConnectionBlocked, match="alarm"):
            app.send_task("sample.add", (1, 2), queue="alarm")
    finally:
        hurt_node.ctl("set_vm_memory_high_watermark", "0.6")
    app.conf.broker_publish_timeout = 60.0
    app.send_task("sample.add", (1, 2), queue="alarm")
    app.close()


def test_consumer_timeout_costs_no_task(hurt_node: RabbitNode, tmp_path: Path) -> None:
    started, release = tmp_path / "started", tmp_path / "release"
    # The broker looks at the ages of deliveries once a minute, unless it is told.
    hurt_node.ctl(
        "eval",
        "[application:set_env(rabbit, K, V) || {K, V} <- [{consumer_timeout, 2000}, {channel_tick_interval, 1000}]].",
    )
    environment = {"AMQTASK_BROKER_URL": hurt_node.url}
    app = AmqTask("client", broker=hurt_node.url, backend="rpc://", **PATIENT)
    try:
        with WorkerProcess(SAMPLE, "-Q", "lease", "-c", "1", environment=environment) as worker:
            result = app.send_task("sample.wait_for", (str(started), str(release)), queue="lease")
            eventually(started.exists)
            worker.await_log("consumer_timeout")
            release.touch()
            assert result.get(timeout=90) == "released"
            worker.stop()
    finally:
        hurt_node.ctl(
            "eval",
            "[application:set_env(rabbit, K, V) || {K, V} <- [{consumer_timeout, 1800000}, {channel_tick_interval, 60000}]].",
        )
        app.close()


def test_two_workers_with_one_name_both_work_and_the_second_warns(
    client: AmqTask, queue: str, worker: WorkerProcess
) -> None:
    with WorkerProcess(SAMPLE, "-Q", queue, "-c", "1") as second:
        second.await_log("another worker")
        results = [client.send_task("sample.add", (n, n), queue=queue) for n in range(10)]
        assert [result.get(timeout=90) for result in results] == [n + n for n in range(10)]


def test_a_pool_that_does_not_exist_is_refused_with_a_suggestion() -> None:
    code, output = run_cli("-A", SAMPLE, "worker", "-P", "eventlett")

    assert code == 2
    assert "eventlet" in output
    assert "prefork" in output


def test_a_wrong_option_is_refused_with_a_suggestion() -> None:
    code, output = run_cli("-A", SAMPLE, "worker", "--concurency", "2")

    assert code == 2
    assert "--concurrency" in output


def test_no_app_says_what_was_looked_for(tmp_path: Path) -> None:
    code, output = run_cli("--workdir", str(tmp_path), "worker")

    assert code == 1
    assert "tasks.py" in output
    assert "-A" in output
