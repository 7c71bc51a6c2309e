"""A real Flower, unchanged from PyPI, in a virtual environment of its own, installed on first use; started by us."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from integration.machine import free_port
from integration.workers import ROOT, eventually

FOLDER = ROOT / ".venv-flower"
# Ours runs from this tree, so only what it needs is installed.
# What it asks all workers takes it so long each time, however soon they answer; and its first questions hold up those of a test.
ANSWER_SECONDS = 5
PACKAGES = ("flower==2.2.0", "pika", "aio-pika", "click", "redis", "msgspec", "packaging")


def python() -> str:
    """The interpreter that has Flower."""
    interpreter, installed = FOLDER / "bin" / "python", FOLDER / ".installed"
    if not installed.exists() or installed.read_text() != " ".join(PACKAGES):
        subprocess.run([sys.executable, "-m", "venv", str(FOLDER)], check=True)
        pip = [str(interpreter), "-m", "pip", "-q", "--disable-pip-version-check", "install", *PACKAGES]
        subprocess.run(pip, check=True)
        installed.write_text(" ".join(PACKAGES))
    return str(interpreter)


# Of what Flower asks a worker, what tests look at.
ASKED = frozenset({"stats", "registered", "active_queues", "revoked", "conf"})


class Flower:
    """`amqtask -A app flower`, and its HTTP interface."""

    def __init__(self, app: str, *, environment: dict[str, str]) -> None:
        self._interpreter = python()
        self._app = app
        self._environment = environment
        self._port = free_port()
        self._log = Path(tempfile.mkstemp(prefix="flower-", suffix=".log")[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Flower:
        options = [
            "flower",
            f"--port={self._port}",
            "--address=127.0.0.1",
            f"--inspect_timeout={ANSWER_SECONDS * 1000}",
        ]
        options += [f"--broker={url}" for name, url in self._environment.items() if name == "AMQTASK_BROKER_URL"]
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'pools'}",
            "FLOWER_UNAUTHENTICATED_API": "true",
            **self._environment,
        }
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [self._interpreter, "-W", "ignore", "-m", "amqtask", "-A", self._app, *options],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
            )
        try:
            eventually(self._answers, every=0.1, what="Flower does not answer")
        except BaseException:
            self._process.kill()
            print(self._log.read_text())
            raise
        return self

    def _answers(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        try:
            with urllib.request.urlopen(f"{self.url}/healthcheck", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(90)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.unlink()

    @property
    def log(self) -> str:
        return self._log.read_text()

    def get(self, path: str) -> Any:
        """The JSON of a GET. Raises: AssertionError with what it said instead."""
        return self._ask(urllib.request.Request(f"{self.url}{path}"))

    def worker(self, name: str) -> dict[str, Any]:
        """What a worker says of itself, asked now, and again when it did not answer all in time."""
        found: dict[str, Any] = {}

        def look() -> bool:
            found.clear()
            found.update(self.get(f"/api/workers?refresh=1&workername={urllib.parse.quote(name)}").get(name, {}))
            return found.keys() >= ASKED

        eventually(look, every=0.2, what=lambda: f"{name} does not tell all: {sorted(found)}")
        return found

    def find(self, path: str) -> Any:
        """The JSON of a GET; None for what Flower does not know (404)."""
        try:
            with urllib.request.urlopen(f"{self.url}{path}", timeout=90) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise
            return None

    def post(self, path: str, **fields: str) -> Any:
        """The JSON of a POST of form fields, as its buttons send them."""
        return self._ask(urllib.request.Request(f"{self.url}{path}", urllib.parse.urlencode(fields).encode()))

    def post_json(self, path: str, body: Any) -> Any:
        """The JSON of a POST of JSON."""
        return self._ask(urllib.request.Request(f"{self.url}{path}", json.dumps(body).encode()))

    def _ask(self, request: urllib.request.Request) -> Any:
        try:
            with urllib.request.urlopen(request, timeout=90) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise AssertionError(
                f"{request.full_url}: {error.code} {error.read().decode()[:500]}\n{self.log[-2000:]}"
            ) from None
