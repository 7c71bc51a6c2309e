"""`amqtask top`: the console's first page, live in a terminal."""

from __future__ import annotations

import signal
import sys

import click

from amqtask.cli.base import Globals, signals_to
from amqtask.cli.broker import load_shared
from amqtask.exceptions import ConfigurationError
from amqtask.ground.plugins import load


@click.command("top")
@click.option(
    "-n", "--interval", type=click.FloatRange(min=0.2), default=2.0, show_default=True, help="Seconds between looks."
)
@click.option(
    "--hours", type=click.IntRange(1, 168), default=1, show_default=True, help="Of how many hours; keys change it."
)
@click.pass_obj
def command(settings: Globals, interval: float, hours: int) -> int:
    """What happened in the last hours, queues and workers, live, until q.

    It reads the index that `amqtask history` or the console fills (history_url), and asks the broker for its queues.
    """
    try:
        screen = load("amqtask.cli.top_screen")
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"top needs {error.name}: pip install 'amqtask[tui]'") from error
    with load_shared(settings) as app:
        if not sys.stdout.isatty():
            raise ConfigurationError("top wants a terminal; `amqtask tasks`, `queues` and `workers` print, also --json")
        # A screen without its terminal shows nobody anything: it ends with it, also when nohup or a supervisor began it.
        with signals_to(signal.SIG_DFL, signal.SIGHUP):
            screen.Top(app, interval=interval, hours=hours).run()
    return 0
