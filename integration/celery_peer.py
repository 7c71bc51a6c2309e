"""A real Celery 5.7 in a virtual environment of its own, installed on first use."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from integration.machine import kill_session
from integration.workers import ROOT, eventually

FOLDER = ROOT / ".venv-celery"
PACKAGES = (
    "celery[auth]==5.7.0",
    "redis",
    "packaging",
    "SQLAlchemy",
    "psycopg[binary]",
    "pymemcache",
    "pymongo",
    "Django",
)
APP = "integration.apps.celery_app"


def python() -> str:
    """The peer's interpreter."""
    interpreter, installed = FOLDER / "bin" / "python", FOLDER / ".installed"
    if not installed.exists() or installed.read_text() != " ".join(PACKAGES):
        subprocess.run([sys.executable, "-m", "venv", str(FOLDER)], check=True)
        pip = [str(interpreter), "-m", "pip", "-q", "--disable-pip-version-check", "install", *PACKAGES]
        subprocess.run(pip, check=True)
        installed.write_text(" ".join(PACKAGES))
    return str(interpreter)


def environment(broker: str, backend: str, queue: str) -> dict[str, str]:
    """How the peer's application is configured."""
    return {**os.environ, "PEER_BROKER": broker, "PEER_BACKEND": backend, "PEER_QUEUE": queue}


def call(code: str, environment: dict[str, str], app: str = APP, timeout: float = 120) -> str:
    """What a piece of Python prints in the peer's environment (`app` and its tasks are imported)."""
    done = subprocess.run(
        [python(), "-W", "ignore", "-c", f"from {app} import *\n{code}"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def cli(environment: dict[str, str], *words: str) -> tuple[int, str]:
    """`celery -A … WORDS`: exit code and what it prints."""
    done = subprocess.run(
        [python(), "-W", "ignore", "-m", "celery", "-A", APP, *words],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout or done.stderr


class CeleryWorker:
    """`celery worker` on one queue."""

    def __init__(self, environment: dict[str, str], queue: str, *options: str, app: str = APP) -> None:
        self._log = Path(tempfile.mkstemp(prefix="celery-worker-", suffix=".log")[1])
        command = [
            python(),
            "-W",
            "ignore",
            "-m",
            "celery",
            "-A",
            app,
            "worker",
            "-Q",
            queue,
            "-c",
            "2",
            "-l",
            "INFO",
            *options,
        ]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def __enter__(self) -> CeleryWorker:
        try:
            eventually(lambda: " ready." in self.log, what=lambda: f"Celery is not ready:\n{self.log}")
        except BaseException:
            kill_session(self._process)  # it would answer other tests' questions
            raise
        return self

    @property
    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    @property
    def log(self) -> str:
        """Everything it printed."""
        return self._log.read_text()

    def __exit__(self, *_: object) -> None:
        try:
            self._process.terminate()
            self._process.wait(90)
        finally:
            kill_session(self._process)
            self._log.unlink()
