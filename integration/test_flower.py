"""Flower from PyPI, started by `amqtask flower`, shows our workers and tasks, and its buttons work."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from amqtask import AmqTask
from amqtask.exceptions import TaskRevokedError
from integration.conftest import Broker
from integration.flower_peer import Flower
from integration.workers import WorkerProcess, eventually

APP = "integration.apps.sample"


class Load:
    """Somebody who calls tasks all the time."""

    def __init__(self, app: AmqTask) -> None:
        self.ids: list[str] = []
        self._app = app
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        number = 0
        while not self._stop.wait(0.02):
            number += 1
            self.ids.append(self._app.send_task("sample.add", (number, 1), ignore_result=True).id)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(90)


class Scene:
    """Two of our workers under load, and Flower."""

    def __init__(self, app: AmqTask, flower: Flower, load: Load, names: list[str]) -> None:
        self.app = app
        self.flower = flower
        self.load = load
        self.names = names

    def await_tasks(self, query: str, **fields: Any) -> dict[str, Any]:
        """The first of /api/tasks with these fields."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            tasks = self.flower.get(f"/api/tasks?{query}").values()
            found[:] = [task for task in tasks if all(task.get(name) == value for name, value in fields.items())]
            return bool(found)

        eventually(look, every=0.2, what=f"Flower shows no task {query} {fields}")
        return found[0]

    def pool_size(self, name: str) -> int:
        stats = self.flower.get(f"/api/workers?refresh=1&workername={name}")[name]["stats"]
        return int(stats["pool"]["max-concurrency"])


@pytest.fixture(scope="module")
def scene(broker_url: str) -> Iterator[Scene]:
    rabbit = Broker(broker_url)
    queue = rabbit.queue("flower")
    tag = uuid.uuid4().hex[:6]
    names = [f"one-{tag}@test", f"two-{tag}@test"]
    app = AmqTask("producer", broker=broker_url, backend="rpc://", task_default_queue=queue, set_as_current=False)

    def worker(name: str) -> WorkerProcess:
        return WorkerProcess(APP, "-Q", queue, "-c", "2", "-n", name, "-E", loglevel="WARNING")

    environment = {"AMQTASK_BROKER_URL": broker_url, "SAMPLE_QUEUE": queue}
    try:
        with worker(names[0]), worker(names[1]), Flower(APP, environment=environment) as flower, Load(app) as load:
            yield Scene(app, flower, load, names)
    finally:
        app.close()
        rabbit.close()


def test_both_workers_are_there_with_all_that_is_known_of_them(scene: Scene) -> None:
    workers: dict[str, Any] = {}

    def look() -> bool:
        workers.update(scene.flower.get("/api/workers?refresh=1"))
        return set(scene.names) <= set(workers)

    eventually(look, every=0.5, what="Flower does not show both workers")
    for name in scene.names:
        worker = scene.flower.get(f"/api/workers?refresh=1&workername={name}")[name]
        assert worker["stats"]["pool"]["max-concurrency"] >= 2
        assert "sample.add" in worker["registered"]
        assert [queue["name"] for queue in worker["active_queues"]]
        assert worker["conf"]["task_default_queue"]
    status = scene.flower.get("/api/workers?status=1")
    assert [status[name] for name in scene.names] == [True, True]


def test_tasks_of_both_workers_are_shown_with_their_results(scene: Scene) -> None:
    for name in scene.names:
        task = scene.await_tasks(f"workername={name}&limit=5", state="SUCCESS", name="sample.add")
        assert task["result"].isdigit()
    bad = scene.app.send_task("sample.fail", ("as told",))

    scene.await_tasks("state=FAILURE&limit=10", uuid=bad.id)
    info = scene.flower.get(f"/api/task/info/{bad.id}")

    assert (info["name"], info["state"], info["exception"]) == ("sample.fail", "FAILURE", "ValueError('as told')")
    assert "Traceback" in info["traceback"]
    assert info["worker"] in scene.names
    assert info["received"] <= info["started"] <= info["failed"]


def test_a_pool_grows_and_shrinks(scene: Scene) -> None:
    name = scene.names[0]
    before = scene.pool_size(name)

    scene.flower.post(f"/api/worker/pool/grow/{name}", n="2")
    assert scene.pool_size(name) == before + 2
    scene.flower.post(f"/api/worker/pool/shrink/{name}", n="2")
    assert scene.pool_size(name) == before


def test_a_waiting_task_is_revoked(scene: Scene) -> None:
    late = scene.app.send_task("sample.add", (0, 0), countdown=3)

    scene.flower.post(f"/api/task/revoke/{late.id}")

    with pytest.raises(TaskRevokedError):
        late.get(timeout=90)
    scene.await_tasks("state=REVOKED&limit=10", uuid=late.id)


def test_a_running_task_is_terminated(scene: Scene, tmp_path: Path) -> None:
    started, release = tmp_path / "started", tmp_path / "release"
    running = scene.app.send_task("sample.wait_for", (str(started), str(release)))
    eventually(started.exists)
    assert scene.await_tasks("state=STARTED&limit=10", uuid=running.id)["name"] == "sample.wait_for"

    scene.flower.post(f"/api/task/revoke/{running.id}", terminate="true")

    with pytest.raises(TaskRevokedError):
        running.get(timeout=90)
    scene.await_tasks("state=REVOKED&limit=10", uuid=running.id)


def test_limits_and_queues_are_changed(scene: Scene, broker_url: str) -> None:
    name = scene.names[1]
    more = f"flower-more-{uuid.uuid4().hex[:6]}"

    scene.flower.post("/api/task/rate-limit/sample.limited", workername=name, ratelimit="7/s")
    scene.flower.post("/api/task/timeout/sample.limited", workername=name, soft="30", hard="60")
    scene.flower.post(f"/api/worker/queue/add-consumer/{name}", queue=more)
    queues = scene.flower.get(f"/api/workers?refresh=1&workername={name}")[name]["active_queues"]
    assert more in [queue["name"] for queue in queues]
    scene.flower.post(f"/api/worker/queue/cancel-consumer/{name}", queue=more)

    queues = scene.flower.get(f"/api/workers?refresh=1&workername={name}")[name]["active_queues"]
    assert more not in [queue["name"] for queue in queues]
    rabbit = Broker(broker_url)
    rabbit._made.append(more)
    rabbit.close()


def test_a_task_is_called_from_flower(scene: Scene) -> None:
    sent = scene.flower.post_json("/api/task/send-task/sample.add", {"args": [20, 22]})

    scene.await_tasks("limit=100", uuid=sent["task-id"], state="SUCCESS", result="42")


def test_a_worker_is_shut_down(scene: Scene) -> None:
    name = scene.names[1]

    scene.flower.post(f"/api/worker/shutdown/{name}")

    eventually(
        lambda: not scene.flower.get("/api/workers?status=1").get(name, False), every=0.5, what="it is still online"
    )
