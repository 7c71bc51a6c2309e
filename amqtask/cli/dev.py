"""`amqtask dev`: a broker in memory, a worker that reloads, beat and the console, in one command.

The command serves the broker, and watches; the worker and the console are the same command line once more, each with its part in
the environment. So they find the application as it does, also where Django or Flask runs the command line.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from amqtask.cli import daemon, handover
from amqtask.cli.base import Globals, echo
from amqtask.exceptions import ConfigurationError
from amqtask.ground.plugins import load
from amqtask.ground.processes import signal_at_parents_end
from amqtask.ground.startup import DEV_PART
from amqtask.transport.url import DEV_HOST as HOST
from amqtask.transport.url import DEV_PORT as PORT

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.cli.reload import Reloader

# In the environment of the parts: the broker's port, a folder for files that nobody needs afterwards, and the socket on which the
# console listens.
_PORT, _FOLDER, _LISTENER = "_AMQTASK_DEV_PORT", "_AMQTASK_DEV_FOLDER", "_AMQTASK_DEV_LISTENER"
_WORKER, _CONSOLE = "worker", "console"
_CONSOLE_NEEDS = ("uvicorn", "starlette", "jinja2", "sqlalchemy")
# Seconds after a change before the console is replaced: until then it takes no processor from the worker. Seconds that it has to
# end; one that has ended sooner than that would end as soon again.
_CONSOLE_SECONDS, _CONSOLE_PATIENCE = 1.0, 3.0
_HERE = ("127.0.0.1", "localhost", "::1")


@click.command("dev", context_settings={"ignore_unknown_options": True})
@click.option("--port", type=click.IntRange(1, 65535), default=PORT, show_default=True, help="Port of the broker.")
@click.option(
    "--console-port", type=click.IntRange(1, 65535), default=5556, show_default=True, help="Port of the console."
)
@click.option("--no-console", is_flag=True, help="Without the console.")
@click.option("--no-beat", is_flag=True, help="Without periodic tasks.")
@click.argument("worker_options", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def command(
    settings: Globals, port: int, console_port: int, no_console: bool, no_beat: bool, worker_options: tuple[str, ...]
) -> int:
    """Develop without a broker: `amqtask -A proj dev`. Serves one in memory, runs a worker that reloads, beat and the console.

    All other options are the worker's: `amqtask -A proj dev -P threads -c 2 -Q reports`.
    """
    part = os.environ.get(DEV_PART)
    if part == _WORKER:
        return _run_worker(settings, worker_options, has_beat=not no_beat)
    if part == _CONSOLE:
        return _run_console(settings, console_port)
    if settings.broker:
        raise click.UsageError("dev serves a broker of its own; for another one: amqtask -b URL worker --reload -B")
    return _serve(settings, port, None if no_console else console_port)


def _serve(settings: Globals, port: int, console_port: int | None) -> int:
    """The broker, while the parts run. Raises: ConfigurationError."""
    reload, memory = load("amqtask.cli.reload"), load("amqtask.transport.memory.server")
    with tempfile.TemporaryDirectory(prefix="amqtask-dev-") as folder:
        environment = {_PORT: str(port), _FOLDER: folder}
        console = _Console(settings.started_in, environment)
        reloader = reload.Reloader(
            daemon.this_command(),
            folder=settings.started_in,
            watched=[Path.cwd()],
            patterns=["*.py"],
            patience=reload.PATIENCE_SECONDS,
            stands_by=settings.loaded is None,
            environment={**environment, DEV_PART: _WORKER},
            on_start=console.start,
        )
        try:
            server = memory.MemoryServer(HOST, port)
        except OSError as error:
            raise ConfigurationError(
                f"the broker cannot be served on {HOST}:{port}: {os.strerror(error.errno or 0)}. Is RabbitMQ there, or another "
                "`amqtask dev`? Use that RabbitMQ (amqtask worker --reload -B), or another port (--port 5673, and dev://:5673 as "
                "broker URL)"
            ) from error
        server.start()
        echo(
            f"dev: the broker is {server.url}, in memory: messages survive reloads, and end with this command.",
            err=True,
        )
        try:
            console.listen(console_port)
            code: int = reloader.run()
        finally:
            console.stop()
            server.stop()
    return code


class _Console:
    """The console, which begins when the application is known to be importable. It is replaced after each change, for it shows
    what the code says of queues and periodic tasks; one that has ended otherwise is started again. Who asks meanwhile waits: this
    process has the socket that it listens on."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder, self._environment = folder, environment
        self._listener: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._is_outdated = False

    def listen(self, port: int | None) -> None:
        """Take the port, or say why there is no console. None: none is wanted."""
        missing = [name for name in _CONSOLE_NEEDS if importlib.util.find_spec(name) is None]
        if missing and port is not None:
            echo("dev: no console, for it is not installed: pip install 'amqtask[console]'", err=True)
        elif port is not None:
            try:
                self._listener = socket.create_server((HOST, port))
            except OSError as error:
                reason = os.strerror(error.errno or 0)
                echo(f"dev: no console on {HOST}:{port}: {reason}. Another port is --console-port", err=True)

    def start(self, reloader: Reloader) -> None:
        """Start it, or replace it when the worker has begun and nothing else has changed."""
        if self._listener is not None:
            first = self._process is None
            reloader.later("console", 0.0 if first else _CONSOLE_SECONDS, lambda: self._replace(reloader))

    def _replace(self, reloader: Reloader) -> None:
        if self._process is None or self._process.poll() is not None:
            self._launch(reloader)
        else:
            self._is_outdated = True
            self._process.terminate()
            reloader.later("console ends", _CONSOLE_PATIENCE, self._process.kill)

    def _launch(self, reloader: Reloader) -> None:
        assert self._listener is not None
        number = self._listener.fileno()
        environment = {**os.environ, **self._environment, DEV_PART: _CONSOLE, _LISTENER: str(number)}
        if self._process is not None:
            environment[handover.REPEATED] = "1"
        process = self._process = subprocess.Popen(
            daemon.this_command(), cwd=self._folder, env=environment, pass_fds=[number]
        )
        self._started_at, self._is_outdated = time.monotonic(), False

        def wait() -> None:
            code = process.wait()
            reloader.post(lambda: self._ended(reloader, process, code))

        threading.Thread(target=wait, name="amqtask dev", daemon=True).start()

    def _ended(self, reloader: Reloader, process: subprocess.Popen[bytes], code: int) -> None:
        if process is not self._process:
            return
        reloader.forget("console ends")
        if self._is_outdated:
            self._launch(reloader)
        elif time.monotonic() - self._started_at < _CONSOLE_PATIENCE:
            echo(
                f"dev: the console has ended with exit code {code}, and is started again after the next change",
                err=True,
            )
        else:
            echo(f"dev: the console has ended with exit code {code}, and is started again", err=True)
            self._launch(reloader)

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        if self._listener is not None:
            self._listener.close()


# -- the parts


def _run_worker(settings: Globals, options: tuple[str, ...], *, has_beat: bool) -> int:
    # Before the process waits for the project to change (Globals.load).
    worker: click.Command = load("amqtask.cli.worker").command
    app = settings.load()
    _connect(app)
    url = str(app.conf.broker_url)
    if url.startswith("dev://") and not handover.is_repeated():
        echo(
            f"dev: the application's own broker is not used. Other programs come here with CELERY_BROKER_URL={url}",
            err=True,
        )
    beat = ("-B", "-s", str(Path(os.environ[_FOLDER]) / "beat")) if has_beat else ()
    # Options that are given twice count as they are given last.
    code: int = worker.main(
        ["-l", "INFO", *beat, *options], prog_name="amqtask worker", standalone_mode=False, obj=settings
    )
    return code


def _run_console(settings: Globals, port: int) -> int:
    signal_at_parents_end(signal.SIGTERM)
    _connect(settings.load())
    console: click.Command = load("amqtask.cli.console").command
    line = ["-p", str(port), "--fd", os.environ[_LISTENER], "-l", "WARNING"]
    code: int = console.main(line, prog_name="amqtask console", standalone_mode=False, obj=settings)
    return code


def _connect(app: AmqTask) -> None:
    """Lead the application to the broker of this command, unless it goes there by itself, and keep what happens to tasks."""
    port = int(os.environ[_PORT])
    app.conf.update(task_history=True, history_url=f"sqlite:///{os.environ[_FOLDER]}/history.sqlite3")
    is_here = any(
        address.host in _HERE and address.port == port and address.tls is None for address in app.broker.addresses
    )
    if not is_here:
        os.environ.pop("CELERY_BROKER_URL", None)  # it would win over the settings
        url = "dev://" if port == PORT else f"dev://:{port}"
        app.conf.update(broker_url=url, broker_read_url=None, broker_write_url=None, broker_use_ssl=None)
