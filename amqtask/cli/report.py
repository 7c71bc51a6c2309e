"""`amqtask report`: versions and settings for a bug report."""

from __future__ import annotations

import importlib.metadata
import platform

import click

from amqtask import __version__
from amqtask.cli.main import Globals

PACKAGES = ("pika", "aio-pika", "billiard", "click", "eventlet", "gevent", "redis", "celery")


@click.command("report")
@click.pass_obj
def command(settings: Globals) -> None:
    """Print versions, and the application's settings without secrets."""
    click.echo(f"amqtask {__version__}, Python {platform.python_version()} on {platform.platform()}")
    for name in PACKAGES:
        try:
            click.echo(f"  {name:<10} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            click.echo(f"  {name:<10} -")
    app = settings.load()
    for address in app.broker_addresses:
        click.echo(f"broker {address.safe_url}")
    for name, value in sorted(app.conf.humanize().items()):
        click.echo(f"  {name} = {value!r}")
