"""Flower from PyPI, started by `amqtask flower`, shows our workers and tasks, and its buttons work."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from amqtask import AmqTask
from amqtask.exceptions import TaskRevokedError
from integration.conftest import Broker
from integration.flower_peer import Flower
from integration.waiting import PATIENT
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

    def __init__(self, app: AmqTask, rabbit: Broker, flower: Flower, load: Load, names: list[str]) -> None:
        self.app = app
        self.rabbit = rabbit
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

    def await_task(self, task_id: str, state: str) -> dict[str, Any]:
        """All that Flower knows of this task, once it is in this state."""
        found: dict[str, Any] = {}

        def look() -> bool:
            found.update(self.flower.find(f"/api/task/info/{task_id}") or {})
            return found.get("state") == state

        eventually(look, every=0.2, what=lambda: f"Flower shows no {state} of {task_id}: {found}")
        return found

    def worker(self, name: str) -> dict[str, Any]:
        """What the worker says of itself, asked now (and again, when the machine stood still meanwhile)."""
        return self.flower.worker(name)

    def pool_size(self, name: str) -> int:
        return int(self.worker(name)["stats"]["pool"]["max-concurrency"])

    def press(self, path: str, has_effect: Callable[[], object] | None = None, **fields: str) -> int:
        """Press a button until it takes effect (or the worker says yes, for which Flower gives it a second); how often."""
        said: list[str] = []

        def once() -> object:
            try:
                said.append(str(self.flower.post(path, **fields)))
            except AssertionError as error:
                said.append(str(error))
                return has_effect is not None and has_effect()
            return has_effect is None or has_effect()

        eventually(once, every=1.0, what=lambda: f"{path} has no effect: {said[-1]}")
        return len(said)


@pytest.fixture(scope="module")
def scene(broker_url: str) -> Iterator[Scene]:
    rabbit = Broker(broker_url)
    queue = rabbit.queue("flower")
    tag = uuid.uuid4().hex[:6]
    names = [f"one-{tag}@test", f"two-{tag}@test"]
    app = AmqTask(
        "producer", broker=broker_url, backend="rpc://", **PATIENT, task_default_queue=queue, set_as_current=False
    )

    def worker(name: str) -> WorkerProcess:
        return WorkerProcess(APP, "-Q", queue, "-c", "2", "-n", name, "-E", loglevel="WARNING")

    environment = {"AMQTASK_BROKER_URL": broker_url, "SAMPLE_QUEUE": queue}
    try:
        with worker(names[0]), worker(names[1]), Flower(APP, environment=environment) as flower, Load(app) as load:
            yield Scene(app, rabbit, flower, load, names)
    finally:
        app.close()
        rabbit.close()


def test_both_workers_are_there_with_all_that_is_known_of_them(scene: Scene) -> None:
    def online() -> list[Any]:
        status = scene.flower.get("/api/workers?status=1")
        return [status.get(name) for name in scene.names]

    eventually(lambda: online() == [True, True], every=0.5, what="Flower does not show both workers")
    for name in scene.names:
        worker = scene.worker(name)
        assert worker["stats"]["pool"]["max-concurrency"] >= 2
        assert "sample.add" in worker["registered"]
        assert [queue["name"] for queue in worker["active_queues"]]
        assert worker["conf"]["task_default_queue"]
    eventually(lambda: online() == [True, True], every=0.5, what="they have not said for a while that they live")


def test_tasks_of_both_workers_are_shown_with_their_results(scene: Scene) -> None:
    for name in scene.names:
        task = scene.await_tasks(f"workername={name}&limit=5", state="SUCCESS", name="sample.add")
        assert task["result"].isdigit()
    bad = scene.app.send_task("sample.fail", ("as told",))

    info = scene.await_task(bad.id, "FAILURE")

    assert (info["name"], info["state"], info["exception"]) == ("sample.fail", "FAILURE", "ValueError('as told')")
    assert "Traceback" in info["traceback"]
    assert info["worker"] in scene.names
    assert info["received"] <= info["started"] <= info["failed"]


def test_a_pool_grows_and_shrinks(scene: Scene) -> None:
    name = scene.names[0]
    before = scene.pool_size(name)

    times = scene.press(f"/api/worker/pool/grow/{name}", lambda: scene.pool_size(name) > before, n="2")
    grown = scene.pool_size(name)
    assert grown - before in range(2, 2 * times + 1, 2)
    times = scene.press(f"/api/worker/pool/shrink/{name}", lambda: scene.pool_size(name) < grown, n="2")
    assert grown - scene.pool_size(name) in range(2, 2 * times + 1, 2)


def test_a_waiting_task_is_revoked(scene: Scene) -> None:
    name, queue = scene.names[0], scene.rabbit.queue("flower-waits")
    late = scene.app.send_task("sample.add", (0, 0), queue=queue)

    scene.press(f"/api/task/revoke/{late.id}", lambda: late.id in scene.worker(name)["revoked"])
    consume = scene.app.control.add_consumer
    assert consume(queue, destination=[name], reply=True, timeout=90) == [{name: {"ok": f"add consumer {queue}"}}]

    with pytest.raises(TaskRevokedError):
        late.get(timeout=90)
    scene.await_task(late.id, "REVOKED")
    scene.app.control.cancel_consumer(queue, destination=[name], reply=True, timeout=90)


def test_a_running_task_is_terminated(scene: Scene, tmp_path: Path) -> None:
    started, release = tmp_path / "started", tmp_path / "release"
    running = scene.app.send_task("sample.wait_for", (str(started), str(release)))
    eventually(started.exists)
    assert scene.await_task(running.id, "STARTED")["name"] == "sample.wait_for"

    scene.press(f"/api/task/revoke/{running.id}", running.ready, terminate="true")

    with pytest.raises(TaskRevokedError):
        running.get(timeout=90)
    scene.await_task(running.id, "REVOKED")


def test_limits_and_queues_are_changed(scene: Scene) -> None:
    name, more = scene.names[1], scene.rabbit.queue("flower-more")

    def queues() -> list[str]:
        return [queue["name"] for queue in scene.worker(name)["active_queues"]]

    scene.press("/api/task/rate-limit/sample.limited", workername=name, ratelimit="7/s")
    scene.press("/api/task/timeout/sample.limited", workername=name, soft="30", hard="60")
    scene.press(f"/api/worker/queue/add-consumer/{name}", lambda: more in queues(), queue=more)
    scene.press(f"/api/worker/queue/cancel-consumer/{name}", lambda: more not in queues(), queue=more)


def test_a_task_is_called_from_flower(scene: Scene) -> None:
    sent = scene.flower.post_json("/api/task/send-task/sample.add", {"args": [20, 22]})

    assert scene.await_task(sent["task-id"], "SUCCESS")["result"] == "42"


def test_a_worker_is_shut_down(scene: Scene) -> None:
    name = scene.names[1]

    scene.press(f"/api/worker/shutdown/{name}", lambda: not scene.flower.get("/api/workers?status=1").get(name, False))
