"""Every line that a task logs or prints says which task it was, in every pool."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from amqtask import AmqTask
from integration.conftest import Broker
from integration.waiting import PATIENT
from integration.workers import WorkerProcess

LOGGED = "integration.apps.logged"
POOLS = ["solo", "threads", "prefork", "eventlet", "gevent", "asyncio"]


@pytest.fixture
def app(rabbit: Broker) -> Iterator[AmqTask]:
    """The producer's end."""
    with AmqTask("client", broker=rabbit.url, backend="rpc://", **PATIENT) as made:
        yield made


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("task", ["logged.talk", "logged.talk_async"])
@pytest.mark.parametrize("pool", POOLS)
def test_json_lines_of_tasks_carry_their_name_and_id(
    rabbit: Broker, app: AmqTask, tmp_path: Path, pool: str, task: str
) -> None:
    queue, log = rabbit.queue("logged"), tmp_path / "log"
    options = ("-P", pool, "-c", "2", "--log-format", "json", "-f", str(log))
    worker = WorkerProcess(LOGGED, "-Q", queue, *options)
    with worker.start(wait=False):
        results = {word: app.send_task(task, (word,), queue=queue) for word in ("one", "two", "three")}
        for result in results.values():
            result.get(timeout=90)
        worker.stop()

    for word, result in results.items():
        told = {
            (entry["level"], entry["message"])
            for entry in entries(log)
            if entry.get("task_id") == result.id and entry["task_name"] == task and entry["logger"] != "amqtask.worker"
        }
        assert told == {
            ("INFO", f"task logger {word}"),
            ("INFO", f"library {word}"),
            ("WARNING", f"printed {word} in pieces"),
            ("WARNING", f"error {word}"),
        }


def test_json_is_all_that_a_worker_prints(rabbit: Broker, app: AmqTask) -> None:
    queue = rabbit.queue("json")
    options = ("-P", "solo", "--max-tasks-per-child", "5", "--log-format", "json", "-n", "logs@here")
    with WorkerProcess(LOGGED, "-Q", queue, *options) as worker:
        with pytest.raises(ValueError, match="no"):
            app.send_task("logged.fail", queue=queue).get(timeout=90)
        worker.stop()
        lines = [json.loads(line) for line in worker.log.splitlines()]

    assert {line["hostname"] for line in lines} == {"logs@here"}
    [starting] = [line for line in lines if line["message"] == "worker: starting"]
    assert (starting["pool"], starting["queues"], "logged.talk" in starting["tasks"]) == ("solo", [queue], True)
    [warned] = [line for line in lines if line["logger"] == "py.warnings"]
    assert ("this is old" in warned["message"], warned["task_name"]) == (True, "logged.fail")
    [failed] = [line for line in lines if line.get("state") == "FAILURE"]
    assert (failed["task_name"], "Traceback" in failed["message"], failed["runtime"] > 0) == (
        "logged.fail",
        False,
        True,
    )
    assert failed["exception"].splitlines()[-1] == "ValueError: no"


def test_readable_lines_name_the_task_too(rabbit: Broker, app: AmqTask) -> None:
    queue = rabbit.queue("readable")
    with WorkerProcess(LOGGED, "-Q", queue, "-c", "1") as worker:
        result = app.send_task("logged.talk", ("one",), queue=queue)
        result.get(timeout=90)

        told = [line.partition("] ")[2] for line in worker.log.splitlines() if f"logged.talk[{result.id}]: " in line]
        assert told == [
            f"logged.talk[{result.id}]: {text}"
            for text in ("task logger one", "library one", "printed one in pieces", "error one")
        ]


def test_prints_are_left_alone_if_the_app_wants_it(rabbit: Broker, app: AmqTask) -> None:
    queue = rabbit.queue("prints")
    with WorkerProcess(LOGGED, "-Q", queue, "-c", "1", environment={"LOGGED_PRINTS": "1"}) as worker:
        app.send_task("logged.talk", ("one",), queue=queue).get(timeout=90)

        assert {"printed one in pieces", "error one"} <= set(worker.log.splitlines())


def test_each_process_of_prefork_logs_to_a_file_of_its_own_where_the_name_says_so(
    rabbit: Broker, app: AmqTask, tmp_path: Path
) -> None:
    queue = rabbit.queue("logged")
    worker = WorkerProcess(LOGGED, "-Q", queue, "-P", "prefork", "-c", "1", "-f", str(tmp_path / "w%I.log"))
    with worker.start(wait=False):
        app.send_task("logged.talk", ("one",), queue=queue).get(timeout=90)
        worker.stop()

    assert sorted(path.name for path in tmp_path.iterdir()) == ["w-1.log", "w.log"]
    assert "task logger one" in (tmp_path / "w-1.log").read_text()
    assert "task logger one" not in (tmp_path / "w.log").read_text()
    assert "Warm shutdown" in (tmp_path / "w.log").read_text()
