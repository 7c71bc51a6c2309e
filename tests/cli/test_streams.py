"""Commands whose standard streams are closed, or cannot write every character."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
APP = """
from amqtask import AmqTask

app = AmqTask("shop→", broker="memory://")


@app.task(name="größe→x")
def size(): ...
"""


def run(folder: Path, *words: str, redirect: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = f"{shlex.join([sys.executable, *words])} {redirect}"
    paths = os.pathsep.join(str(path) for path in (ROOT, ROOT / "pools"))
    return subprocess.run(
        ["sh", "-c", command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        check=False,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tasks.py").write_text(APP, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("words", [["--help"], ["-A", "tasks", "list", "tasks"]], ids=str)
def test_what_the_terminal_cannot_show_is_printed_as_an_escape(folder: Path, words: list[str]) -> None:
    done = run(folder, "-m", "amqtask", *words, PYTHONIOENCODING="latin-1")

    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\u2192" in done.stdout or b"\\u2026" in done.stdout


@pytest.mark.parametrize("redirect", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_no_error_and_its_number_is_nobody_else_s(folder: Path, redirect: str) -> None:
    code = """
import json, os
from amqtask.__main__ import main
code = main(["-A", "tasks", "list", "tasks"])
print("is anybody there?")
number = os.open("said", os.O_WRONLY | os.O_CREAT)
os.write(number, json.dumps([code, number > 2]).encode())
"""
    assert run(folder, "-c", code, redirect=redirect).returncode == 0
    assert json.loads((folder / "said").read_text()) == [0, True]
