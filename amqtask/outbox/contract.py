"""What an outbox is to its application and to its relay; amqtask.contrib.sqlalchemy and amqtask.contrib.django keep it."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, NamedTuple, Protocol, TypeAlias, cast

from amqtask.exceptions import AmqTaskError, ConfigurationError, EncodeError, OperationalError
from amqtask.ground.plugins import load_path, plugins
from amqtask.ground.printable import described
from amqtask.protocol.entities import as_document, changed_fields, from_document
from amqtask.protocol.message import Message, Properties
from amqtask.protocol.task import PUBLISHED_AT, timestamp
from amqtask.topology.delays import DelayPlan
from amqtask.transport.content import encode_properties


class OutboxUnreachable(OperationalError):
    """The outbox's database could not do what it was asked to."""


class NewRow(NamedTuple):
    """One message to be written; `message` and `body` are what `amqtask.outbox.contract` makes of it."""

    task_id: str
    task: str
    message: str
    body: bytes


class StoredRow(NamedTuple):
    """One row that waits; `attempts` is how often publishing it has failed."""

    id: int
    message: str
    body: bytes
    attempts: int


class FailedRow(NamedTuple):
    """A row that stays: why, after how many attempts, and when to try it again."""

    id: int
    error: str
    attempts: int
    retry_at: datetime


class Verdict(NamedTuple):
    """The outcome of a batch. Rows that are in neither list stay as they were."""

    sent: Sequence[int] = ()
    failed: Sequence[FailedRow] = ()


class Waiting(NamedTuple):
    """What waits in an outbox: how much, since when, and how much of it has failed before."""

    rows: int
    oldest: datetime | None
    failing: int


class Failing(NamedTuple):
    """A row that could not be published, for the operator."""

    id: int
    task_id: str
    task: str
    attempts: int
    error: str
    created_at: datetime


Send: TypeAlias = Callable[[Sequence[StoredRow]], Verdict]


class Transaction(Protocol):
    """An open transaction that calls are written in."""

    def write(self, rows: Sequence[NewRow]) -> None:
        """Insert rows, in order. Raises what the database raises: the transaction is the caller's."""

    async def awrite(self, rows: Sequence[NewRow]) -> None:
        """`write` from a coroutine."""


class Store(Protocol):
    """The rows as a relay sees them. All methods may raise OutboxUnreachable; all times are aware and UTC."""

    @property
    def name(self) -> str:
        """Table and database, for logs and reports; without a password."""

    def relay(self, limit: int, now: datetime, send: Send) -> int:
        """Give the first `limit` rows that are due (by id) to `send`, delete what it has sent, note what failed, and
        commit; how many rows there were.

        Where the database can, the rows are locked meanwhile and rows that another relay has locked are passed over. When
        `send` raises, or the process dies, all of them stay.
        """

    def waiting(self) -> Waiting: ...

    def failing(self, limit: int) -> Sequence[Failing]: ...

    def retry_now(self) -> int:
        """Make all rows that have failed due at once; how many."""

    def close(self) -> None:
        """Close connections; they open again when the store is used again."""


class Outbox(Protocol):
    """What `app.outbox` is."""

    def transaction(self) -> Transaction | None:
        """The transaction that is open here (in this thread, task or greenlet); None: calls are published at once."""

    def store(self) -> Store:
        """The store that a relay reads."""


def find_outbox(setting: object, database: str) -> Outbox:
    """True: Django's; `module:name`: that object. Raises: ConfigurationError."""
    if setting is True or setting in ("django", "True", "true", "1"):
        django: Outbox = plugins().django_outbox(database)
        return django
    if not isinstance(setting, str):
        return cast("Outbox", setting)
    try:
        outbox = load_path(setting) if setting.partition(":")[2] else None
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"outbox = {setting!r}: {error}") from error
    if not hasattr(outbox, "transaction"):
        raise ConfigurationError(
            f"outbox = {setting!r} names no outbox: True is Django's, 'proj.db:outbox' an object in a module of yours"
        )
    return cast("Outbox", outbox)


# -- A message as a row of an outbox, and back: the format that a web process writes and a relay reads.
#
# One JSON document says where the message goes and how; the body stands beside it as it is. The document is
# self-contained (a relay needs none of the application's queues or routes) and says its version: `{"v": 1, "exchange",
# "routing_key", "mandatory", "properties": {…}, "declare": […]}`. Names that have their default are left out. What JSON
# has no form for is a table with one name that begins with `$`.
#
# A message with an `eta` is written as it was before it was sent through the delay levels: how long it has to wait is
# worked out when it is published, from the moment in its header.

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
        return timestamp(text)
    except (ValueError, TypeError, AttributeError) as error:
        raise RowUnreadable(f"the row's eta or expires is {text!r}, not a time in ISO 8601") from error


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
