"""A message as a row of an outbox, and back: the format that a web process writes and a relay reads.

One JSON document says where the message goes and how; the body stands beside it as it is. The document is
self-contained (a relay needs none of the application's queues or routes) and says its version: `{"v": 1, "exchange",
"routing_key", "mandatory", "properties": {…}, "declare": […]}`. Names that have their default are left out. What JSON
has no form for is a table with one name that begins with `$`.

A message with an `eta` is written as it was before it was sent through the delay levels: how long it has to wait is
worked out when it is published, from the moment in its header.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any

from amqtask.exceptions import AmqTaskError, EncodeError
from amqtask.ground.printable import described
from amqtask.outbox.contract import NewRow
from amqtask.protocol.entities import as_document, changed_fields, from_document
from amqtask.protocol.message import Message, Properties
from amqtask.protocol.task import PUBLISHED_AT
from amqtask.topology.delays import DelayPlan
from amqtask.transport.content import encode_properties

VERSION = 1


class RowUnreadable(AmqTaskError):
    """A row that this version of amqtask cannot make a message of."""


def as_row(message: Message, delays: DelayPlan) -> NewRow:
    """The row of a message that would be published now. Raises: EncodeError and PublishError, for what AMQP has no form for: a
    relay would find that out when the transaction is over."""
    message = delays.undelayed(message)
    headers = message.properties.headers
    document = {
        "v": VERSION,
        "exchange": message.exchange,
        "routing_key": message.routing_key,
        "mandatory": message.mandatory,
        "properties": changed_fields(message.properties, Properties()),
        "declare": [as_document(entity) for entity in message.declare],
    }
    text = json.dumps(_plain(document), separators=(",", ":"))
    encode_properties(message)
    task_id = headers.get("id") or message.properties.correlation_id or ""
    return NewRow(str(task_id), str(headers.get("task") or ""), text, bytes(message.body))


def as_message(text: str, body: bytes, delays: DelayPlan, *, now: float | None = None) -> Message:
    """The message to publish at `now` (Unix time), on its way through the delay levels if it is early. Raises: RowUnreadable."""
    now = time.time() if now is None else now
    message = _read(text, body)
    headers = message.properties.headers
    if PUBLISHED_AT in headers:
        headers[PUBLISHED_AT] = int(now * 1000)
    if headers.get("eta"):
        return delays.delayed(message, _moment(headers["eta"]) - now, now=now)
    if message.properties.expiration is not None and headers.get("expires"):
        # The time to live that is left. A message whose time is up goes without one: a worker then reports it as expired.
        milliseconds = int((_moment(headers["expires"]) - now) * 1000)
        message.properties.expiration = str(milliseconds) if milliseconds > 0 else None
    return message


def _read(text: str, body: bytes) -> Message:
    try:
        document = json.loads(text)
        version = document["v"]
        if version != VERSION:
            raise RowUnreadable(
                f"the row has format {version!r}, and this relay reads format {VERSION}: a newer amqtask has written it. "
                "Update the relay's"
            )
        document = _rich(document)
        return Message(
            bytes(body),
            Properties(**{name: _checked(name, value) for name, value in document["properties"].items()}),
            _checked("exchange", document["exchange"]),
            _checked("routing_key", document["routing_key"]),
            tuple(from_document(entity) for entity in document["declare"]),
            mandatory=document["mandatory"] is not False,
        )
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise RowUnreadable(f"the row is not a message: {type(error).__name__}: {error}") from error


_KIND: dict[str, type | tuple[type, ...]] = {
    "headers": dict,
    "delivery_mode": int,
    "priority": int,
    "timestamp": (int, datetime),
}
_NEVER_NONE = frozenset({"headers", "exchange", "routing_key"})


def _checked(name: str, value: object) -> Any:
    """A property, or where the message goes. Raises: TypeError for a value of another kind."""
    if (value is not None or name in _NEVER_NONE) and not isinstance(value, _KIND.get(name, str)):
        raise TypeError(f"{name} is {described(value)}")
    return value


def _moment(text: str) -> float:
    try:
        moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except (ValueError, TypeError, AttributeError) as error:
        raise RowUnreadable(f"the row's eta or expires is {text!r}, not a time in ISO 8601") from error
    return (moment if moment.tzinfo is not None else moment.replace(tzinfo=timezone.utc)).timestamp()


# -- values


def _plain(value: object) -> object:
    """A header value in JSON's types."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Mapping):
        bad_names = [name for name in value if not isinstance(name, str)]
        if bad_names:
            raise EncodeError(f"header names are text, not {bad_names[0]!r}")
        table = {name: _plain(item) for name, item in value.items()}
        return {"$table": table} if any(name.startswith("$") for name in table) else table
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, datetime):
        return {"$time": value.isoformat()}
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {"$bytes": base64.b64encode(bytes(value)).decode()}
    if isinstance(value, Decimal):
        return {"$decimal": str(value)}
    raise EncodeError(
        f"the header value {value!r} cannot be written as AMQP: headers hold text, numbers, dates, lists and tables"
    )


_RICH: dict[str, Callable[[Any], object]] = {
    "$time": datetime.fromisoformat,
    "$bytes": lambda text: base64.b64decode(text, validate=True),
    "$decimal": Decimal,
    "$table": lambda table: {name: _rich(item) for name, item in table.items()},
}


def _rich(value: object) -> Any:
    if isinstance(value, list):
        return [_rich(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((name, item),) = value.items()
        if name.startswith("$"):
            return _RICH[name](item)
    return {name: _rich(item) for name, item in value.items()}
