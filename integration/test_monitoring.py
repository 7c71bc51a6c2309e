"""Metrics and health of real workers, as Prometheus and Kubernetes ask for them."""

from __future__ import annotations

import http.client
import select
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from amqtask import AmqTask
from amqtask.services.metrics import MOST_CONNECTIONS, HttpServer, text
from amqtask.testing.loop import PlainLoop
from integration.conftest import Broker
from integration.faults import Forwarder
from integration.nodes import free_port
from integration.waiting import PATIENT
from integration.workers import WorkerProcess, eventually, run_session

SAMPLE = "integration.apps.sample"
HELD = "integration.apps.held"
POOLS = ["solo", "threads", "prefork", "eventlet", "gevent", "asyncio"]


def get(port: int, path: str) -> tuple[int, str]:
    """Status and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=90)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


class Scraped:
    """One look at /metrics."""

    def __init__(self, port: int) -> None:
        status, page = get(port, "/metrics")
        assert status == 200
        self._samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]

    def __call__(self, name: str, **labels: str) -> float:
        """The sum of the samples that have these labels."""
        return sum(
            sample.value for sample in self._samples if sample.name == name and labels.items() <= sample.labels.items()
        )


def test_sockets_that_say_nothing_do_not_keep_probes_out() -> None:
    with closing(PlainLoop()) as loop:
        server = HttpServer(loop, host="127.0.0.1", port=0, pages={"/live": lambda headers: text(200, "live")})
        server.start()

        def connect(count: int) -> list[socket.socket]:
            return [socket.create_connection(("127.0.0.1", server.port)) for _ in range(count)]

        # More than wait for an accept, so somebody has to turn the loop meanwhile.
        with ThreadPoolExecutor(1) as client:
            connecting = client.submit(connect, 2 * MOST_CONNECTIONS + 1)
            loop.run_until(connecting.done, 60.0)
        *silent, probe = connecting.result()
        probe.sendall(b"GET /live HTTP/1.1\r\n\r\n")
        probe.setblocking(False)

        loop.run_until(lambda: select.select([probe], [], [], 0)[0], 60.0)

        assert probe.recv(1000).endswith(b"live\n")
        server.stop()
        for each in (probe, *silent):
            each.close()


@pytest.mark.parametrize("pool", POOLS)
def test_what_tasks_did_is_on_the_page(rabbit: Broker, pool: str) -> None:
    queue, port = rabbit.queue("metrics"), free_port()
    app = AmqTask("client", broker=rabbit.url, backend="rpc://", **PATIENT, task_send_timestamp=True)
    ports = ("--metrics-port", str(port), "--health-port", str(port))
    with WorkerProcess(SAMPLE, "-Q", queue, "-P", pool, "-c", "2", *ports, "--http-host", "127.0.0.1"):
        results = [app.send_task("sample.add", (n, n), queue=queue) for n in range(20)]
        assert [result.get(timeout=90) for result in results] == [2 * n for n in range(20)]
        app.send_task("sample.fail", ("no",), queue=queue).get(timeout=90, propagate=False)
        app.send_task("sample.reject", queue=queue).get(timeout=90, propagate=False)
        app.send_task("nobody.knows", queue=queue).get(timeout=90, propagate=False)
        eventually(lambda: Scraped(port)("amqtask_dead_letters_total") == 2, what="two dead letters")
        value = Scraped(port)

        assert value("amqtask_tasks_total", task="sample.add", queue=queue, state="SUCCESS") == 20
        assert value("amqtask_tasks_total", task="sample.fail", queue=queue, state="FAILURE") == 1
        assert value("amqtask_tasks_total", task="sample.reject", queue=queue, state="REJECTED") == 1
        assert value("amqtask_tasks_total", task="unknown", queue=queue, state="FAILURE") == 1
        assert value("amqtask_task_runtime_seconds_count", task="sample.add") == 20
        # Only first deliveries have a wait; a quorum queue may count a delivery as returned before a worker has read it.
        again = value("amqtask_redeliveries_total", queue=queue)
        assert 20 - again <= value("amqtask_task_queue_wait_seconds_count", task="sample.add") <= 20
        assert value("amqtask_pool_slots") == (1 if pool == "solo" else 2)
        assert value("amqtask_prefetch_window", queue=queue) >= 1
        assert value("amqtask_publish_confirms_total", outcome="confirmed") >= 24
        assert value("amqtask_build_info", pool=pool) == 1
        assert get(port, "/live") == (200, "live\n")
        assert get(port, "/ready") == (200, f"ready: consuming {queue}\n")
    app.close()


@pytest.mark.parametrize("pool", ["solo", "prefork", "gevent"])
def test_a_worker_that_drains_is_live_and_not_ready(rabbit: Broker, tmp_path: Path, pool: str) -> None:
    queue, port = rabbit.queue("drain"), free_port()
    app = AmqTask("client", broker=rabbit.url, backend="rpc://", **PATIENT)
    with WorkerProcess(HELD, "-Q", queue, "-P", pool, "-c", "1", "--health-port", str(port)) as worker:
        app.send_task("held.hold", (str(tmp_path), "a"), queue=queue)
        eventually((tmp_path / "runs").exists, what="the task runs")
        worker.signal(signal.SIGTERM)
        worker.await_log("Warm shutdown")

        assert get(port, "/ready") == (503, "shutting down: 1 task still runs\n")
        assert get(port, "/live")[0] == 200

        (tmp_path / "release-a").touch()
        assert worker.wait() == 0
    app.close()


def test_a_worker_that_finds_no_broker_is_live_and_not_ready() -> None:
    port, nobody = free_port(), free_port()
    worker = WorkerProcess(
        SAMPLE, "--health-port", str(port), environment={"AMQTASK_BROKER_URL": f"amqp://127.0.0.1:{nobody}//"}
    )
    with worker.start(wait=False):
        worker.await_log("no broker answers")

        assert get(port, "/ready") == (503, "connecting to the broker\n")
        assert get(port, "/live") == (200, "live\n")


def test_the_ports_can_come_from_the_environment(rabbit: Broker) -> None:
    metrics, health = free_port(), free_port()
    environment = {"AMQTASK_WORKER_METRICS_PORT": str(metrics), "AMQTASK_WORKER_HEALTH_PORT": str(health)}
    with WorkerProcess(SAMPLE, "-Q", rabbit.queue("env"), environment=environment):
        assert get(metrics, "/metrics")[0] == 200
        assert get(metrics, "/live")[0] == 404
        assert get(health, "/live")[0] == 200


def test_a_port_that_is_taken_is_a_clear_error(rabbit: Broker) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        worker = WorkerProcess(
            SAMPLE, "-Q", rabbit.queue("taken"), "--metrics-port", str(port), "--http-host", "127.0.0.1"
        )
        with worker.start(wait=False):
            assert worker.wait() == 1
            assert f"cannot listen on 127.0.0.1 port {port} for metrics or health: Address already in use" in worker.log
            assert "Traceback" not in worker.log


def test_a_silent_client_and_a_torn_request_disturb_nobody(rabbit: Broker) -> None:
    port = free_port()
    with WorkerProcess(SAMPLE, "-Q", rabbit.queue("torn"), "--health-port", str(port)):
        with (
            socket.create_connection(("127.0.0.1", port)),
            socket.create_connection(("127.0.0.1", port)) as torn,
            socket.create_connection(("127.0.0.1", port)) as large,
        ):
            torn.sendall(b"GET /li")
            large.sendall(b"GET /live HTTP/1.1\r\nX: " + b"x" * 20_000)
            assert large.recv(100).startswith(b"HTTP/1.1 431 ")
            assert get(port, "/live")[0] == 200
            torn.sendall(b"ve HTTP/1.1\r\n\r\n")
            assert torn.recv(100).startswith(b"HTTP/1.1 200 ")
        assert get(port, "/live")[0] == 200


def test_a_cut_connection_is_seen_as_a_reconnect_and_a_redelivery(rabbit: Broker, tmp_path: Path) -> None:
    queue, port = rabbit.queue("cut"), free_port()
    ports = ("--metrics-port", str(port), "--health-port", str(port))
    with (
        AmqTask("client", broker=rabbit.url, backend="rpc://", **PATIENT) as app,
        Forwarder(rabbit.url) as link,
        WorkerProcess(HELD, "-Q", queue, "-c", "1", *ports, environment={"AMQTASK_BROKER_URL": link.url}),
    ):
        result = app.send_task("held.hold", (str(tmp_path), "a"), queue=queue)
        eventually((tmp_path / "runs").exists, what="the task runs")
        assert (Scraped(port)("amqtask_reconnects_total"), Scraped(port)("amqtask_redeliveries_total")) == (0, 0)

        link.cut()
        eventually(lambda: Scraped(port)("amqtask_redeliveries_total", queue=queue) == 1, what="the redelivery")
        assert Scraped(port)("amqtask_reconnects_total") == 1
        assert get(port, "/ready")[0] == 200

        (tmp_path / "release-a").touch()
        assert result.get(timeout=90) == "a"
        eventually(lambda: Scraped(port)("amqtask_tasks_total", state="SUCCESS") == 1, what="it ended, once")


PRINTED = """\
/live: live
/ready: ready: consuming monitoring-example
results: ['order 7 is on its way', 'no order 13']
amqtask_tasks_total{queue="monitoring-example",state="FAILURE",task="shop.ship"} 1.0
amqtask_tasks_total{queue="monitoring-example",state="SUCCESS",task="shop.ship"} 1.0
amqtask_task_queue_wait_seconds_count{queue="monitoring-example",task="shop.ship"} 2.0
amqtask_pool_slots{state="busy"} 0.0
amqtask_pool_slots{state="idle"} 2.0
INFO shop.ship order 7 leaves
WARNING shop.ship packed order 7
"""


def test_the_example_prints_what_the_page_promises(rabbit: Broker) -> None:
    try:
        command = [sys.executable, "-m", "examples.monitoring"]
        code, printed, said = run_session(command, AMQTASK_BROKER_URL=rabbit.url, MONITORING_PORT=str(free_port()))
        assert (printed, code) == (PRINTED, 0), said
    finally:
        for name in ("monitoring-example", "monitoring-example.dead"):
            rabbit.channel().queue_delete(name)
