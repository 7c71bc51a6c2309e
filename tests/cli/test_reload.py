"""`worker --reload`: changes that come while a worker is being replaced. The rest is in integration/test_reload.py."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("watchfiles")

# A task that runs until there is a file `end` keeps the worker that was told to stop.
PROJECT = """
import os, time
from amqtask import AmqTask
from amqtask.signals import worker_ready

app = AmqTask("proj", broker="memory://", set_as_current=False)


@app.task(name="slow")
def slow():
    print({version!r}, "has begun", flush=True)
    while not os.path.exists("end"):
        time.sleep(0.02)


@worker_ready.connect(weak=False)
def call(**_):
    slow.delay()


print({version!r}, "is imported", flush=True)
"""


class Reloaded:
    """A project in a folder, and the lines of a worker that watches it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.change("first")
        line = ["-A", "proj", "worker", "-P", "threads", "-c", "1", "-l", "INFO", "--reload", "--reload-timeout", "600"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "amqtask", *line],
            cwd=folder,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def change(self, version: str) -> None:
        """Save the project's code."""
        self._folder.joinpath("proj.py").write_text(PROJECT.format(version=version))

    def spoil(self) -> None:
        """Save code that can be compiled, and not imported."""
        self._folder.joinpath("proj.py").write_text("import no_such_module_of_mine\n")

    def end(self) -> None:
        """Let what runs end."""
        self._folder.joinpath("end").touch()

    def await_line(self, text: str) -> list[str]:
        """The lines up to the one with this text."""
        assert self.process.stdout is not None
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if text in line:
                return lines
        raise AssertionError(f"it ended before it said {text!r}:\n{''.join(lines)}")


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Reloaded]:
    reloaded = Reloaded(tmp_path)
    yield reloaded
    reloaded.process.terminate()
    reloaded.process.communicate(timeout=60)


def test_code_that_cannot_be_imported_after_code_that_could_does_not_end_the_command(project: Reloaded) -> None:
    project.await_line("first has begun")
    project.change("second")
    project.await_line("Warm shutdown")  # the worker waits for its task, and `second` for the worker
    project.spoil()
    lines = project.await_line("the new code cannot be started")
    assert "the worker ends its tasks, then nothing runs until the next change" in lines[-1]

    project.end()
    project.await_line("nothing runs until the next change")
    project.change("third")
    project.await_line("third has begun")


def test_a_second_change_takes_no_time_from_tasks_that_run(project: Reloaded) -> None:
    project.await_line("first has begun")
    project.change("second")
    project.await_line("Warm shutdown")
    project.change("third")
    project.await_line("third is imported")
    project.spoil()
    lines = project.await_line("the new code cannot be started")

    assert not any("Cold shutdown" in line for line in lines), lines
    assert "the worker ends its tasks" in lines[-1]
    project.end()
    project.await_line("nothing runs until the next change")
