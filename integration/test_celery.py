"""A real Celery 5.7 and we, on the same queues: its producer with our worker, our producer with its worker."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from amqtask import AmqTask, chain
from integration import celery_peer
from integration.celery_peer import CeleryWorker
from integration.conftest import Broker
from integration.waiting import PATIENT
from integration.workers import WorkerProcess

OURS = "integration.apps.sample"


@pytest.fixture(params=["rpc", "redis"])
def backend(request: pytest.FixtureRequest, redis_url: str) -> str:
    """Both result stores that we share with Celery."""
    return "rpc://" if request.param == "rpc" else redis_url


@pytest.fixture
def classic(rabbit: Broker) -> str:
    """A queue as Celery declares it: classic, bound to an exchange of its own name."""
    name = rabbit.queue("celery")
    channel = rabbit.channel()
    channel.queue_declare(name, durable=True)
    channel.close()
    return name


def our_worker(queue: str, backend: str) -> WorkerProcess:
    """Our worker with the same result store."""
    return WorkerProcess(OURS, "-Q", queue, "-c", "2", environment={"SAMPLE_BACKEND": backend, "SAMPLE_QUEUE": queue})


def test_our_worker_runs_a_celery_producers_task_and_it_reads_the_result(
    rabbit: Broker, backend: str, classic: str
) -> None:
    environment = celery_peer.environment(rabbit.url, backend, classic)

    with our_worker(classic, backend) as worker:
        told = celery_peer.call("print(add.delay(2, 3).get(timeout=90))", environment)
        failed = celery_peer.call(
            "try:\n    fail.delay('as told').get(timeout=90)\nexcept ValueError as e: print(type(e).__name__, e)",
            environment,
        )
        worker.stop()

    assert told == "5"
    assert failed == "ValueError as told"


def test_our_worker_runs_celerys_chains_callbacks_and_retries(
    rabbit: Broker, redis_url: str, classic: str, tmp_path: Path
) -> None:
    environment = celery_peer.environment(rabbit.url, redis_url, classic)

    with our_worker(classic, redis_url) as worker:
        chained = celery_peer.call("print((add.s(1, 2) | add.s(3) | add.s(4)).delay().get(timeout=90))", environment)
        linked = celery_peer.call(
            "r = add.apply_async((1, 1), link=add.s(40)); r.get(timeout=90); print(r.children[0].get(timeout=90))",
            environment,
        )
        grouped = celery_peer.call(
            "from celery import group; print(group(add.s(n, n) for n in range(5))().get(timeout=90))",
            environment,
        )
        retried = celery_peer.call(f"print(retry.delay({str(tmp_path) + '/runs'!r}, 1).get(timeout=90))", environment)
        worker.stop()

    assert chained == "10"
    assert linked == "42"
    assert json.loads(grouped) == [0, 2, 4, 6, 8]
    assert retried == "1"


def test_a_celery_producers_countdown_waits_in_the_broker(rabbit: Broker, redis_url: str, classic: str) -> None:
    environment = celery_peer.environment(rabbit.url, redis_url, classic)

    with our_worker(classic, redis_url) as worker:
        took = celery_peer.call(
            "import time; t = time.time(); add.apply_async((1, 1), countdown=3).get(timeout=90); print(time.time()-t)",
            environment,
        )
        worker.stop()

    assert float(took) >= 3


def test_a_celery_worker_runs_our_task_and_we_read_the_result(rabbit: Broker, backend: str, classic: str) -> None:
    environment = celery_peer.environment(rabbit.url, backend, classic)
    app = AmqTask("client", broker=rabbit.url, backend=backend, **PATIENT)
    app.conf.task_default_queue = classic

    with CeleryWorker(environment, classic):
        total = app.send_task("sample.add", (2, 3))
        failed = app.send_task("sample.fail", ("as told",))
        assert total.get(timeout=90) == 5
        with pytest.raises(ValueError, match="as told"):
            failed.get(timeout=90)
        chained = chain(app.signature("sample.add", (1, 2)), app.signature("sample.add", (3,))).apply_async()
        assert chained.get(timeout=90) == 6
    app.close()


def test_our_countdown_reaches_a_celery_worker_on_time(rabbit: Broker, redis_url: str, classic: str) -> None:
    environment = celery_peer.environment(rabbit.url, redis_url, classic)
    app = AmqTask("client", broker=rabbit.url, backend=redis_url, **PATIENT)
    app.conf.task_default_queue = classic

    with CeleryWorker(environment, classic):
        published = time.time()
        assert app.send_task("sample.add", (2, 3), countdown=2).get(timeout=90) == 5
        assert time.time() - published >= 2
    app.close()
