"""The application's broker and its queues, for commands that look into them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import click

from amqtask.cli.base import echo
from amqtask.exceptions import ConfigurationError
from amqtask.transport.inventory import ManagementApi

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.cli.base import Globals
    from amqtask.protocol.entities import Queue
    from amqtask.topology.routes import Route
    from amqtask.transport.contract import Admin


def refuse_memory(app: AmqTask) -> None:
    """Raises ConfigurationError for an application on `memory://`."""
    if not app.broker.is_shared:
        raise ConfigurationError(
            "the application's broker is memory://, which lives inside each process: there is nothing that this "
            "command could see. Name another one: amqtask -b amqp://user:password@host/vhost …"
        )


def load_shared(settings: Globals) -> AmqTask:
    """The application, which `with` closes. Raises: ConfigurationError for one on `memory://`."""
    app = settings.load()
    refuse_memory(app)
    return app


def open_admin(app: AmqTask) -> Admin:
    """An Admin on the broker, as a context manager. Raises: ConfigurationError for `memory://`."""
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
    address = next(iter(app.broker_addresses), None)
    if address is None:
        raise ConfigurationError(f"--api asks RabbitMQ's management plugin, and the broker is {app.broker_name}")
    return ManagementApi(url, address)


class TaskRoute(NamedTuple):
    """A registered task and where a call without options goes; `route` None when the routes need arguments."""

    task: str
    route: Route | None


def task_routes(app: AmqTask) -> list[TaskRoute]:
    """Where each registered task goes, by name. A route function that fails without arguments is named in a warning."""
    app.load_tasks()
    return [TaskRoute(name, _route(app, name)) for name in app.tasks.own]


def _route(app: AmqTask, name: str) -> Route | None:
    try:
        return app.router.route(name, (), {}, {}, app.tasks[name])
    except ConfigurationError:
        raise
    except Exception as error:  # noqa: BLE001 - the user's route function, which may need the arguments of a call
        echo(f"task_routes: no route for {name} without arguments: {type(error).__name__}: {error}", err=True)
        return None


def known_queues(app: AmqTask) -> list[Queue]:
    """All queues of the application, configured ones first."""
    routed = task_routes(app)
    queues = {queue.name: queue for queue in app.queues.consumed}
    queues |= {route.queue.name: route.queue for _, route in routed if route is not None and route.queue is not None}
    return list(app.queues.with_shards(queues.values()))


def chosen_queues(app: AmqTask, names: tuple[str, ...]) -> list[Queue]:
    """The queues named with -Q, else all that the application knows. Raises: QueueNotFound."""
    return list(app.queues.with_shards(app.queues[name] for name in names)) if names else known_queues(app)
