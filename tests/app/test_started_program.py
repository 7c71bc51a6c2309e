"""`app.start()` in a program that its own tasks import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import amqtask

PROGRAM = """
from amqtask import AmqTask

app = AmqTask("proj", broker="memory://", include=["tasks"])

@app.task(name="of_the_program")
def one(): ...

if __name__ == "__main__":
    app.start(["list", "tasks", "--json"])
"""
TASKS = """
from program import app

@app.task(name="of_the_module")
def two(): ...
"""


def test_it_has_the_tasks_of_the_modules_that_import_it(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "tasks.py").write_text(TASKS)

    for command in (["-m", "program"], ["program.py"]):
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert sorted(row["task"] for row in json.loads(done.stdout)) == ["of_the_module", "of_the_program"], (
            done.stderr
        )


def test_a_program_that_nobody_imports_keeps_its_own(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM.replace(', include=["tasks"]', ""))

    done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert [row["task"] for row in json.loads(done.stdout)] == ["of_the_program"], done.stderr


def test_celerys_name_is_the_same_class() -> None:
    assert amqtask.Celery is amqtask.AmqTask
