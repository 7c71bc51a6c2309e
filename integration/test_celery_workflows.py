"""Compositions across systems on both brokers: Celery's and ours, published by either, run by either and by both together."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from amqtask import AmqTask
from amqtask.testing.suites.compositions import COMPOSITIONS, ERRORS, Tasks, define
from integration import celery_peer
from integration.celery_peer import CeleryWorker
from integration.conftest import Broker
from integration.waiting import PATIENT
from integration.workers import WorkerProcess

OURS, THEIRS = "integration.apps.flows", "integration.apps.celery_flows"


@pytest.fixture(params=["rabbitmq", "redis"])
def broker(request: pytest.FixtureRequest, broker_url: str, redis_url: str) -> str:
    """Both brokers that we share with Celery."""
    return broker_url if request.param == "rabbitmq" else redis_url


@pytest.fixture
def queue(rabbit: Broker, broker: str) -> str:
    """A queue as Celery declares it; on Redis it is a name."""
    name = rabbit.queue("celery-flows")
    if broker == rabbit.url:
        channel = rabbit.channel()
        channel.queue_declare(name, durable=True)
        channel.close()
    return name


@pytest.fixture(params=["ours", "theirs", "both"])
def workers(request: pytest.FixtureRequest, broker: str, redis_url: str, queue: str) -> Iterator[str]:
    """Who runs the tasks."""
    with ExitStack() as running:
        if request.param in ("ours", "both"):
            environment = {"FLOWS_BACKEND": redis_url, "FLOWS_QUEUE": queue, "AMQTASK_BROKER_URL": broker}
            running.enter_context(WorkerProcess(OURS, "-Q", queue, "-c", "2", environment=environment))
        if request.param in ("theirs", "both"):
            running.enter_context(_celery_worker(broker, redis_url, queue))
        yield request.param


def _celery_worker(broker: str, redis_url: str, queue: str) -> CeleryWorker:
    environment = celery_peer.environment(broker, redis_url, queue)
    return CeleryWorker(environment, queue, "-n", "peer@%h", app=THEIRS)


def test_what_celery_publishes_gives_its_values(broker: str, redis_url: str, queue: str, workers: str) -> None:
    # Celery 5.7 turns the members of a group inside a chord's header round.
    names = [name for name in (*COMPOSITIONS, *ERRORS) if name != "groups in a chord"]
    environment = celery_peer.environment(broker, redis_url, queue)

    printed = celery_peer.call(f"run_all({names!r})", environment, THEIRS, timeout=300)

    found: dict[str, Any] = dict(json.loads(line) for line in printed.splitlines())
    print({name: value for name, value in found.items() if not _is_right(name, value)})
    assert [name for name in names if not _is_right(name, found[name])] == []


def _is_right(name: str, found: dict[str, Any]) -> bool:
    if name in COMPOSITIONS:
        return "value" in found and found["value"] == COMPOSITIONS[name][1]
    return "as told" in found.get("text", "")


def test_what_we_publish_gives_its_values(broker: str, redis_url: str, queue: str, workers: str) -> None:
    app = define(AmqTask("client", broker=broker, backend=redis_url, **PATIENT))
    app.conf.task_default_queue = queue
    tasks = Tasks(app)
    wrong: dict[str, Any] = {}
    for name, (build, value) in COMPOSITIONS.items():
        try:
            found = build(tasks).apply_async().get(timeout=60)
        except Exception as error:
            found = repr(error)
        if found != value:
            wrong[name] = found
    for name, (build, _) in ERRORS.items():
        if name == "chord in a chord" and workers != "ours":
            continue  # a Celery worker does not tell the outer chord that the inner one has failed
        try:
            wrong[name] = build(tasks).apply_async().get(timeout=60)
        except Exception as error:
            if "as told" not in str(error):
                wrong[name] = repr(error)
    app.close()
    assert wrong == {}
