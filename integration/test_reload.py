"""`amqtask worker --reload`: the code that runs is the code that is there."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from amqtask import AmqTask
from amqtask.result import AsyncResult
from integration.conftest import Broker
from integration.waiting import PATIENT, eventually
from integration.workers import LoggedProcess

PROJECT = """
import os, time
from amqtask import AmqTask

app = AmqTask("tasks", broker={url!r}, backend="rpc://", task_default_queue={queue!r})


@app.task(name="answer")
def answer():
    return {answer!r}


@app.task(name="slow")
def slow(folder):
    open(os.path.join(folder, "begun"), "a").write({answer!r} + " ")
    while not os.path.exists(os.path.join(folder, "end")):
        time.sleep(0.05)
    return {answer!r}
"""


class Reloaded:
    """A project in a folder, and a worker that watches it."""

    def __init__(self, folder: Path, url: str, queue: str) -> None:
        self.folder, self.tasks = folder, folder / "tasks.py"
        self._url, self._queue = url, queue
        self.client = AmqTask("client", broker=url, backend="rpc://", task_default_queue=queue, **PATIENT)

    def write(self, answer: str) -> None:
        """The code whose answer this is."""
        self.tasks.write_text(PROJECT.format(url=self._url, queue=self._queue, answer=answer))

    def worker(self, *options: str) -> LoggedProcess:
        """It watches the folder."""
        line = ["--workdir", str(self.folder), "-A", "tasks", "worker", "-l", "INFO", "--reload", *options]
        return LoggedProcess([sys.executable, "-m", "amqtask", *line])

    def answer(self) -> str:
        """What the worker's code says."""
        return str(self.client.send_task("answer").get(timeout=60))

    def slow(self) -> AsyncResult[Any]:
        """A call that has begun to run, and does until `end`."""
        result = self.client.send_task("slow", (str(self.folder),))
        eventually(lambda: self.begun)
        return result

    @property
    def begun(self) -> str:
        """The answers of the code of each run of `slow`."""
        path = self.folder / "begun"
        return path.read_text() if path.exists() else ""

    def end(self) -> None:
        """Let `slow` end."""
        (self.folder / "end").touch()


@pytest.fixture
def project(tmp_path: Path, rabbit: Broker) -> Iterator[Reloaded]:
    project = Reloaded(tmp_path, rabbit.url, rabbit.queue("reload"))
    project.write("first")
    yield project
    project.client.close()


def awaited(project: Reloaded, answer: str) -> None:
    """Return once this code answers: what was taken before it is answered by the code before it."""
    while project.answer() != answer:
        pass


@pytest.mark.parametrize("pool", ["prefork", "eventlet"])
def test_new_code_runs_and_broken_code_does_not_stop_the_old(pool: str, project: Reloaded) -> None:
    with project.worker("-P", pool, "-c", "1") as worker:
        assert project.answer() == "first"
        project.write("secnd")  # as long as the first, and written in the same second
        awaited(project, "secnd")

        project.tasks.write_text("def broken(:\n")
        worker.await_log("SyntaxError")
        worker.await_log("the worker goes on as it was until the next change")
        assert project.answer() == "secnd"

        project.tasks.write_text("import no_such_module_of_mine\n")
        worker.await_log("the new code cannot be started")
        assert "no module" in worker.log.lower()
        assert project.answer() == "secnd"

        project.write("third")
        awaited(project, "third")
        assert worker.stop() == 0


@pytest.mark.parametrize("pool", ["asyncio", "threads", "gevent"])
def test_a_running_task_is_waited_for(pool: str, project: Reloaded) -> None:
    with project.worker("-P", pool, "-c", "1", "--reload-timeout", "600") as worker:
        result = project.slow()
        project.write("secnd")
        worker.await_log("Warm shutdown")
        project.end()
        assert result.get(timeout=60) == "first"
        awaited(project, "secnd")
        assert project.begun == "first "


@pytest.mark.parametrize("pool", ["prefork", "solo"])
def test_a_task_that_runs_for_too_long_runs_again_with_the_new_code(pool: str, project: Reloaded) -> None:
    with project.worker("-P", pool, "-c", "1", "--reload-timeout", "0.2"):
        result = project.slow()
        project.write("secnd")
        eventually(lambda: project.begun == "first secnd ")
        project.end()
        assert result.get(timeout=60) == "secnd"


def test_a_project_that_cannot_be_imported_is_waited_for(project: Reloaded) -> None:
    project.tasks.write_text("import no_such_module_of_mine\n")
    worker = project.worker("-P", "solo")
    with worker.start(wait=False):
        worker.await_log("nothing runs until the next change")
        project.write("first")
        assert project.answer() == "first"
        worker.signal(signal.SIGINT)
        assert worker.wait() == 0
