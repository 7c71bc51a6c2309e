"""The tutorial and the how-to pages, followed by hand: their files written, their lines typed, what these print compared."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.conftest import Broker
from integration.nodes import free_port
from integration.projects import Project
from integration.waiting import eventually
from integration.workers import READY, ROOT, LoggedProcess

DOCS = ROOT / "docs"
BLOCK = re.compile(r"^( *)```(python|console)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# ([\w/]+\.py)\b")
# The pages of mkdocs.yml under Tutorial and How to.
FOLLOWED = re.compile(r"^  - (?:Tutorial|How to):\n((?:      .*\n)+)", re.MULTILINE)
NAMES = re.findall(r"docs/([\w-]+\.md)", "".join(FOLLOWED.findall((ROOT / "mkdocs.yml").read_text())))
PAGES = [name for name in NAMES if "```console" in (DOCS / name).read_text()]

# What a line begins with that is not typed, and why not.
NOT_TYPED = {
    "pip install": "what it installs is here, and no index has amqtask yet",
    "docker": "no container engine; integration/test_deploy.py makes the image's root, and runs it",
    "kubectl": "no cluster; integration/test_deploy.py looks at the manifests",
    "python manage.py": "integration/test_django_examples.py types these lines in whole projects",
    "amqtask -A proj beat -S django": "integration/test_django.py",
    "amqtask -A shop.tasks relay": "the page's database is on another host; integration/test_outbox_example.py",
    "promtool": "integration/test_dashboards.py runs it",
    "amqtask flower": "Flower has an environment of its own; integration/test_flower.py",
    "amqtask events  ": "it draws on a terminal; tests/cli/test_events.py",
    "amqtask -A proj top": "it draws on a terminal; tests/cli/test_top.py",
}
# Lines that the reader has typed before.
BEFORE = {
    "history.md": ("amqtask worker -l info", "amqtask call shop.send -a '[\"ann@example.org\"]'", "amqtask history"),
    "remote-control.md": ("amqtask worker -n celery@web1 -l info",),
    "alerts.md": ("amqtask worker -n celery@web1 -Q reports -l info",),
    "stuck-queue.md": (
        "amqtask worker -l info",
        "amqtask call proj.tasks.mail -a '[\"ann@example.org\"]'",
        "amqtask history",
    ),
    "drain.md": ("amqtask topology declare",),
    "roll-out.md": ("amqtask worker -l info",),
    "scale.md": ("amqtask worker -Q reports -l info",),
}
# What says that a program which goes on is there.
SAID = (
    READY,
    "beat: Starting...",
    "The console is on http://",
    "history: reading",
    "worker-heartbeat",
    "camera: ",
    "Running on http://",
    "Uvicorn running on ",
)
# Lines that ask what has become of something are typed until it has.
QUESTIONS = ("dead list", "tasks find")
# What stands for a port of this machine, and for an id that was printed.
PORT = re.compile(r"\b(?:5555|5556|8080|9100)\b")
SOME_ID = re.compile(r"\b[0-9a-f]{8}-…")
ID = re.compile(r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b")
# Queues that the pages' applications make.
QUEUES = ("amqtask", "reports", "reports_slow", "cma_queue", "web", "default")


@pytest.fixture
def queues_deleted(rabbit: Broker) -> Iterator[None]:
    """Nobody after this test gets what it left."""
    yield
    channel = rabbit.channel()
    for queue in QUEUES:
        channel.queue_delete(queue)
        channel.queue_delete(f"{queue}.dead")


@pytest.mark.usefixtures("queues_deleted")
@pytest.mark.parametrize("name", PAGES)
def test_a_pages_lines_do_what_it_says(name: str, tmp_path: Path, broker_url: str, redis_url: str) -> None:
    blocks = [
        (kind, re.sub(f"^{indent}", "", text, flags=re.MULTILINE))
        for indent, kind, text in BLOCK.findall((DOCS / name).read_text())
    ]
    with Terminal(tmp_path, broker_url, redis_url) as terminal:
        if name != "tutorial.md":
            shutil.copytree(ROOT / "integration" / "apps" / "pages", tmp_path, dirs_exist_ok=True)
        for kind, text in blocks:
            if kind == "python" and (file := FILE.match(text)):
                (tmp_path / file[1]).parent.mkdir(exist_ok=True)
                (tmp_path / file[1]).write_text(text)
        for line in BEFORE.get(name, ()):
            terminal.type(line)
        for kind, text in blocks:
            if kind == "console":
                for typed in text.removeprefix("$ ").split("\n$ "):
                    line, _, printed = typed.partition("\n")
                    if not line.startswith(tuple(NOT_TYPED)):
                        terminal.type(line, printed)


def test_each_reason_for_not_typing_a_line_has_a_line() -> None:
    text = "".join((DOCS / name).read_text() for name in PAGES)

    assert [line for line in NOT_TYPED if f"$ {line}" not in text] == []


class Terminal(contextlib.ExitStack):
    """Where lines are typed; programs that go on end with it."""

    def __init__(self, folder: Path, broker_url: str, redis_url: str) -> None:
        super().__init__()
        own_ports = (
            "AMQTASK_CONSOLE_PORT",
            "AMQTASK_DEV_PORT",
            "AMQTASK_DEV_CONSOLE_PORT",
            "FLASK_RUN_PORT",
            "UVICORN_PORT",
        )
        self._project = Project(
            folder,
            broker_url=broker_url,
            AMQTASK_APP="proj",
            PYTHONPATH=str(ROOT),
            **{name: str(free_port()) for name in own_ports},
        )
        self._addresses = {
            "amqp://localhost//": broker_url,
            "redis://localhost:6379/0": redis_url,
            "kubectl apply -f -": "cat",
        }
        self._ports: dict[str, str] = {}
        self._answers = folder / "answers"
        self._answers.write_text("y\n" * 10)
        self._jobs: list[LoggedProcess] = []
        self._ids = [""]

    def type(self, line: str, printed: str = "") -> None:
        """Run a line, and look at what it prints, if the page says what that is. What goes on need only be there."""
        line = self._as_here(line)
        if line.startswith("kill %"):
            assert self._jobs[int(line.removeprefix("kill %")) - 1].stop() == 0
        elif any(f" {question}" in line for question in QUESTIONS):
            eventually(lambda: matches(printed, self._run(line)), what=lambda: str(self._run(line)))
        else:
            found = self._run(line)
            assert matches(printed, found), f"{line}\n{found}"

    def _as_here(self, line: str) -> str:
        for address, own in self._addresses.items():
            line = line.replace(address, own)
        line = PORT.sub(lambda port: self._ports.setdefault(port[0], str(free_port())), line)
        return SOME_ID.sub(self._ids[-1], line).removesuffix(" &")

    def _run(self, line: str) -> str | None:
        """What it has printed when it ended; None of what goes on."""
        job = self.enter_context(self._project.type(line, answers=self._answers))
        eventually(
            lambda: job.process.poll() is not None or any(said in job.log for said in SAID), what=lambda: job.log
        )
        if job.process.poll() is None:
            self._jobs.append(job)
            return None
        assert job.process.poll() == 0, f"{line}: exit code {job.process.poll()}\n{job.log}"
        self._ids += ID.findall(job.log)
        return job.log


def matches(printed: str, found: str | None) -> bool:
    """Whether a program printed what the page says; `…` is anything."""
    if found is None or not printed:
        return True
    pattern = re.escape(printed.rstrip("\n")).replace("…\\\n", ".*").replace("…", ".*")
    return re.fullmatch(pattern, found.rstrip("\n"), re.DOTALL) is not None
