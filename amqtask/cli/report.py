"""`amqtask report`: versions and settings for a bug report."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import TYPE_CHECKING

import click

from amqtask.cli.base import Globals, echo, json_option, print_json
from amqtask.cli.broker import open_admin
from amqtask.ground import VERSION
from amqtask.ground.printable import mask_urls

if TYPE_CHECKING:
    from amqtask.ground.shapes import JsonObject

PACKAGES = ("pika", "aio-pika", "billiard", "click", "eventlet", "gevent", "redis", "celery")


@click.command("report")
@click.option("--server", is_flag=True, help="Ask the broker for its version, too.")
@json_option
@click.pass_obj
def command(settings: Globals, server: bool, as_json: bool) -> None:
    """Print versions, and the application's settings without secrets."""
    app = settings.load()
    report: JsonObject = {
        "amqtask": VERSION,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "broker": app.broker_name,
        "server": None,
        "results": mask_urls(app.backend_url, "**") if app.backend_url else None,
        "settings": dict(sorted(app.conf.table().items())),
        "unknown_settings": app.conf.unknown_names(),
    }
    if server:
        with open_admin(app) as admin:
            report["server"] = admin.server
    if as_json:
        print_json(report)
    else:
        _print(report)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _print(report: JsonObject) -> None:
    echo(f"amqtask {report['amqtask']}, Python {report['python']} on {report['platform']}")
    for name, version in report["packages"].items():
        echo(f"  {name:<10} {version or '-'}")
    server = f" ({report['server']})" if report["server"] else ""
    echo(f"broker {report['broker']}{server}")
    echo(f"results {report['results'] or 'disabled'}")
    for name, value in report["settings"].items():
        echo(f"  {name} = {value!r}{_remark(name, report['unknown_settings'])}")


def _remark(name: str, unknown: dict[str, str | None]) -> str:
    if name not in unknown:
        return ""
    near = unknown[name]
    return f"  (no setting of amqtask's{f'; did you mean {near}?' if near else ''})"
