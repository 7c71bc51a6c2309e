"""The application's broker, for commands that look into it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from amqtask.exceptions import ConfigurationError
from amqtask.transport.management import ManagementApi

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.transport.admin import QueueAdmin


def refuse_memory(app: AmqTask) -> None:
    """Raises ConfigurationError for an application on `memory://`."""
    if not app.broker.is_shared:
        raise ConfigurationError(
            "the application's broker is memory://, which lives inside each process: there is nothing that this "
            "command could see. Name a RabbitMQ: amqtask -b amqp://user:password@host/vhost …"
        )


def open_admin(app: AmqTask) -> QueueAdmin:
    """A QueueAdmin on the broker, as a context manager. Raises: ConfigurationError for `memory://`."""
    refuse_memory(app)
    return app.broker.admin()


api_option = click.option(
    "--api",
    metavar="URL",
    envvar="AMQTASK_MANAGEMENT_URL",
    help="Management plugin, e.g. http://localhost:15672 [AMQTASK_MANAGEMENT_URL].",
)


def open_api(app: AmqTask, url: str) -> ManagementApi:
    """The management plugin at `url`, for the virtual host of the application's broker."""
    refuse_memory(app)
    return ManagementApi(url, app.broker_addresses[0])
