"""What was revoked stays so: for workers that start later, ours and Celery's, and over the death of a worker."""

from __future__ import annotations

import json
import re
import signal
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from amqtask import AmqTask, chain, chord
from amqtask.exceptions import TaskRevokedError
from integration import celery_peer
from integration.celery_peer import CeleryWorker
from integration.conftest import Broker
from integration.nodes import RabbitNode
from integration.waiting import PATIENT
from integration.workers import NeverHappened, WorkerProcess, eventually

OURS = "integration.apps.sample"
# How often a worker is started whose neighbour did not answer in time: the machine may have stood still.
STARTS = 5


@pytest.fixture
def app(rabbit: Broker, redis_url: str) -> Iterator[AmqTask]:
    """A client."""
    with AmqTask("client", broker=rabbit.url, backend=redis_url, **PATIENT) as made:
        yield made


def our_worker(queue: str, redis_url: str, *options: str, node: str = "", loglevel: str = "INFO") -> WorkerProcess:
    """Our worker on one queue, with a name of its own."""
    name = node or f"w{uuid.uuid4().hex[:8]}@here"
    environment = {"SAMPLE_BACKEND": redis_url, "SAMPLE_QUEUE": queue}
    return WorkerProcess(OURS, "-Q", queue, "-c", "1", "-n", name, *options, environment=environment, loglevel=loglevel)


def classic(rabbit: Broker) -> str:
    """A queue that Celery and we declare alike."""
    name = rabbit.queue("celery")
    rabbit.channel().queue_declare(name, durable=True)
    return name


def assert_revoked(app: AmqTask, task_id: str, queue: str) -> None:
    """The task is not run, and the next one is."""
    revoked = app.send_task("sample.add", (1, 1), queue=queue, task_id=task_id)
    other = app.send_task("sample.add", (2, 3), queue=queue)
    with pytest.raises(TaskRevokedError):
        revoked.get(timeout=90)
    assert other.get(timeout=90) == 5


def revoke_somewhere(app: AmqTask, node: str) -> str:
    """Revoke a task; one worker, and no other, knows of it."""
    task_id = str(uuid.uuid4())
    replies = app.control.revoke(task_id, destination=[node], reply=True, timeout=90)
    assert len(replies) == 1
    return task_id


@contextmanager
def our_worker_that_heard(node: str, queue: str, redis_url: str) -> Iterator[WorkerProcess]:
    """Our worker, started until the other one has answered it in time: it listens for five seconds."""
    for _ in range(STARTS):
        with our_worker(queue, redis_url, loglevel="DEBUG") as worker:
            eventually(lambda worker=worker: re.search(r"mingle: (sync with|no answer)", worker.log))  # type: ignore[misc]
            assert "mingle: all alone" not in worker.log
            if f"mingle: sync with {node}" in worker.log:
                yield worker
                return
    raise AssertionError(f"{node} never answered")


@contextmanager
def celery_worker_that_heard(node: str, environment: dict[str, str], queue: str) -> Iterator[CeleryWorker]:
    """Celery's worker, started until the other one has answered it in time: it listens for one second."""
    for _ in range(STARTS):
        with CeleryWorker(environment, queue) as worker:
            if "mingle: sync with" in worker.log:
                yield worker
                return
    raise AssertionError(f"{node} never answered")


def test_a_worker_that_starts_later_learns_it_from_another(rabbit: Broker, redis_url: str, app: AmqTask) -> None:
    first, second, node = rabbit.queue("first"), rabbit.queue("second"), f"w{uuid.uuid4().hex[:8]}@here"
    with our_worker(first, redis_url, node=node):
        task_id = revoke_somewhere(app, node)
        with our_worker_that_heard(node, second, redis_url):
            assert_revoked(app, task_id, second)


def test_our_worker_learns_it_from_celery_s(rabbit: Broker, redis_url: str, app: AmqTask) -> None:
    first, second, node = classic(rabbit), classic(rabbit), f"w{uuid.uuid4().hex[:8]}@here"
    with CeleryWorker(celery_peer.environment(rabbit.url, redis_url, first), first, "-n", node):
        task_id = revoke_somewhere(app, node)
        with our_worker_that_heard(node, second, redis_url):
            assert_revoked(app, task_id, second)


def test_celery_s_worker_learns_it_from_ours(rabbit: Broker, redis_url: str, app: AmqTask) -> None:
    first, second, node = classic(rabbit), classic(rabbit), f"w{uuid.uuid4().hex[:8]}@here"
    with our_worker(first, redis_url, node=node):
        task_id = revoke_somewhere(app, node)
        with celery_worker_that_heard(node, celery_peer.environment(rabbit.url, redis_url, second), second):
            assert_revoked(app, task_id, second)


def test_it_holds_for_a_worker_that_starts_later_whoever_said_it(rabbit: Broker, redis_url: str, app: AmqTask) -> None:
    queue, ours, theirs = rabbit.queue("work"), str(uuid.uuid4()), str(uuid.uuid4())
    app.control.revoke(ours)
    with our_worker(queue, redis_url, "--without-mingle") as worker:
        assert_revoked(app, ours, queue)
        celery_peer.call(f"app.control.revoke({theirs!r})", celery_peer.environment(rabbit.url, redis_url, queue))
        eventually(lambda: any(theirs in ids for ids in (app.control.inspect().revoked() or {}).values()))
        worker.stop()
    with our_worker(queue, redis_url, "--without-mingle"):
        assert_revoked(app, theirs, queue)


def test_a_workflow_is_cancelled_and_what_runs_is_asked_to_end(
    rabbit: Broker, redis_url: str, app: AmqTask, tmp_path: Path
) -> None:
    queue = rabbit.queue("work")
    add = app.signature("sample.add", queue=queue)
    with our_worker(queue, redis_url):
        running = app.send_task("sample.wait_until_cancelled", (str(tmp_path / "began"),), queue=queue)
        header = [add.clone((number, number)) for number in range(5)]
        body = chain(add.clone((1, 1)), chord(header, app.signature("sample.pid", immutable=True, queue=queue)))
        waiting = body.apply_async()
        eventually((tmp_path / "began").exists)

        waiting.cancel()
        running.cancel(terminate=False)

        assert running.get(timeout=90) == "cancelled"
        with pytest.raises(TaskRevokedError, match="cancelled"):
            waiting.get(timeout=90)
        eventually(lambda: waiting.state == "REVOKED")
        assert app.send_task("sample.add", (2, 3), queue=queue).get(timeout=90) == 5


def test_a_worker_that_is_alone_finds_that_out(hurt_node: RabbitNode) -> None:
    environment = {"AMQTASK_BROKER_URL": hurt_node.url, "SAMPLE_QUEUE": f"alone-{uuid.uuid4().hex[:8]}"}

    def is_told() -> bool:
        with WorkerProcess(OURS, "-P", "solo", environment=environment, loglevel="DEBUG") as worker:
            eventually(lambda: re.search(r"mingle: (all alone|no answer)", worker.log))
            return "mingle: all alone" in worker.log

    assert any(is_told() for _ in range(STARTS))


def test_workers_ask_each_other_again_after_a_lost_connection(hurt_node: RabbitNode) -> None:
    environment = {"AMQTASK_BROKER_URL": hurt_node.url, "SAMPLE_QUEUE": f"again-{uuid.uuid4().hex[:8]}"}
    names = [f"w{uuid.uuid4().hex[:8]}@here" for _ in range(2)]
    first, second = (WorkerProcess(OURS, "-P", "solo", "-n", name, environment=environment) for name in names)
    with first, second:
        second.await_log(f"mingle: sync with {names[0]}")
        assert "mingle: all alone" not in second.log

        def has_asked_again() -> bool:
            hurt_node.ctl("close_all_connections", "test")
            # Whoever comes back last finds the other one, and listens to it for five seconds.
            with suppress(NeverHappened):
                eventually(lambda: (first.log + second.log).count("mingle: sync with") >= 2, 15)
            return (first.log + second.log).count("mingle: sync with") >= 2

        eventually(has_asked_again)


def test_it_survives_the_death_of_the_only_worker(rabbit: Broker, redis_url: str, app: AmqTask, tmp_path: Path) -> None:
    queue, node = rabbit.queue("work"), f"w{uuid.uuid4().hex[:8]}@here"
    state = tmp_path / f"{node.partition('@')[0]}.state"
    with our_worker(queue, redis_url, "--statedb", str(tmp_path / "%n.state"), node=node) as worker:
        task_id = str(uuid.uuid4())
        app.control.revoke(task_id, destination=[node], reply=True, timeout=90)
        app.control.revoke_by_stamped_headers({"customer": ["x"]}, destination=[node], reply=True, timeout=90)
        eventually(lambda: state.exists() and task_id in state.read_text() and "customer" in state.read_text())
        worker.signal(signal.SIGKILL)
        worker.wait()
        worker.start()

        call = app.signature("sample.add", (1, 1))
        call.stamp(customer="x")
        stamped = call.apply_async(queue=queue)

        assert_revoked(app, task_id, queue)
        with pytest.raises(TaskRevokedError):
            stamped.get(timeout=90)
        stamped.revoke_by_stamped_headers({"customer": ["y"]}, wait=True, timeout=0.5)
        eventually(lambda: '"y"' in state.read_text(), what="the worker never wrote down what else is revoked")
        call.stamp(customer="y")
        with pytest.raises(TaskRevokedError):
            call.apply_async(queue=queue).get(timeout=90)
        worker.stop()
    assert task_id in json.loads(state.read_text())["revoked"]
