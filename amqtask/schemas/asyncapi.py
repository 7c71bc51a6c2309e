"""An application as an AsyncAPI 3.0 document: it receives tasks (https://www.asyncapi.com/docs/reference/specification/v3.0.0)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from amqtask.schemas import Contracts, TaskContract

if TYPE_CHECKING:
    from amqtask.ground.shapes import JsonObject
    from amqtask.topology.routes import Route

REFS = "#/components/schemas/"
_TEXT: JsonObject = {"type": "string"}
_TIME: JsonObject = {"type": ["string", "null"], "format": "date-time"}


def asyncapi(title: str, version: str, broker: JsonObject, contracts: Contracts) -> JsonObject:
    """`broker`: `transport`, `hostname`, `port`, `virtual_host` (Broker.info). The schemas must have been read with REFS."""
    channels: dict[str, Any] = {}
    operations: dict[str, Any] = {}
    messages: dict[str, Any] = {}
    for task in contracts.tasks:
        messages[task.name] = _message(task)
        if task.route is None:
            continue  # only its arguments say where it goes
        channel = _key(_address(task.route))
        entry = channels.setdefault(channel, _channel(task.route, str(broker["virtual_host"])))
        entry["messages"][task.name] = {"$ref": f"#/components/messages/{task.name}"}
        operations[_key(task.name)] = {
            "action": "receive",
            "channel": {"$ref": f"#/channels/{channel}"},
            "messages": [{"$ref": f"#/channels/{channel}/messages/{task.name}"}],
        }
    return {
        "asyncapi": "3.0.0",
        "info": {"title": title, "version": version},
        "defaultContentType": "application/json",
        "servers": {
            "broker": {
                "host": f"{broker['hostname']}:{broker['port']}",
                "protocol": broker["transport"],
                **({"pathname": broker["virtual_host"]} if broker["transport"] == "amqp" else {}),
            }
        },
        "channels": channels,
        "operations": operations,
        "components": {"messages": messages, "schemas": _draft_7(contracts.definitions)},
    }


def _address(route: Route) -> str:
    return route.routing_key if not route.exchange else f"{route.exchange}/{route.routing_key}"


def _key(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)


def _channel(route: Route, vhost: str) -> JsonObject:
    if route.exchange:
        exchange = {"name": route.exchange, "durable": True, "vhost": vhost}
        if route.queue is not None and route.queue.exchange is not None:
            exchange["type"] = route.queue.exchange.type
        binding: JsonObject = {"is": "routingKey", "exchange": exchange}
    else:
        binding = {"is": "queue", "queue": {"name": route.routing_key, "durable": True, "vhost": vhost}}
    return {
        "address": route.routing_key,
        "messages": {},
        "bindings": {"amqp": {**binding, "bindingVersion": "0.3.0"}},
    }


def _message(task: TaskContract) -> JsonObject:
    """Celery's protocol version 2, as our producers write it: what has a name goes by its name."""
    headers = {
        "type": "object",
        "properties": {
            "lang": _TEXT,
            "task": {"const": task.name},
            "id": {"type": "string", "format": "uuid"},
            "root_id": _TEXT,
            "parent_id": {"type": ["string", "null"]},
            "group": {"type": ["string", "null"]},
            "retries": {"type": "integer"},
            "eta": _TIME,
            "expires": _TIME,
            "timelimit": {"type": "array", "items": {"type": ["number", "null"]}, "minItems": 2, "maxItems": 2},
            "argsrepr": _TEXT,
            "kwargsrepr": _TEXT,
            "origin": _TEXT,
        },
        "required": ["task", "id"],
    }
    embed = {
        "type": "object",
        "properties": {key: {} for key in ("callbacks", "errbacks", "chain", "chord")},
    }
    return {
        "name": task.name,
        **({"description": task.description} if task.description else {}),
        "contentType": "application/json",
        "headers": headers,
        "payload": {
            "type": "array",
            "items": [_draft_7(task.args_schema), _draft_7(task.kwargs_schema), embed],
            "minItems": 3,
            "maxItems": 3,
        },
        "correlationId": {"location": "$message.header#/id"},
        "bindings": {"amqp": {"contentEncoding": "utf-8", "bindingVersion": "0.3.0"}},
    }


def _draft_7(schema: Any) -> Any:
    """AsyncAPI's schemas are JSON Schema's draft 7, which has tuples under other names than that of 2020."""
    if isinstance(schema, list):
        return [_draft_7(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    written = {key: _draft_7(value) for key, value in schema.items()}
    if "prefixItems" in written:
        if "items" in written:
            written["additionalItems"] = written.pop("items")
        written["items"] = written.pop("prefixItems")
    return written
