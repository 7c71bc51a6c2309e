"""A real Celery 5.7 and we on the same result stores: each reads what the other one wrote, field by field."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest

from amqtask import AmqTask, states
from amqtask.backends.contract import BackendOptions, ResultBackend
from amqtask.backends.registry import open_backend
from amqtask.exceptions import TimeoutError
from amqtask.protocol.result import ResultMessage, exception_as_dict, now_iso
from amqtask.result import AsyncResult, GroupResult
from integration import celery_peer
from integration.celery_peer import CeleryWorker
from integration.conftest import Broker
from integration.waiting import PATIENT
from integration.workers import WorkerProcess

EXTENDED = {"name": "shop.pay", "args": [1, "two"], "kwargs": {"by": "card"}, "worker": "w@host", "retries": 2,
            "queue": "shop"}  # fmt: skip
READ = """
import json
from celery.result import GroupResult
done, failed, started = [app.AsyncResult(each) for each in {ids!r}]
group = GroupResult.restore({group!r}, app=app)
print(json.dumps([
    done.state, done.result, done.name, list(done.args), done.kwargs, done.worker, done.retries, done.queue,
    done.date_done.isoformat()[:10], failed.state, repr(failed.result), failed.traceback, started.state,
    started.info, [each.id for each in getattr(group, "results", group)],  # a list, from MongoDB
]))
"""
WRITE = """
from celery.app.task import Context
from celery.result import GroupResult
request = Context(
    task="shop.pay", args=[1, "two"], kwargs=dict(by="card"), hostname="w@host", retries=2,
    delivery_info=dict(routing_key="shop"), id={ids[0]!r},
)
app.backend.store_result({ids[0]!r}, dict(sum=3), "SUCCESS", request=request)
app.backend.store_result({ids[1]!r}, ValueError("as told"), "FAILURE", traceback="Traceback: told")
app.backend.store_result({ids[2]!r}, dict(pid=1), "STARTED")
GroupResult({group!r}, [app.AsyncResult(each) for each in {ids!r}]).save()
app.backend.store_result({ids[0]!r}, "a second run", "SUCCESS")
"""


@pytest.fixture(params=["postgres", "sqlite", "mongodb", "memcached", "files"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of each store, as both systems take it."""
    match request.param:
        case "postgres":
            return str(request.getfixturevalue("postgres")).replace("postgresql:", "db+postgresql+psycopg:")
        case "sqlite":
            return f"db+sqlite:///{tmp_path}/results.db"
        case "mongodb":
            return str(request.getfixturevalue("mongodb_url"))
        case "memcached":
            return f"cache+memcached://{request.getfixturevalue('memcached_address')}/"
        case _:
            return f"file://{tmp_path}"


def ours(url: str) -> ResultBackend:
    made = open_backend(url, BackendOptions(url=url))
    assert made is not None
    return made


def celery(url: str, code: str) -> str:
    environment = celery_peer.environment("memory://", url, "unused")
    return celery_peer.call(f"app.conf.result_extended = True\n{code}", environment)


def test_celery_reads_what_we_wrote(url: str) -> None:
    backend, group = ours(url), str(uuid.uuid4())
    done, failed, started = ids = [str(uuid.uuid4()) for _ in range(3)]
    error, done_at = exception_as_dict(ValueError("as told")), now_iso()

    backend.store(ResultMessage(done, states.SUCCESS, {"sum": 3}, date_done=done_at, extra=dict(EXTENDED)))
    backend.store(ResultMessage(failed, states.FAILURE, error, "Traceback: told", date_done=now_iso()))
    backend.store(ResultMessage(started, states.STARTED, {"pid": 1}))
    GroupResult(group, [AsyncResult[Any](each, backend) for each in ids], backend).save()
    backend.close()

    assert json.loads(celery(url, READ.format(ids=ids, group=group))) == [
        "SUCCESS", {"sum": 3}, *EXTENDED.values(), done_at[:10],
        "FAILURE", "ValueError('as told')", "Traceback: told", "STARTED", {"pid": 1}, ids,
    ]  # fmt: skip


def test_we_read_what_celery_wrote(url: str) -> None:
    group, ids = str(uuid.uuid4()), [str(uuid.uuid4()) for _ in range(3)]

    celery(url, WRITE.format(ids=ids, group=group))

    backend = ours(url)
    done, failed, started = [AsyncResult[Any](each, backend) for each in ids]
    assert done.get(timeout=0) == {"sum": 3}
    assert {name: getattr(done, name) for name in EXTENDED} == EXTENDED
    assert done.date_done is not None
    with pytest.raises(ValueError, match="as told"):
        failed.get(timeout=0)
    assert failed.traceback == "Traceback: told"
    assert (started.state, started.info) == (states.STARTED, {"pid": 1})
    with pytest.raises(TimeoutError):
        started.get(timeout=0)
    restored = GroupResult.restore(group, backend=backend)
    assert restored is not None
    assert [each.id for each in restored.results] == ids
    backend.store(ResultMessage(ids[0], states.FAILURE, exception_as_dict(KeyError("a third run"))))
    assert done.state == states.SUCCESS
    backend.close()


def test_workers_of_both_systems_leave_results_in_one_database(rabbit: Broker, postgres: str) -> None:
    backend = postgres.replace("postgresql:", "db+postgresql+psycopg:")
    queue = rabbit.queue("celery")
    channel = rabbit.channel()
    channel.queue_declare(queue, durable=True)
    channel.close()
    environment = celery_peer.environment(rabbit.url, backend, queue)
    app = AmqTask("client", broker=rabbit.url, backend=backend, **PATIENT)
    app.conf.task_default_queue = queue

    with CeleryWorker(environment, queue):
        by_celery = app.send_task("sample.add", (2, 3))
        assert by_celery.get(timeout=90) == 5
        failed = app.send_task("sample.fail", ("as told",))
        with pytest.raises(ValueError, match="as told"):
            failed.get(timeout=90)
    our_environment = {"SAMPLE_BACKEND": backend, "SAMPLE_QUEUE": queue}
    with WorkerProcess("integration.apps.sample", "-Q", queue, "-c", "2", environment=our_environment) as worker:
        told = celery_peer.call(
            f"print(add.delay(4, 5).get(timeout=90), app.AsyncResult({by_celery.id!r}).get(timeout=90))", environment
        )
        worker.stop()
    app.close()

    assert told == "9 5"
