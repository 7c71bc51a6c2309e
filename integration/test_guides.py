"""Programs in the style of the chapters of Celery's guide (examples/guides) give the same results under Celery and under amqtask:
the very text, but for the name that it imports from."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from integration import celery_peer
from integration.waiting import LONG
from integration.workers import READY, ROOT, LoggedProcess

GUIDES = ROOT / "examples" / "guides"
# Program → the chapter of Celery's guide.
CHAPTERS = {
    "first_steps": "First steps",
    "next_steps": "Next steps",
    "calling": "Calling tasks",
    "canvas": "Canvas",
    "workers": "Workers",
    "periodic": "Periodic tasks",
    "routing": "Routing",
    "monitoring": "Monitoring",
    "testing": "Testing",
    "django_client": "Django",
}
_IMPORTS = re.compile(r"^(\s*(?:from|import) )amqtask\b", re.MULTILINE)


class System:
    """One of the two: a copy of the programs in a folder, the workers that they need, and what they print."""

    def __init__(self, name: str, python: str, folder: Path, broker_url: str, redis_url: str) -> None:
        self.name = name
        self.folder = folder
        self._python = python
        self._tag = f"{name}-{uuid.uuid4().hex[:6]}"
        self._environment = {
            **os.environ,
            "CELERY_BROKER_URL": broker_url,
            "CELERY_RESULT_BACKEND": redis_url,
            "GUIDE": self._tag,
            "GUIDE_FOLDER": str(folder),
            "GUIDE_NODE": f"proj@{self._tag}",
            "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
        }
        shutil.copytree(GUIDES, folder, dirs_exist_ok=True)
        for path in folder.rglob("*.py"):
            path.write_text(_IMPORTS.sub(rf"\g<1>{name}", path.read_text()))

    def worker(self, app: str, *options: str) -> LoggedProcess:
        """`celery -A app worker …`, or ours."""
        words = ("-A", app, "worker", "-l", "INFO", "-n", f"{app}@{self._tag}", *options)
        command = [self._python, "-W", "ignore", "-m", self.name, *words]
        return LoggedProcess(command, folder=self.folder, environment=self._environment)

    def workers(self) -> list[LoggedProcess]:
        """Of all chapters."""
        tag = self._tag
        return [
            self.worker("proj", "-Q", f"proj-{tag},feeds-{tag}", "-c", "2", "-E"),
            self.worker("first_steps", "-P", "solo"),
            self.worker("shop", "-c", "1"),
            self.worker("periodic", "-c", "1", "-B", "-s", str(self.folder / "schedule")),
        ]

    def run(self, program: str) -> Any:
        """What the program found, as a dictionary; what it printed when it failed."""
        environment = dict(self._environment)
        if program == "testing":  # it has a broker of its own
            del environment["CELERY_BROKER_URL"], environment["CELERY_RESULT_BACKEND"]
        done = subprocess.run(
            [self._python, "-W", "ignore", f"{program}.py"],
            cwd=self.folder, env=environment, capture_output=True, text=True, timeout=LONG, check=False,
        )  # fmt: skip
        return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else done.stdout + done.stderr


@pytest.fixture(scope="module")
def found(broker_url: str, redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each system's programs found. One after the other: they share a virtual host, and answer each other's questions."""
    everything: dict[str, dict[str, Any]] = {}
    for name, python in (("celery", celery_peer.python()), ("amqtask", sys.executable)):
        system = System(name, python, tmp_path_factory.mktemp(name), broker_url, redis_url)
        with ExitStack() as running:
            # All begin at once, and then each is waited for.
            workers = [running.enter_context(worker.start(wait=False)) for worker in system.workers()]
            for worker in workers:
                worker.await_log(READY)
            everything[name] = {program: system.run(program) for program in CHAPTERS}
    return everything


@pytest.mark.parametrize("program", CHAPTERS)
def test_a_chapter_gives_the_same_results_under_both(found: dict[str, dict[str, Any]], program: str) -> None:
    ours, theirs = found["amqtask"][program], found["celery"][program]

    assert isinstance(theirs, dict), theirs
    assert isinstance(ours, dict), ours
    assert ours == theirs


def test_only_what_the_programs_import_from_is_changed() -> None:
    for path in GUIDES.rglob("*.py"):
        if path.parent != GUIDES or path.name != "__init__.py":
            assert "amqtask" not in _IMPORTS.sub("", path.read_text()), path
