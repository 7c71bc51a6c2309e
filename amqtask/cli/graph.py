"""`amqtask graph`: exchanges, queues and workers as a drawing in DOT (`… | dot -Tsvg`)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import click

from amqtask.cli.broker import refuse_memory
from amqtask.cli.globals import Globals
from amqtask.cli.output import echo
from amqtask.cli.params import CommaList, queues_option
from amqtask.cli.remote_client import Unavailable
from amqtask.cli.topology import planned
from amqtask.protocol.entities import Binding, Declaration, Exchange, Queue

if TYPE_CHECKING:
    from amqtask.ground.shapes import Replies


@click.group("graph")
def command() -> None:
    """Draw the topology, or who consumes what, in Graphviz' language: amqtask graph topology | dot -Tsvg -o it.svg"""


@command.command("topology", short_help="Exchanges, queues and bindings as planned.")
@queues_option
@click.pass_obj
def topology(settings: Globals, queues: tuple[str, ...]) -> None:
    """Exchanges, queues, bindings and dead-letter ways as the settings have them. The broker is not asked."""
    _print(drawn(planned(settings.load(), queues)))


@command.command("workers", short_help="Workers that answer, and what they consume.")
@click.option("-t", "--timeout", type=float, default=1.0, show_default=True, help="Seconds to wait for replies.")
@click.option("-d", "--destination", type=CommaList(), default=(), help="Only these nodes (celery@host,…).")
@click.pass_obj
def workers(settings: Globals, timeout: float, destination: tuple[str, ...]) -> None:
    """The workers that answer, and the queues and exchanges that each consumes from."""
    app = settings.load()
    refuse_memory(app)
    replies = app.control.inspect(destination=list(destination) or None, timeout=timeout).active_queues()
    app.close()
    if not replies:
        raise Unavailable("No nodes replied within time constraint. Is a worker running on this broker?")
    _print(consuming(replies))


@command.command("bootsteps", hidden=True)
def bootsteps() -> None:
    """Celery's command has no meaning here."""
    raise click.ClickException(
        "amqtask's workers have no boot steps that could be drawn. There are `amqtask graph topology` and "
        "`amqtask graph workers`."
    )


def drawn(entities: Iterable[Declaration]) -> Iterator[str]:
    """Nodes and edges of a plan."""
    for entity in entities:
        if isinstance(entity, Exchange):
            yield _exchange(entity.name, entity.type)
        elif isinstance(entity, Queue):
            yield _queue(entity.name, str(entity.argument_map.get("x-queue-type", "")))
            yield from _dead_letters(entity)
        else:
            yield _bound(entity)


def consuming(replies: Mapping[str, Sequence[Replies]]) -> Iterator[str]:
    """Nodes and edges of `active_queues` replies."""
    lines: dict[str, None] = {}
    for node, queues in sorted(replies.items()):
        lines[f"{_name('worker', node)} [label={_text(node)}, shape=component];"] = None
        for queue in queues:
            name, exchange = str(queue["name"]), queue.get("exchange") or {}
            lines[_queue(name, "")] = None
            lines[f"{_name('queue', name)} -> {_name('worker', node)};"] = None
            source = str(exchange.get("name") or "")
            if source:
                exchange_type = str(exchange.get("type") or "")
                lines[_exchange(source, exchange_type)] = None
                # A fanout exchange does not look at it.
                key = "" if exchange_type == "fanout" else str(queue.get("routing_key") or "")
                lines[f"{_name('exchange', source)} -> {_name('queue', name)} [label={_text(key)}];"] = None
    yield from lines


def _print(lines: Iterable[str]) -> None:
    echo("digraph amqtask {")
    echo("  rankdir=LR;")
    for line in lines:
        echo(f"  {line}")
    echo("}")


def _exchange(name: str, exchange_type: str) -> str:
    return f"{_name('exchange', name)} [label={_label(name, exchange_type)}, shape=ellipse];"


def _queue(name: str, queue_type: str) -> str:
    return f"{_name('queue', name)} [label={_label(name, queue_type)}, shape=box];"


def _bound(binding: Binding) -> str:
    node_type = "exchange" if binding.to_exchange else "queue"
    label = _label(binding.routing_key, *(f"{name}={value}" for name, value in binding.arguments))
    return f"{_name('exchange', binding.source.name)} -> {_name(node_type, binding.destination)} [label={label}];"


def _dead_letters(queue: Queue) -> Iterator[str]:
    arguments = queue.argument_map
    exchange = arguments.get("x-dead-letter-exchange")
    key = str(arguments.get("x-dead-letter-routing-key") or queue.name)
    if exchange is not None:
        target = _name("exchange", str(exchange)) if exchange else _name("queue", key)
        yield f"{_name('queue', queue.name)} -> {target} [style=dashed, label=dead];"


def _label(*lines: str) -> str:
    return _text("\n".join(filter(None, lines)))


def _name(node_type: str, name: str) -> str:
    """The node's name in DOT, with its type: exchanges, queues and workers may share a name."""
    return _text(f"{node_type} {name}")


def _text(text: str) -> str:
    """A quoted string; DOT's escapes are those of JSON that can occur here."""
    return json.dumps(text, ensure_ascii=False)
