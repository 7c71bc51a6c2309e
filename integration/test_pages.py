"""The tutorial and the how-to pages, followed by hand: their files written, their lines typed, what these print compared."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import venv
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from integration.conftest import Broker
from integration.kube import KubeServer
from integration.machine import NodeError, free_port, program
from integration.projects import BIN, Project
from integration.waiting import eventually
from integration.workers import READY, ROOT, LoggedProcess

DOCS = ROOT / "docs"
APPS = ROOT / "integration" / "apps"
BLOCK = re.compile(r"^( *)```(python|console)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# ([\w/]+\.py)\b")
# The pages of mkdocs.yml under Tutorial and How to.
FOLLOWED = re.compile(r"^  - (?:Tutorial|How to):\n((?:      .*\n)+)", re.MULTILINE)
NAMES = re.findall(r"docs/([\w-]+\.md)", "".join(FOLLOWED.findall((ROOT / "mkdocs.yml").read_text())))
PAGES = [name for name in NAMES if "```console" in (DOCS / name).read_text()]

# integration/test_docker.py types lines of this page with this word, in a Docker engine.
NOT_TYPED = ("deploy.md", "docker ")
# What lines with these words need beside this virtual environment: a fixture that gives variables for them. Where that is not to
# be had, all other lines of the page are typed, and the test says which one is left.
NEEDS = {
    "pip install": "own_environment",
    "amqtask flower": "own_environment",
    "kubectl": "kubernetes",
    "promtool": "promtool",
}
# Lines that begin so are typed in the checkout, and whole lines that draw on a terminal.
IN_CHECKOUT = ("kubectl apply -k", "promtool")
DRAWING = re.compile(r"amqtask events(?: +#.*)?|amqtask -A proj top")
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
    "outbox.md": ('python -c "from shop.db import Base, engine; Base.metadata.create_all(engine)"',),
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
    "Starting development server",
    "Visit me at ",
    "relaying ",
    "(no task events yet",
    "last hour",
)
# pip warns, and goes on.
NO_SUCH_EXTRA = "does not provide the extra"
# Lines that ask what has become of something are typed until it has.
QUESTIONS = ("dead list", "tasks find")
# What stands for a port of this machine, and for an id that was printed.
PORT = re.compile(r"\b(?:5555|5556|8080|9100)\b")
SOME_ID = re.compile(r"\b[0-9a-f]{8}-…")
ID = re.compile(r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b")
SHOP_DATABASE = "postgresql+psycopg://shop@db/shop"
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


@pytest.fixture(scope="session")
def own_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A virtual environment in which amqtask is as its users install it; there `pip` installs, too."""
    folder = tmp_path_factory.mktemp("installed")
    for name in ("amqtask", "pools"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    venv.create(folder / "venv", with_pip=False)
    programs = folder / "venv" / "bin"
    found = {
        "PIP_PYTHON": str(programs / "python"),
        "PIP_FIND_LINKS": f"{folder} {os.environ.get('PIP_FIND_LINKS', '')}",
        "PATH": os.pathsep.join([str(programs), str(BIN), os.environ["PATH"]]),
        "PYTHONPATH": "",  # else pip takes the checkout for what is installed
    }
    for words in (
        ["wheel", "-q", "--no-deps", "-w", str(folder), str(folder / "source")],
        ["install", "-q", "amqtask"],
    ):
        pip = subprocess.run(
            [BIN / "pip", *words], env={**os.environ, **found}, capture_output=True, text=True, check=False
        )
        if pip.returncode:
            raise NodeError(f"pip {words[0]}: {pip.stderr}")
    return found


@pytest.fixture(scope="session")
def kubernetes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """kubectl's way to a stand-in for an API server."""
    home = tmp_path_factory.mktemp("kubernetes")
    with KubeServer(home) as server:
        yield {"KUBECONFIG": str(server.config), "HOME": str(home)}


@pytest.fixture(scope="session")
def promtool() -> dict[str, str]:
    """It is installed."""
    program("promtool", "prometheus")
    return {}


@pytest.mark.usefixtures("queues_deleted")
@pytest.mark.parametrize("name", PAGES)
def test_a_pages_lines_do_what_it_says(
    name: str, tmp_path: Path, broker_url: str, redis_url: str, request: pytest.FixtureRequest
) -> None:
    blocks = [
        (kind, re.sub(f"^{indent}", "", text, flags=re.MULTILINE))
        for indent, kind, text in BLOCK.findall((DOCS / name).read_text())
    ]
    typed = [
        line
        for kind, text in blocks
        if kind == "console"
        for line in text.removeprefix("$ ").split("\n$ ")
        if not (name == NOT_TYPED[0] and NOT_TYPED[1] in line)
    ]
    left = []
    with Terminal(tmp_path, broker_url, redis_url) as terminal:
        lay_out(tmp_path, name, [text for kind, text in blocks if kind == "python"])
        for line in BEFORE.get(name, ()):
            terminal.type(line)
        for each in typed:
            line, _, printed = each.partition("\n")
            try:
                environment = environment_for(line, request)
            except NodeError as error:
                left.append(f"{line} ({error})")
                continue
            terminal.type(line, printed, **environment)
    if left:
        pytest.skip(f"not typed: {'; '.join(left)}")


def environment_for(line: str, request: pytest.FixtureRequest) -> dict[str, str]:
    """Variables for what the line needs. Raises: NodeError where that is not to be had."""
    fixture = next((fixture for words, fixture in NEEDS.items() if words in line), None)
    return request.getfixturevalue(fixture) if fixture else {}


def lay_out(folder: Path, name: str, programs: list[str]) -> None:
    """The project that the page's reader has, and the programs of the page."""
    if name != "tutorial.md":
        shutil.copytree(APPS / "pages", folder, dirs_exist_ok=True)
    if "$ python manage.py" in (DOCS / name).read_text():
        shutil.rmtree(folder / "proj")
        shutil.copytree(APPS / "django_page", folder, dirs_exist_ok=True)
    for text in programs:
        if file := FILE.match(text):
            path = folder / file[1]
            path.parent.mkdir(exist_ok=True)
            # Of its settings a page has only those that it speaks of.
            before = path.read_text() if path.name == "settings.py" else ""
            path.write_text(before + text.replace(SHOP_DATABASE, f"sqlite:///{folder}/shop.db"))


def test_each_exception_has_a_line() -> None:
    text = "".join((DOCS / name).read_text() for name in PAGES)
    lines = re.findall(r"^ *\$ (.*)$", text, re.MULTILINE)

    assert NOT_TYPED[0] in PAGES
    assert [words for words in IN_CHECKOUT if not any(line.startswith(words) for line in lines)] == []
    assert [words for words in NEEDS if not any(words in line for line in lines)] == []
    assert len([line for line in lines if DRAWING.fullmatch(line)]) == 2


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
            PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'pools'}",
            **{name: str(free_port()) for name in own_ports},
        )
        self._addresses = {
            "amqp://localhost//": broker_url,
            "redis://localhost:6379/0": redis_url,
            "manage.py runserver": f"manage.py runserver {free_port()}",
        }
        self._ports: dict[str, str] = {}
        self._answers = folder / "answers"
        self._answers.write_text("y\n" * 10)
        self._jobs: list[LoggedProcess] = []
        self._ids = [""]

    def type(self, line: str, printed: str = "", **environment: str) -> None:
        """Run a line, and look at what it prints, if the page says what that is. What goes on need only be there."""
        line = self._as_here(line)
        if line.startswith("kill %"):
            assert self._jobs[int(line.removeprefix("kill %")) - 1].stop() == 0
        elif any(f" {question}" in line for question in QUESTIONS):
            eventually(lambda: matches(printed, self._run(line)), what=lambda: str(self._run(line)))
        else:
            found = self._run(line, environment)
            assert matches(printed, found), f"{line}\n{found}"

    def _as_here(self, line: str) -> str:
        for address, own in self._addresses.items():
            line = line.replace(address, own)
        if line.startswith(IN_CHECKOUT):
            line = f"cd {ROOT} && {line}"
        if DRAWING.fullmatch(line):
            line = f"script -qefc {shlex.quote(line)} /dev/null"
        line = PORT.sub(lambda port: self._ports.setdefault(port[0], str(free_port())), line)
        return SOME_ID.sub(self._ids[-1], line).removesuffix(" &")

    def _run(self, line: str, environment: Mapping[str, str] | None = None) -> str | None:
        """What it has printed when it ended; None of what goes on."""
        job = self.enter_context(self._project.type(line, answers=self._answers, environment=environment or {}))
        eventually(
            lambda: job.process.poll() is not None or any(said in job.log for said in SAID), what=lambda: job.log
        )
        if job.process.poll() is None:
            self._jobs.append(job)
            return None
        assert job.process.poll() == 0, f"{line}: exit code {job.process.poll()}\n{job.log}"
        assert NO_SUCH_EXTRA not in job.log
        self._ids += ID.findall(job.log)
        return job.log


def matches(printed: str, found: str | None) -> bool:
    """Whether a program printed what the page says; `…` is anything."""
    if found is None or not printed:
        return True
    pattern = re.escape(printed.rstrip("\n")).replace("…\\\n", ".*").replace("…", ".*")
    return re.fullmatch(pattern, found.rstrip("\n"), re.DOTALL) is not None
