"""docs/deploy.md's lines for Docker, typed into an engine of these tests' own (integration.engine).

On request only: making the engine's root, and those of the images' stand-ins, takes minutes.

    AMQTASK_TEST_DOCKER=1 python -m pytest integration/test_docker.py
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from integration.engine import Engine
from integration.machine import NodeError
from integration.roots import python_root, rabbit_root
from integration.waiting import LONG, eventually
from integration.workers import ROOT, LoggedProcess

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(460),
    pytest.mark.skipif(
        "AMQTASK_TEST_DOCKER" not in os.environ, reason="takes minutes; AMQTASK_TEST_DOCKER=1 asks for it"
    ),
]

PAGE = (ROOT / "docs" / "deploy.md").read_text()
# How the images begin. Debian's Python stands for the one, its RabbitMQ for the other.
PYTHON = re.findall(r"^ARG PYTHON=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[0]
RABBITMQ = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["rabbitmq"]["image"]
AS_RABBITMQ = (
    "ENV PATH=/usr/lib/rabbitmq/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/var/lib/rabbitmq LANG=C.UTF-8"
    " RABBITMQ_LOGS=- RABBITMQ_ENABLED_PLUGINS=rabbitmq_management",
    "USER rabbitmq",
    "VOLUME /var/lib/rabbitmq",
    'CMD ["rabbitmq-server"]',
)
SHOP = """
import os, subprocess, time
from amqtask import AmqTask

app = AmqTask("shop", task_history=True)


@app.task(name="pack")
def pack(seconds):
    subprocess.Popen(["sh", "-c", "sleep 0.1 &"])  # an orphan
    print("packing", flush=True)
    time.sleep(seconds)
    return os.getuid()
"""
# Asks as a browser does, with the user and password that the page gives.
ASK = """
import base64, sys, urllib.request
told = {"Authorization": "Basic " + base64.b64encode(b"amqtask:amqtask").decode()}
print(urllib.request.urlopen(urllib.request.Request(sys.argv[1], headers=told), timeout=30).read().decode())
"""


def section(title: str) -> str:
    """What the page has under that heading."""
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def lines(title: str) -> list[str]:
    """What it has its reader type there."""
    return re.findall(r"^\$ (.*)$", section(title), re.MULTILINE)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine that has the images with which ours begin."""
    roots = ROOT / ".roots"
    try:
        python, rabbit = python_root(roots), rabbit_root(RABBITMQ.partition(":")[2].partition("-")[0], roots)
        assert (python / f"usr/bin/python{PYTHON}").exists()
        with Engine(roots, ROOT) as started:
            started.import_image(python, f"python:{PYTHON}-slim")
            started.import_image(rabbit, RABBITMQ, *AS_RABBITMQ)
            yield started
    except NodeError as error:
        pytest.skip(str(error))


class Shell:
    """Where lines are typed, in the checkout; `docker` is the engine's."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._environment = {**os.environ, "PATH": engine.path}

    def type(self, line: str) -> str:
        """What it prints; its exit code must be 0."""
        done = subprocess.run(
            ["bash", "-c", line], cwd=ROOT, env=self._environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}: exit code {done.returncode}\n{done.stdout}"
        return done.stdout

    def begin(self, line: str) -> LoggedProcess:
        """It goes on."""
        return LoggedProcess(["bash", "-c", line], environment={"PATH": self._engine.path}).start(wait=False)

    def ask(self, url: str) -> Any:
        """JSON from a port that a container publishes; None while nobody answers there."""
        command = self._engine.within_network(sys.executable, "-c", ASK, url)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return json.loads(done.stdout) if done.returncode == 0 else None

    def states(self) -> dict[str, str]:
        """Each service of the compose file, and what its container is: `running healthy`, `exited`."""
        printed = self.type("docker compose ps --all --format json")
        found = map(json.loads, printed.splitlines())
        return {each["Service"]: f"{each['State']} {each['Health']}".strip() for each in found}


@pytest.fixture
def shell(engine: Engine) -> Iterator[Shell]:
    """No container is left by a test."""
    shell = Shell(engine)
    yield shell
    shell.type("docker compose down --volumes")
    shell.type("docker ps --all --quiet | xargs -r docker rm --force --volumes")


@pytest.fixture(scope="module")
def built(engine: Engine) -> None:
    """The image, by the page's line."""
    (line,) = lines("Image")
    Shell(engine).type(line)


@pytest.mark.usefixtures("built")
def test_an_image_of_ones_own_has_a_healthy_worker_that_is_not_root_and_drains_on_term(
    engine: Engine, shell: Shell
) -> None:
    folder = engine.root / "srv" / "shop"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "Dockerfile").write_text(section("Image").partition("```dockerfile\n")[2].partition("```")[0])
    (folder / "requirements.txt").write_text("humanize\n")
    (folder / "shop.py").write_text(SHOP)
    shell.type("docker build -t shop /srv/shop")
    shell.type("docker network create shop")
    user = "-e RABBITMQ_DEFAULT_USER=shop -e RABBITMQ_DEFAULT_PASS=shop"
    shell.type(f"docker run -d --name rabbitmq --network shop {user} {RABBITMQ}")
    shell.type(
        "docker run -d --name worker --network shop -e AMQTASK_BROKER_URL=amqp://shop:shop@rabbitmq//"
        " --read-only --tmpfs /tmp --cap-drop ALL shop"
    )
    told = "docker inspect worker --format"
    logs = "docker logs worker"

    eventually(
        lambda: shell.type(f"{told} '{{{{.State.Health.Status}}}}'") == "healthy\n", what=lambda: shell.type(logs)
    )
    assert shell.type("docker exec worker id -u") == "10001\n"
    assert "amqtask\0worker" in shell.type("docker exec worker cat /proc/1/cmdline")
    shell.type("docker exec worker python -c 'import humanize'")
    shell.type("docker exec worker amqtask call pack --args '[3]' --queue orders")
    eventually(lambda: "packing" in shell.type(logs), what=lambda: shell.type(logs))
    shell.type(f"docker stop -t {LONG:.0f} worker")
    assert shell.type(f"{told} '{{{{.State.ExitCode}}}}'") == "0\n"
    assert re.search(r"pack\S* succeeded in .*: 10001", shell.type(logs))


def test_compose_starts_it_all_the_first_task_runs_and_compose_ends_it(shell: Shell) -> None:
    up, first_task, down, _ = lines("Compose")
    services = {
        "rabbitmq": "running healthy",
        "worker": "running healthy",
        "beat": "running healthy",
        "relay": "running",
        "console": "running",
    }
    with shell.begin(up) as started:
        eventually(lambda: shell.states() == services, what=lambda: f"{shell.states()}\n{started.log[-8000:]}")
        shell.type(first_task)

        eventually(
            lambda: shown(shell) == ["SUCCESS"], what=lambda: shell.type("docker compose logs worker relay console")
        )
        assert shell.type("docker compose exec worker id -u") == "10001\n"
        shell.type(down)

        assert started.wait() == 0
        ended = set(re.findall(r"(\w+)-1 exited with code (\d+)", started.log))
    assert ended == {(service, "0") for service in services}
    assert shell.states() == {}


@pytest.mark.usefixtures("built")
def test_compose_takes_another_application(engine: Engine, shell: Shell) -> None:
    *_, up = lines("Compose")
    folder = engine.root / "srv" / "shop"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "shop.py").write_text(SHOP)
    services = {
        "rabbitmq": "running healthy",
        "worker": "running healthy",
        "beat": "running healthy",
        "console": "running",
    }
    with shell.begin(up) as started:
        eventually(lambda: shell.states() == services, what=lambda: f"{shell.states()}\n{started.log[-8000:]}")
        shell.type("docker compose exec worker amqtask call pack --args '[0]'")

        eventually(lambda: shown(shell) == ["SUCCESS"], what=lambda: shell.type("docker compose logs worker console"))


def shown(shell: Shell) -> list[str]:
    """States of the tasks that the console shows."""
    answer = shell.ask("http://127.0.0.1:5556/api/tasks")
    return [task["state"] for task in answer["tasks"]] if answer else []
