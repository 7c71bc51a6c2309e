"""`amqtask control COMMAND`: change running workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from amqtask.cli.main import Globals
from amqtask.cli.remote import print_replies, remote_options

# command → its arguments, in order, each with its type; a trailing `?` marks an optional one.
ORDERS: dict[str, tuple[tuple[str, Callable[[str], Any]], ...]] = {
    "add_consumer": (("queue", str), ("exchange?", str), ("exchange_type?", str), ("routing_key?", str)),
    "autoscale": (("max?", int), ("min?", int)),
    "cancel_consumer": (("queue", str),),
    "pool_grow": (("n?", int),),
    "pool_shrink": (("n?", int),),
    "rate_limit": (("task_name", str), ("rate_limit", str)),
    "revoke": (("task_id", str),),
    "shutdown": (),
    "terminate": (("signal", str), ("task_id", str)),
    "time_limit": (("task_name", str), ("soft?", float), ("hard?", float)),
}


@click.command("control")
@click.argument("order", type=click.Choice(list(ORDERS)))
@click.argument("values", nargs=-1)
@remote_options
@click.pass_obj
def command(
    settings: Globals,
    order: str,
    values: tuple[str, ...],
    timeout: float,
    destination: tuple[str, ...],
    as_json: bool,
) -> None:
    """Give all workers (or those of --destination) an ORDER with its VALUES."""
    arguments = _arguments(order, values)
    app = settings.load()
    replies = app.control.ask(order, arguments, destination=destination or None, timeout=timeout)
    app.close()
    # A worker that was told to shut down does not answer.
    if order != "shutdown" or replies:
        print_replies(replies, as_json=as_json)


def _arguments(order: str, values: Sequence[str]) -> dict[str, Any]:
    wanted = ORDERS[order]
    least = sum(1 for name, _ in wanted if not name.endswith("?"))
    if not least <= len(values) <= len(wanted):
        usage = " ".join(f"[{name[:-1]}]" if name.endswith("?") else name for name, _ in wanted)
        raise click.UsageError(f"usage: amqtask control {order} {usage}")
    try:
        return {name.rstrip("?"): kind(value) for (name, kind), value in zip(wanted, values, strict=False)}
    except ValueError as error:
        raise click.UsageError(f"{order}: {error}") from error
