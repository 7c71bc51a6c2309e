"""A worker process for tests, as users start it: `amqtask -A … worker`, on a real RabbitMQ."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from amqtask.app import AmqTask
from amqtask.exceptions import BackendNotConfigured, ConfigurationError
from amqtask.ground.current import replaced

if TYPE_CHECKING:
    from amqtask.ground.shapes import SettingValues

READY = " ready."


class RealWorker:
    """A running worker process: its application, process id, queues and log."""

    def __init__(self, app: AmqTask, process: subprocess.Popen[bytes], queues: tuple[str, ...], log: Path) -> None:
        self.app = app
        self.queues = queues
        self._process = process
        self._log = log

    @property
    def pid(self) -> int:
        """The id of the main process."""
        return self._process.pid

    @property
    def log(self) -> str:
        """The worker's log so far."""
        return self._log.read_text(errors="replace")

    def stop(self, timeout: float = 30.0) -> int:
        """Warm shutdown: what runs is finished. The exit code. Raises: subprocess.TimeoutExpired."""
        if self._process.poll() is None:
            self._process.terminate()
        return self._process.wait(timeout)

    def kill(self) -> None:
        """Kill the worker (SIGKILL)."""
        self._process.kill()
        self._process.wait()

    def wait_until_ready(self, timeout: float) -> None:
        """Raises: RuntimeError with the end of its log when it ends or is not ready in time."""
        deadline = time.monotonic() + timeout
        while READY not in self.log:
            if self._process.poll() is not None:
                raise RuntimeError(f"the worker ended with exit code {self._process.returncode}:\n{self.log[-4000:]}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"the worker was not ready after {timeout:g} s:\n{self.log[-4000:]}")
            time.sleep(0.05)


@contextmanager
def real_worker(
    app: AmqTask,
    name: str,
    *,
    settings: SettingValues | None = None,
    pool: str = "prefork",
    concurrency: int = 1,
    queues: Sequence[str] = (),
    folder: Path | None = None,
    timeout: float = 30.0,
) -> Iterator[RealWorker]:
    """A worker of the application that is called `name` after -A, in a process of its own, on the application's broker.

    Both sides have `settings` meanwhile. Without `queues` a new queue takes the place of the default one; it is deleted at
    the end. `timeout` is seconds to become ready, and again to end; `folder` is where the worker is started.
    Raises: BackendNotConfigured, ConfigurationError (also for settings that Python's repr does not carry over), RuntimeError.
    """
    unique_name = f"amqtask-test-{uuid.uuid4().hex[:12]}"
    shared = {**({} if queues else {"task_default_queue": unique_name}), **(settings or {})}
    scratch = Path(tempfile.mkdtemp(prefix="amqtask-test-"))
    module = unique_name.replace("-", "_")
    (scratch / f"{module}.py").write_text(_source(shared))
    consumed = tuple(queues or (unique_name,))
    with app.conf.overridden(shared), replaced(app), (scratch / "log").open("ab") as output:
        _check(app)
        command = [sys.executable, "-m", "amqtask", "-A", name, "--config", module, "worker", "-l", "INFO"]
        process = subprocess.Popen(
            [*command, "-P", pool, "-c", str(concurrency), "-Q", ",".join(consumed), "-n", f"{unique_name}@%h"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(scratch), *filter(None, sys.path)])},
            stdout=output,
            stderr=output,
        )
        worker = RealWorker(app, process, consumed, scratch / "log")
        try:
            worker.wait_until_ready(timeout)
            yield worker
            worker.stop(timeout)
        finally:
            worker.kill()
            if not queues:
                _delete(app, unique_name)
            app.close()
            shutil.rmtree(scratch)


def _check(app: AmqTask) -> None:
    if not app.broker.is_shared:
        raise ConfigurationError("a worker process needs RabbitMQ or Redis, and this application's broker is memory://")
    if not app.backend_url:
        raise BackendNotConfigured(
            "tests read results, and this application keeps none: set result_backend, or AMQTASK_RESULT_BACKEND=rpc://"
        )


def _source(settings: SettingValues) -> str:
    """The source of a module with these settings."""
    for name, value in settings.items():
        try:
            is_plain = ast.literal_eval(repr(value)) == value
        except (ValueError, SyntaxError):
            is_plain = False
        if not is_plain:
            raise ConfigurationError(
                f"setting {name} cannot be handed to a worker process: {value!r} is not a plain value"
            )
    return "".join(f"{name} = {value!r}\n" for name, value in settings.items())


def _delete(app: AmqTask, queue: str) -> None:
    with app.broker.queue_jobs() as admin:
        for name in (queue, f"{queue}{app.conf.task_dead_letter_suffix}"):
            admin.delete(name)
