"""Control messages: Celery's commands and replies (kombu/pidbox.py), their exchanges and mailboxes."""

from __future__ import annotations

import fnmatch
import re
import sys
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from amqtask.exceptions import Undecodable
from amqtask.ground.plugins import load
from amqtask.ground.printable import described, printable
from amqtask.protocol.entities import Exchange, Queue, arguments
from amqtask.protocol.message import Message, Properties
from amqtask.protocol.serialization import YAML, check_size, dumps, loads
from amqtask.protocol.task import light_limit

if TYPE_CHECKING:
    from amqtask.ground.shapes import CommandArguments, HeaderDict, Headers, JsonObject

# The parser of re; Python 3.11 moved it.
re_parser = load("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
Expected = TypeVar("Expected")

PREFIX = "celery"  # the setting control_exchange
# Arguments of a revoke that cancels: it asks what runs to end; it is for all that belongs to the tasks, too.
CANCEL, TREE = "cancel", "tree"
# Bytes of a command's body (of one in YAML fewer: it is read on a worker's loop), and characters of a pattern.
LARGEST_COMMAND = 16 * 1024 * 1024
LONGEST_PATTERN = 200
# The most ways that a regular expression may try to match a name; more take longer than a worker's loop may stand still.
_MOST_TRIES = 10**7
# Characters of the longest node name, for that estimate.
_NAME = 128


class Command(NamedTuple):
    """A command to workers. `destination` None: all of them, or those that `pattern` fits (`matcher` glob or pcre).

    With a `ticket` each addressed worker replies to `reply_exchange` under `reply_key`. `expires` is the Unix time until which
    the caller waits. Workers obey later commands too, as Celery's do: another host's clock may be wrong, and a revoke without a
    waiting caller has the same header.
    """

    method: str
    arguments: CommandArguments = MappingProxyType({})
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
        """Whether the command is addressed to this node. A destination wins over a pattern, as in Celery."""
        if self.destination is not None:
            return nodename in self.destination
        if self.pattern:
            return re.match(_rule(self.pattern, self.matcher), nodename) is not None
        return True


class Reply(NamedTuple):
    """One node's answer: `{"ok": …}`, `{"error": …}`, or a command's own payload."""

    nodename: str
    payload: object
    ticket: str | None


def control_exchange(prefix: str = PREFIX) -> Exchange:
    """The exchange for commands."""
    return Exchange(f"{prefix}.pidbox", type="fanout", durable=False)


def reply_exchange(prefix: str = PREFIX) -> Exchange:
    """The exchange for replies; the routing key is the caller's own."""
    return Exchange(f"reply.{prefix}.pidbox", type="direct", durable=False)


def mailbox(nodename: str, prefix: str = PREFIX, *, ttl: float = 300.0, expires: float = 10.0) -> Queue:
    """The queue on which a worker gets commands, without acks; a second node of the same name is refused."""
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
    """The message for every worker's mailbox. Raises: EncodeError."""
    body: JsonObject = {
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
    headers: Headers | None,
    accept: frozenset[str],
) -> Command:
    """Read a command. Raises: ContentDisallowed, Undecodable."""
    check_size(body, light_limit(YAML) if content_type == YAML else LARGEST_COMMAND)
    decoded = loads(body, content_type, content_encoding, accept)
    if not isinstance(decoded, dict) or not isinstance(decoded.get("method"), str):
        raise Undecodable("not a control command: no mapping with a `method`")
    try:
        return _command(decoded, headers or {})
    except (TypeError, ValueError, OverflowError, RecursionError, re.error) as error:
        raise Undecodable(
            f"the control command {printable(decoded['method'], 100)!r} is malformed: {printable(str(error), 200)}"
        ) from error


def _command(decoded: JsonObject, headers: Headers) -> Command:
    reply_to = _of_type(dict, decoded, "reply_to") or {}
    arguments = _of_type(dict, decoded, "arguments") or {}
    if not all(isinstance(name, str) for name in arguments):
        raise TypeError("the names of arguments are texts")
    destination = decoded.get("destination")
    pattern, matcher = _of_type(str, decoded, "pattern"), _of_type(str, decoded, "matcher")
    if pattern:
        check_pattern(pattern, matcher)
    return Command(
        method=decoded["method"],
        arguments=arguments,
        destination=None if destination is None else _names(destination),
        pattern=pattern,
        matcher=matcher,
        ticket=_of_type(str, decoded, "ticket"),
        reply_exchange=_of_type(str, reply_to, "exchange") or "",
        reply_key=_of_type(str, reply_to, "routing_key") or "",
        expires=float(headers.get("expires") or 0.0),
    )


def _of_type(expected_type: type[Expected], mapping: Mapping[str, object], name: str) -> Expected | None:
    value = mapping.get(name)
    if value is not None and not isinstance(value, expected_type):
        raise TypeError(f"`{name}` is {described(value)}")
    return value


def _names(destination: object) -> tuple[str, ...]:
    if isinstance(destination, str):
        return (destination,)
    if isinstance(destination, (list, tuple)) and all(isinstance(name, str) for name in destination):
        return tuple(destination)
    raise TypeError("`destination` is a name, or a list of names")


def check_pattern(pattern: str, matcher: str | None) -> None:
    """Raises: re.error, ValueError for a pattern of node names that must not be matched on a worker's loop.

    A regular expression may take for ever: repetitions must not be nested, and only a few may follow each other.
    """
    if len(pattern) > LONGEST_PATTERN:
        raise ValueError(f"the pattern has {len(pattern)} characters; {LONGEST_PATTERN} at most")
    if matcher == "pcre":
        tries = _tries(re_parser.parse(pattern))
        if tries > _MOST_TRIES:
            raise ValueError(
                "the regular expression has too many repetitions or choices; take a glob, or name the nodes"
            )
    re.compile(_rule(pattern, matcher))  # some faults only the compiler finds


def _rule(pattern: str, matcher: str | None) -> str:
    """The regular expression of a pattern."""
    return pattern if matcher == "pcre" else fnmatch.translate(pattern)


def _tries(items: Iterable[tuple[Any, Any]]) -> int:
    """How many ways there are at most to match the parts of an expression against a name."""
    total = 1
    for opcode, argument in items:
        inner = max((_tries(part) for part in _parts(argument)), default=1)
        if opcode is re_parser.BRANCH:
            inner = sum(_tries(part) for part in argument[1])
        elif opcode in _REPEATS:
            minimum, maximum, _ = argument
            if int(minimum) > _NAME:
                return _MOST_TRIES + 1
            # Empty rounds take time, too.
            round_counts = max(int(minimum), min(int(maximum), _NAME) - int(minimum) + 1)
            # Each round may match in each of the inner ways.
            inner = round_counts if inner == 1 else _MOST_TRIES + 1 if maximum > 1 else round_counts * inner
        total = min(total * inner, _MOST_TRIES + 1)
    return total


_REPEATS = (re_parser.MAX_REPEAT, re_parser.MIN_REPEAT)


def _parts(argument: object) -> list[Any]:
    """The expressions within the argument of an opcode, however it holds them."""
    if isinstance(argument, re_parser.SubPattern):
        return [argument]
    if isinstance(argument, (tuple, list)):
        return [part for element in argument for part in _parts(element)]
    return []


def reply_message(
    command: Command, nodename: str, payload: object, *, serializer: str = "json", clock: int = 0
) -> Message:
    """This node's answer to a command that asks for one. Raises: EncodeError."""
    message = _transient({nodename: payload}, serializer, {"ticket": command.ticket, "clock": clock})
    message.exchange, message.routing_key = command.reply_exchange, command.reply_key
    return message


def read_reply(
    body: bytes,
    content_type: str | None,
    content_encoding: str | None,
    headers: Headers | None,
    accept: frozenset[str],
) -> Reply:
    """Read a reply. Raises: ContentDisallowed, Undecodable."""
    check_size(body, light_limit(YAML) if content_type == YAML else LARGEST_COMMAND)
    decoded = loads(body, content_type, content_encoding, accept)
    if not isinstance(decoded, dict) or len(decoded) != 1:
        raise Undecodable("not a reply: no mapping of one node name")
    ((nodename, payload),) = decoded.items()
    if not isinstance(nodename, str):
        raise Undecodable("not a reply: the name of its node is not text")
    return Reply(nodename, payload, (headers or {}).get("ticket"))


def _transient(body: object, serializer: str, headers: HeaderDict) -> Message:
    # Not mandatory: there may be no consumer (any more), and that is no error.
    encoded = dumps(body, serializer)
    properties = Properties(
        content_type=encoded.content_type,
        content_encoding=encoded.content_encoding,
        headers=headers,
        delivery_mode=1,
    )
    return Message(encoded.body, properties, mandatory=False)
