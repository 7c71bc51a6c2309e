"""`amqtask list`: the application's tasks and where they go; the bindings of its queues."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from amqtask.cli.broker import api_option, known_queues, open_api, task_routes
from amqtask.cli.globals import Globals
from amqtask.cli.output import echo, json_option, print_json, print_table
from amqtask.topology.declarations import all_bindings

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.ground.shapes import JsonObject

# Each worker that consumes a broadcast has a queue of its own, `bcast.<unique>`.
ANY_BROADCAST = "bcast.*"


@click.group("list")
def command() -> None:
    """List tasks, or bindings."""


@command.command("tasks", short_help="Registered tasks, and where they go.")
@json_option
@click.pass_obj
def tasks(settings: Globals, as_json: bool) -> None:
    """The registered tasks, and the queue, exchange and routing key that a call of each goes to."""
    rows: list[JsonObject] = [
        {
            "task": name,
            "queue": route.queue.name if route is not None and route.queue is not None else None,
            "exchange": None if route is None else route.exchange,
            "routing_key": None if route is None else route.routing_key,
        }
        for name, route in task_routes(settings.load())
    ]
    if as_json:
        print_json(rows)
        return
    print_table(
        ["TASK", "QUEUE", "EXCHANGE", "ROUTING KEY"],
        [[row["task"], row["queue"], _exchange(row["exchange"]), row["routing_key"]] for row in rows],
    )


@command.command("bindings", short_help="Queues, exchanges and routing keys.")
@api_option
@json_option
@click.pass_obj
def bindings(settings: Globals, api: str | None, as_json: bool) -> None:
    """Queues, exchanges and routing keys: of the application's plan, or with --api all that the broker has."""
    app = settings.load()
    rows = _bound_on_broker(app, api) if api else list(_planned(app))
    if as_json:
        print_json(rows)
        return
    columns = ("destination", "source", "routing_key")
    cells = [[row["destination"], _exchange(row["source"]), row["routing_key"]] for row in rows]
    print_table([name.replace("_", " ").upper() for name in columns], cells)
    if not api:
        echo("These are planned; --api asks the broker's management plugin what is there.", err=True)


def _planned(app: AmqTask) -> Iterator[JsonObject]:
    for queue in known_queues(app):
        if not queue.broadcast:
            yield _row("", queue.name, "queue", queue.name, {})
        for binding in all_bindings(queue):
            destination_type = "exchange" if binding.to_exchange else "queue"
            to = ANY_BROADCAST if queue.broadcast else binding.destination
            yield _row(binding.source.name, to, destination_type, binding.routing_key, dict(binding.arguments))


def _bound_on_broker(app: AmqTask, api: str) -> list[JsonObject]:
    fields = ("source", "destination", "destination_type", "routing_key", "arguments")
    rows = [_row(*(entry[field] for field in fields)) for entry in open_api(app, api).bindings()]
    return sorted(rows, key=lambda row: (row["destination"], row["source"], row["routing_key"]))


def _row(
    source: str, destination: str, destination_type: str, routing_key: str, arguments: dict[str, object]
) -> JsonObject:
    return {
        "source": source,
        "destination": destination,
        "destination_type": destination_type,
        "routing_key": routing_key,
        "arguments": arguments,
    }


def _exchange(name: str | None) -> str | None:
    return "(default)" if name == "" else name
