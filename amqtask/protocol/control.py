"""Control messages: Celery's commands and replies (kombu/pidbox.py), their exchanges and mailboxes."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from amqtask.entities import Exchange, Queue, arguments
from amqtask.exceptions import Undecodable
from amqtask.message import Message, Properties
from amqtask.serialization import dumps, loads

PREFIX = "celery"  # the setting control_exchange


@dataclass(frozen=True, slots=True)
class Command:
    """A command to workers. `destination` None: all of them, or those that `pattern` fits (`matcher` glob or pcre).

    With a `ticket` each worker that is meant replies to `reply_exchange` under `reply_key`. `expires` is the Unix time until
    which the caller waits; workers obey later commands too, as Celery's do: another host's clock may be wrong, and it
    says the same of a revoke that nobody waits for.
    """

    method: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    destination: tuple[str, ...] | None = None
    pattern: str | None = None
    matcher: str | None = None
    ticket: str | None = None
    reply_exchange: str = ""
    reply_key: str = ""
    expires: float = 0.0

    @property
    def wants_reply(self) -> bool:
        return self.ticket is not None

    def is_for(self, nodename: str) -> bool:
        """Whether this node is meant. A destination wins over a pattern, as in Celery."""
        if self.destination is not None:
            return nodename in self.destination
        if self.pattern:
            rule = self.pattern if self.matcher == "pcre" else fnmatch.translate(self.pattern)
            return re.match(rule, nodename) is not None
        return True


class Reply(NamedTuple):
    """What one node answered: `{"ok": …}`, `{"error": …}`, or a command's own payload."""

    nodename: str
    payload: Any
    ticket: str | None


def control_exchange(prefix: str = PREFIX) -> Exchange:
    """Where commands are published."""
    return Exchange(f"{prefix}.pidbox", type="fanout", durable=False)


def reply_exchange(prefix: str = PREFIX) -> Exchange:
    """Where replies are published, under the caller's own routing key."""
    return Exchange(f"reply.{prefix}.pidbox", type="direct", durable=False)


def mailbox(nodename: str, prefix: str = PREFIX, *, ttl: float = 300.0, expires: float = 10.0) -> Queue:
    """The queue on which a worker hears commands, without acks; a second node of one name is refused."""
    return _mailbox(f"{nodename}.{prefix}.pidbox", control_exchange(prefix), "", ttl, expires)


def reply_queue(oid: str, prefix: str = PREFIX, *, ttl: float = 300.0, expires: float = 10.0) -> Queue:
    """The queue on which the caller `oid` gets replies."""
    return _mailbox(f"{oid}.reply.{prefix}.pidbox", reply_exchange(prefix), oid, ttl, expires)


def _mailbox(name: str, exchange: Exchange, key: str, ttl: float, expires: float) -> Queue:
    # Celery's flags and times: exclusive, because RabbitMQ 4.3 refuses transient queues that are not.
    return Queue(
        name,
        exchange=exchange,
        routing_key=key,
        durable=False,
        exclusive=True,
        auto_delete=True,
        arguments=arguments({"x-expires": int(expires * 1000), "x-message-ttl": int(ttl * 1000)}),
    )


def command_message(command: Command, prefix: str = PREFIX, *, serializer: str = "json", clock: int = 0) -> Message:
    """The message that tells every worker's mailbox. Raises: EncodeError."""
    body: dict[str, Any] = {
        "method": command.method,
        "arguments": dict(command.arguments),
        "destination": None if command.destination is None else list(command.destination),
        "pattern": command.pattern,
        "matcher": command.matcher,
    }
    if command.wants_reply:
        body["ticket"] = command.ticket
        body["reply_to"] = {
            "exchange": command.reply_exchange or reply_exchange(prefix).name,
            "routing_key": command.reply_key,
        }
    exchange = control_exchange(prefix)
    message = _transient(body, serializer, {"clock": clock, "expires": command.expires})
    message.exchange, message.declare = exchange.name, (exchange,)
    return message


def read_command(
    body: bytes,
    content_type: str | None,
    content_encoding: str | None,
    headers: Mapping[str, Any] | None,
    accept: frozenset[str],
) -> Command:
    """Read a command. Raises: ContentDisallowed, Undecodable."""
    found = loads(body, content_type, content_encoding, accept)
    if not isinstance(found, dict) or not isinstance(found.get("method"), str):
        raise Undecodable("not a control command: no mapping with a `method`")
    try:
        return _command(found, headers or {})
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise Undecodable(f"the control command {found['method']!r} is malformed: {error}") from error


def _command(found: dict[str, Any], headers: Mapping[str, Any]) -> Command:
    reply_to = found.get("reply_to") or {}
    destination, pattern = found.get("destination"), found.get("pattern")
    if pattern and found.get("matcher") == "pcre":
        re.compile(pattern)
    return Command(
        method=found["method"],
        arguments=dict(found.get("arguments") or {}),
        destination=None if destination is None else _names(destination),
        pattern=pattern,
        matcher=found.get("matcher"),
        ticket=found.get("ticket"),
        reply_exchange=reply_to.get("exchange", ""),
        reply_key=reply_to.get("routing_key", ""),
        expires=float(headers.get("expires") or 0.0),
    )


def _names(destination: str | Sequence[str]) -> tuple[str, ...]:
    return (destination,) if isinstance(destination, str) else tuple(destination)


def reply_message(
    command: Command, nodename: str, payload: Any, *, serializer: str = "json", clock: int = 0
) -> Message:
    """This node's answer to a command that wants one. Raises: EncodeError."""
    message = _transient({nodename: payload}, serializer, {"ticket": command.ticket, "clock": clock})
    message.exchange, message.routing_key = command.reply_exchange, command.reply_key
    return message


def read_reply(
    body: bytes,
    content_type: str | None,
    content_encoding: str | None,
    headers: Mapping[str, Any] | None,
    accept: frozenset[str],
) -> Reply:
    """Read a reply. Raises: ContentDisallowed, Undecodable."""
    found = loads(body, content_type, content_encoding, accept)
    if not isinstance(found, dict) or len(found) != 1:
        raise Undecodable("not a reply: no mapping of one node name")
    ((nodename, payload),) = found.items()
    return Reply(nodename, payload, (headers or {}).get("ticket"))


def _transient(body: Any, serializer: str, headers: dict[str, Any]) -> Message:
    # Nobody may be listening (any more), and that is no error.
    encoded = dumps(body, serializer)
    properties = Properties(
        content_type=encoded.content_type,
        content_encoding=encoded.content_encoding,
        headers=headers,
        delivery_mode=1,
    )
    return Message(encoded.body, properties, mandatory=False)
