"""A user's project: a folder with programs, started there by the very lines that the documentation has."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from integration.waiting import LONG
from integration.workers import READY, LoggedProcess

BIN = Path(sys.executable).parent


class Project:
    """Runs command lines in `folder`, with `python` and `amqtask` from this virtual environment.

    Broker and result store come from the environment (CELERY_BROKER_URL, CELERY_RESULT_BACKEND) where they are given, which
    wins over what the project says: the examples name servers on their usual ports.
    """

    def __init__(self, folder: Path, *, broker_url: str = "", backend: str = "", **environment: str) -> None:
        self.folder = folder
        servers = {"CELERY_BROKER_URL": broker_url, "CELERY_RESULT_BACKEND": backend}
        self.environment = {
            **environment,
            **{name: url for name, url in servers.items() if url},
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }

    def run(self, line: str, *, timeout: float = LONG, code: int = 0) -> str:
        """What the program prints. Its exit code must be `code`."""
        done = subprocess.run(
            self._command(line),
            cwd=self.folder,
            env={**os.environ, **self.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == code, f"{line}: exit code {done.returncode}\n{done.stdout}"
        return done.stdout

    def start(self, line: str, *, ready: str = READY) -> LoggedProcess:
        """A program that goes on: `with project.start("amqtask -A tasks worker -l info") as worker:`."""
        process = LoggedProcess(self._command(line), ready=ready, folder=self.folder, environment=self.environment)
        try:
            return process.start()
        except BaseException:
            process.kill()
            raise

    def type(self, line: str, *, answers: Path, environment: Mapping[str, str]) -> LoggedProcess:
        """Begin what a shell makes of a line, in its place. What that asks it reads from `answers`."""
        command = ["bash", "-c", f"exec <{shlex.quote(str(answers))}\n{line}"]
        whole = {**self.environment, **environment}
        return LoggedProcess(command, folder=self.folder, environment=whole).start(wait=False)

    def _command(self, line: str) -> list[str]:
        program, *arguments = shlex.split(line)
        return [str(BIN / program), *arguments]
