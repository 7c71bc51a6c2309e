"""Every composition on a real RabbitMQ, with stores that join chords and with one that does not; and chords under fire."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from amqtask import AmqTask, chord, group
from amqtask.protocol.chord import queue_name
from amqtask.testing.suites.compositions import COMPOSITIONS, ERRORS, Tasks, define
from integration.chords import under_fire
from integration.conftest import Broker
from integration.waiting import PATIENT
from integration.workers import WorkerProcess, eventually

APP = "integration.apps.flows"


def backend_url(store: str, request: pytest.FixtureRequest) -> str:
    """The URL of a result store; its server starts if it has one."""
    match store:
        case "rpc":
            return "rpc://"
        case "redis":
            return str(request.getfixturevalue("redis_url"))
        case "cluster":
            return str(request.getfixturevalue("redis_cluster_url")).replace("redis:", "redis+cluster:")
        case _:
            return f"db+{request.getfixturevalue('postgres_server').create_database()}"


@pytest.fixture(
    scope="module",
    params=["rpc-prefork", "rpc-gevent", "redis-prefork", "redis-gevent", "cluster-threads", "postgres-prefork"],
)
def worked(request: pytest.FixtureRequest, broker_url: str) -> Iterator[Tasks]:
    """Tasks that a worker process runs, with one store and one pool."""
    store, pool = request.param.split("-")
    queue = f"flows-{request.param}-{uuid.uuid4().hex[:8]}"
    environment = {"FLOWS_BACKEND": backend_url(store, request), "FLOWS_QUEUE": queue}
    app = define(AmqTask("client", broker=broker_url, backend=environment["FLOWS_BACKEND"], **PATIENT))
    app.conf.update(task_default_queue=queue, broker_publish_timeout=60.0)
    with WorkerProcess(APP, "-Q", queue, "-P", pool, "-c", "4", environment=environment):
        yield Tasks(app)
    app.close()


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_a_composition_gives_its_value(worked: Tasks, name: str) -> None:
    build, value = COMPOSITIONS[name]

    assert build(worked).apply_async().get(timeout=90) == value


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_the_result(worked: Tasks, name: str) -> None:
    build, kind = ERRORS[name]

    with pytest.raises(kind, match="as told"):
        build(worked).apply_async().get(timeout=90)


def test_a_chord_leaves_nothing_in_the_broker(worked: Tasks, rabbit: Broker) -> None:
    result = chord([worked.same.s(n) for n in range(30)], worked.total.s()).apply_async()
    failed = chord([worked.fail.s(), worked.same.s(1)], worked.total.s()).apply_async()

    assert result.get(timeout=90) == sum(range(30))
    with pytest.raises(ValueError, match="as told"):
        failed.get(timeout=90)
    for header in (result.parent, failed.parent):
        eventually(lambda header=header: not rabbit.exists(queue_name(header.id)))  # type: ignore[misc]


def test_a_group_of_many_is_collected(worked: Tasks) -> None:
    result = group(worked.add.s(n, n) for n in range(2000)).apply_async()

    assert result.get(timeout=90) == [2 * n for n in range(2000)]
    assert result.completed_count() == 2000


@pytest.mark.parametrize("store", ["rpc", "redis"])
def test_every_body_runs_though_workers_are_killed(broker_url: str, redis_url: str, store: str) -> None:
    # A slow machine may kill a worker many times before it has run what it took.
    found = under_fire(
        broker_url,
        "rpc://" if store == "rpc" else redis_url,
        chords=20,
        size=50,
        pause=(0.3, 1.0),
        delivery_limit=1000,
    )

    assert (found.ran, found.missing, found.wrong) == (20, 0, 0)
    assert found.kills
