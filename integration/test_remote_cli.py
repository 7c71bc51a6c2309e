"""`amqtask control`, `inspect` and `status` with workers that answer, refuse, or are not there."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from amqtask import AmqTask
from amqtask.cli.main import run
from integration.conftest import Broker
from integration.waiting import PATIENT, eventually
from integration.workers import WorkerProcess

SAMPLE = "integration.apps.sample"


@dataclass
class Scene:
    """One worker under a name that nobody else has, and the command line."""

    app: AmqTask
    worker: WorkerProcess
    node: str
    capsys: pytest.CaptureFixture[str]

    def says(self, *words: str) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        self.capsys.readouterr()
        code = run([*words, "-t", "30"], self.app)
        told = self.capsys.readouterr()
        return code, told.out, told.err


@pytest.fixture
def scene(rabbit: Broker, capsys: pytest.CaptureFixture[str]) -> Iterator[Scene]:
    queue, node = rabbit.queue("remote"), f"remote-{uuid.uuid4().hex[:8]}@here"
    app = AmqTask(
        "client", broker=rabbit.url, backend="rpc://", task_default_queue=queue, **PATIENT, set_as_current=False
    )
    with app, WorkerProcess(SAMPLE, "-Q", queue, "-P", "threads", "-c", "1", "-n", node) as worker:
        yield Scene(app, worker, node, capsys)


def test_who_refuses_or_does_not_answer_is_told_and_in_the_exit_code(scene: Scene) -> None:
    code, out, _ = scene.says("control", "rate_limit", "nosuch", "1/s", "-d", scene.node)
    assert (code, "ERROR" in out, "unknown task" in out) == (1, True, True)
    assert scene.says("control", "rate_limit", "sample.add", "1000/s", "-d", scene.node)[0] == 0

    assert scene.says("control", "shutdown", "-d", "nosuch@h", "-t", "0.5") == (
        69, "", "Error: No nodes replied within time constraint. Is a worker running on this broker?\n"
    )  # fmt: skip
    code, out, err = scene.says("inspect", "ping", "-d", f"{scene.node},nosuch@h", "-t", "5")
    assert (code, "pong" in out, err) == (1, True, "No reply from nosuch@h.\n")


def test_a_shutdown_says_who_was_told(scene: Scene) -> None:
    code, out, _ = scene.says("control", "shutdown", "-d", scene.node, "--json")

    assert (code, json.loads(out)) == (0, [{scene.node: {"ok": "told to shut down"}}])
    eventually(lambda: scene.worker.process.poll() is not None)


def test_tasks_are_shown_in_a_line_each(scene: Scene, tmp_path: Path) -> None:
    started, go = tmp_path / "started", tmp_path / "go"
    result = scene.app.send_task("sample.wait_for", (str(started), str(go)))
    eventually(started.exists)

    code, out, _ = scene.says("inspect", "active", "-d", scene.node)
    line = next(line for line in out.splitlines() if result.id in line)
    assert code == 0
    assert re.fullmatch(
        rf" +\* sample\.wait_for\[{result.id}\]  args=\['{started}', '{go}'\]  kwargs=\{{\}}  "
        r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d  pid=\d+  queue=\S+",
        line,
    )
    go.touch()


def test_a_delayed_task_is_shown_by_the_worker_that_holds_it(scene: Scene) -> None:
    result = scene.app.send_task("sample.add", (1, 2), countdown=300)
    shown: list[str] = []

    def is_shown() -> bool:
        code, out, _ = scene.says("inspect", "scheduled", "-d", scene.node)
        shown[:] = [line for line in out.splitlines() if result.id in line]
        return code == 0 and bool(shown)

    eventually(is_shown, every=1.0)
    assert re.match(rf" +\* at \d{{4}}-\S+  sample\.add\[{result.id}\]  args=\(1, 2\)  kwargs=\{{\}}  queue=", shown[0])
