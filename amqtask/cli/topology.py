"""`amqtask topology`: the exchanges, queues and bindings of the application: show them, declare them, check them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import click

from amqtask.cli.base import Globals, echo, json_option, print_json
from amqtask.cli.broker import api_option, chosen_queues, load_shared, open_admin, open_api
from amqtask.cli.params import CommaList, queues_option
from amqtask.cli.remote import Unavailable
from amqtask.ground.printable import count
from amqtask.protocol.entities import Binding, Declaration, Exchange, Queue
from amqtask.topology.declarations import all_bindings, dead_letter_queue, too_many
from amqtask.topology.delays import LEVELS, MAX_SECONDS, STEP_SECONDS
from amqtask.transport.declare import entity_name
from amqtask.transport.inventory import IN_ORDER, Finding, by_kind, compare
from amqtask.transport.inventory import check as check_by_amqp
from amqtask.transport.inventory import declare as declare_by_amqp

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.ground.shapes import JsonObject, Replies


def planned(app: AmqTask, names: tuple[str, ...]) -> list[Declaration]:
    """What the chosen queues need, in the order in which it can be declared."""
    entities: dict[Declaration, None] = {}
    for queue in chosen_queues(app, names):
        entities.update(dict.fromkeys(app.queues.declarations(queue)))
    return list(entities)


def planned_delays(app: AmqTask, names: tuple[str, ...]) -> list[Declaration]:
    """What delays and retries to the chosen queues need, in that order; their own exchanges are declared before.

    Nothing where the broker keeps delayed messages in its own way."""
    if app.broker.delayed() is not None:
        return []
    targets = {binding.source.name: None for queue in chosen_queues(app, names) for binding in all_bindings(queue)}
    return list(app.delays.everything(targets))


@click.group("topology")
def topology_command() -> None:
    """Exchanges, queues and bindings of the application: show, declare, or check them on the broker."""


@topology_command.command("show", short_help="Print the plan.")
@queues_option
@click.option(
    "--kubernetes",
    metavar="CLUSTER",
    help="Print objects of RabbitMQ's topology operator for this RabbitmqCluster, to pipe into `kubectl apply -f -`.",
)
@json_option
@click.pass_obj
def show(settings: Globals, queues: tuple[str, ...], kubernetes: str | None, as_json: bool) -> None:
    """Print the plan that follows from the settings. The broker is not asked."""
    app = settings.load()
    entities = planned(app, queues)
    if kubernetes is not None:
        vhost = next((address.vhost for address in app.broker_addresses), None)
        if vhost is None:
            raise click.UsageError(f"--kubernetes prints objects for RabbitMQ, and the broker is {app.broker_name}")
        items = list(kubernetes_objects([*entities, *planned_delays(app, queues)], kubernetes, vhost))
        print_json({"apiVersion": "v1", "kind": "List", "items": items})
        return
    dead = {
        dead_letters.name
        for queue in chosen_queues(app, queues)
        if (dead_letters := dead_letter_queue(queue, app.queue_defaults))
    }
    if as_json:
        delays = as_data(planned_delays(app, queues), (), role="delay")
        print_json({**as_data(entities, dead), "delays": {**_delays(app), **delays}})
    else:
        _print_plan(app, entities, dead, planned_delays(app, queues))


def as_data(entities: Iterable[Declaration], dead: Iterable[str], *, role: str = "work") -> JsonObject:
    """The plan as plain data; `dead` names the dead-letter queues, `role` says what the others are."""
    exchanges, queues, bindings = by_kind(entities)
    return {
        "exchanges": [
            {
                "name": entity.name,
                "type": entity.type,
                "durable": entity.durable,
                "auto_delete": entity.auto_delete,
                "arguments": dict(entity.arguments),
            }
            for entity in exchanges
        ],
        "queues": [
            {
                "name": entity.name,
                "role": "dead-letter" if entity.name in set(dead) else role,
                "durable": entity.durable,
                "exclusive": entity.exclusive,
                "auto_delete": entity.auto_delete,
                "arguments": entity.argument_map,
            }
            for entity in queues
        ],
        "bindings": [
            {
                "source": entity.source.name,
                "destination": entity.destination,
                "destination_type": "exchange" if entity.to_exchange else "queue",
                "routing_key": entity.routing_key,
                "arguments": dict(entity.arguments),
            }
            for entity in bindings
        ],
    }


def kubernetes_objects(entities: Iterable[Declaration], cluster: str, vhost: str) -> Iterator[JsonObject]:
    """Each entity as an object of RabbitMQ's messaging topology operator (rabbitmq.com/v1beta1)."""
    exchanges, queues, bindings = by_kind(entities)
    for queue in queues:
        arguments = queue.argument_map
        queue_type = str(arguments.pop("x-queue-type", "classic"))
        spec = {"name": queue.name, "type": queue_type, "durable": queue.durable, "autoDelete": queue.auto_delete}
        yield _kubernetes("Queue", queue.name, cluster, vhost, spec, arguments)
    for exchange in exchanges:
        if not exchange.name.startswith("amq."):  # the broker's own
            spec = {"name": exchange.name, "type": exchange.type, "durable": exchange.durable}
            spec["autoDelete"] = exchange.auto_delete
            yield _kubernetes("Exchange", exchange.name, cluster, vhost, spec, dict(exchange.arguments))
    for binding in bindings:
        spec = {
            "source": binding.source.name,
            "destination": binding.destination,
            "destinationType": "exchange" if binding.to_exchange else "queue",
            "routingKey": binding.routing_key,
        }
        label = f"{binding.source.name} {binding.destination} {binding.routing_key} {dict(binding.arguments) or ''}"
        yield _kubernetes("Binding", label, cluster, vhost, spec, dict(binding.arguments))


def _kubernetes(
    kind: str, name: str, cluster: str, vhost: str, spec: Mapping[str, object], arguments: Mapping[str, object]
) -> JsonObject:
    # Kubernetes' names have small letters, digits and hyphens, 253 at most; the digest keeps those apart that look alike then.
    readable = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:200]
    digest = hashlib.sha256(f"{vhost} {name}".encode()).hexdigest()[:8]
    return {
        "apiVersion": "rabbitmq.com/v1beta1",
        "kind": kind,
        "metadata": {"name": f"{readable}-{digest}".strip("-")},
        "spec": {
            "vhost": vhost,
            "rabbitmqClusterReference": {"name": cluster},
            **spec,
            **({"arguments": arguments} if arguments else {}),
        },
    }


def _delays(app: AmqTask) -> JsonObject:
    return {
        "prefix": app.delays.prefix,
        "queue_type": app.delays.queue_type,
        "levels": LEVELS,
        "step_seconds": STEP_SECONDS,
        "longest_seconds": MAX_SECONDS,
    }


def _print_plan(app: AmqTask, entities: Sequence[Declaration], dead: set[str], delays: Sequence[Declaration]) -> None:
    exchanges, queues, bindings = by_kind(entities)
    echo("exchanges")
    for exchange in exchanges:
        echo(f"  {exchange.name}  {exchange.type}{_flags(exchange)}")
    if not exchanges:
        echo("  (only the default exchange)")
    echo("queues")
    for queue in queues:
        role = "  dead letters" if queue.name in dead else ""
        echo(f"  {queue.name}{role}{_flags(queue)}")
        for name, value in queue.arguments:
            echo(f"      {name} = {value!r}")
    echo("bindings")
    for binding in bindings:
        arguments = f"  {dict(binding.arguments)}" if binding.arguments else ""
        echo(f"  {binding.source.name} -> {binding.destination}  key={binding.routing_key!r}{arguments}")
    echo("  (and each queue by its own name, through the default exchange)")
    _print_delays(app, delays)


def _print_delays(app: AmqTask, entities: Sequence[Declaration]) -> None:
    exchanges, queues, bindings = by_kind(entities)
    echo(f"delays (at most {MAX_SECONDS / 86400:.0f} days)")
    echo(f"  exchanges  {' '.join(exchange.name for exchange in exchanges)}")
    echo(f"  queues     {app.delays.queue_type}: {' '.join(queue.name for queue in queues)}")
    echo(f"  {count(len(bindings), 'binding')}, which --json shows")
    echo("  the first program that needs one of them makes it; `amqtask topology declare` makes all of them")


def _flags(entity: Queue | Exchange) -> str:
    flags = [] if entity.durable else ["not durable"]
    flags += ["auto-delete"] if entity.auto_delete else []
    flags += ["exclusive"] if isinstance(entity, Queue) and entity.exclusive else []
    return f"  ({', '.join(flags)})" if flags else ""


@topology_command.command("declare", short_help="Make what is missing on the broker.")
@queues_option
@json_option
@click.pass_obj
def declare(settings: Globals, queues: tuple[str, ...], as_json: bool) -> int:
    """Declare the plan on the broker; what exists otherwise is left as it is. Exit code 1 when not all is as planned."""
    app = settings.load()
    with open_admin(app) as admin:
        findings = list(declare_by_amqp(admin, [*planned(app, queues), *planned_delays(app, queues)]))
    return _print_findings(findings, as_json)


@topology_command.command("check", short_help="Name each difference on the broker.")
@queues_option
@api_option
@json_option
@click.pass_obj
def check(settings: Globals, queues: tuple[str, ...], api: str | None, as_json: bool) -> int:
    """Compare the plan with the broker, and name each difference. Exit code 1 when there is any.

    Over AMQP the first differing argument of a queue or exchange is found, and bindings cannot be asked for; with --api all is.
    """
    app = load_shared(settings)
    plan, delays = planned(app, queues), planned_delays(app, queues)
    if api:
        management = open_api(app, api)
        actual = (management.queues(), management.exchanges(), management.bindings())
        findings = [*compare(plan, *actual), *_needed(compare(delays, *actual))]
    else:
        declarations = [entity for entity in delays if not isinstance(entity, Binding)]
        with open_admin(app) as admin:
            findings = [*check_by_amqp(admin, plan), *_needed(check_by_amqp(admin, declarations))]
    warning = too_many(entity for entity in plan if isinstance(entity, Queue))
    if warning:
        echo(f"The plan has {warning}.", err=True)
    return _print_findings(findings, as_json)


def _needed(findings: Iterable[Finding]) -> Iterator[Finding]:
    """Of what delays need; what is missing is made when it is first needed, so it is no difference."""
    return (finding for finding in findings if finding.status != "missing")


def _print_findings(findings: Sequence[Finding], as_json: bool) -> int:
    wrong = [finding for finding in findings if finding.status not in IN_ORDER and not _is_unasked(finding)]
    if as_json:
        print_json([_finding(finding) for finding in findings])
        return 1 if wrong else 0
    for finding in findings:
        if not _is_unasked(finding):
            echo(f"{finding.status:<8} {entity_name(finding.entity)}{': ' if finding.detail else ''}{finding.detail}")
    unasked = sum(map(_is_unasked, findings))
    if unasked:
        echo(f"{count(unasked, 'binding')} not checked: AMQP has no question for it; --api asks the management plugin")
    echo(f"{count(len(wrong), 'difference')}")
    return 1 if wrong else 0


def _is_unasked(finding: Finding) -> bool:
    return finding.status == "unknown" and isinstance(finding.entity, Binding)


def _finding(finding: Finding) -> JsonObject:
    entity = finding.entity
    entity_type = type(entity).__name__.lower()
    name = f"{entity.source.name} -> {entity.destination}" if isinstance(entity, Binding) else entity.name
    return {"kind": entity_type, "name": name, "status": finding.status, "detail": finding.detail}


# -- `amqtask graph`: exchanges, queues and workers as a drawing in DOT (`… | dot -Tsvg`).


@click.group("graph")
def graph_command() -> None:
    """Draw the topology, or who consumes what, in Graphviz' language: amqtask graph topology | dot -Tsvg -o it.svg"""


@graph_command.command("topology", short_help="Exchanges, queues and bindings as planned.")
@queues_option
@click.pass_obj
def topology(settings: Globals, queues: tuple[str, ...]) -> None:
    """Exchanges, queues, bindings and dead-letter ways as the settings have them. The broker is not asked."""
    _print(drawn(planned(settings.load(), queues)))


@graph_command.command("workers", short_help="Workers that answer, and what they consume.")
@click.option("-t", "--timeout", type=float, default=1.0, show_default=True, help="Seconds to wait for replies.")
@click.option("-d", "--destination", type=CommaList(), default=(), help="Only these nodes (celery@host,…).")
@click.pass_obj
def workers(settings: Globals, timeout: float, destination: tuple[str, ...]) -> None:
    """The workers that answer, and the queues and exchanges that each consumes from."""
    with load_shared(settings) as app:
        replies = app.control.inspect(destination=list(destination) or None, timeout=timeout).active_queues()
    if not replies:
        raise Unavailable("No nodes replied within time constraint. Is a worker running on this broker?")
    _print(consuming(replies))


@graph_command.command("bootsteps", hidden=True)
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
