"""Sends events: your own, from producers, tasks and tools; and task-sent events, for calls that the broker has taken, with what
their messages tell of workflows."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from amqtask.exceptions import MessageError
from amqtask.protocol.chord import CHORD_HEADER, SIZE, read_mark
from amqtask.protocol.event import LARGEST_KEPT, event, event_message, events_message, utc_offset
from amqtask.protocol.serialization import JSON, loads
from amqtask.protocol.task import PERIODIC
from amqtask.topology.delays import TO_HEADER

if TYPE_CHECKING:
    from amqtask.ground.shapes import EventDict, EventFields, Headers, JsonObject
    from amqtask.protocol.event import Keeping
    from amqtask.protocol.message import Message

# No clock comes so far by itself, and one day more would not fit into an AMQP header.
NEVER = 1 << 62


class LamportClock:
    """Counts events of this process; never less than the time that another process has sent."""

    __slots__ = ("value",)

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def forward(self) -> int:
        """Count one event of this process; returns its time."""
        self.value += 1
        return self.value

    def adjust(self, other: object) -> int:
        """Count a message of another process with the time `other` (0 if that is no time); returns its time here."""
        heard = other if isinstance(other, int) and other < NEVER else 0
        self.value = max(self.value, heard) + 1
        return self.value


def anonymous_name() -> str:
    """The name of a process that is no worker, `gen1234@host` (celery/utils/nodenames.py)."""
    return f"gen{os.getpid()}@{socket.gethostname()}"


class EventDispatcher:
    """`send(type, **fields)` sends an event; `groups` limits that to events of these groups ("task", "worker", your own)."""

    def __init__(
        self,
        publish: Callable[[Message], object],
        *,
        hostname: str | None = None,
        enabled: bool = True,
        groups: Iterable[str] = (),
        exchange: str,
        serializer: str,
        clock: LamportClock | None = None,
    ) -> None:
        self.hostname = hostname or anonymous_name()
        self.enabled = enabled
        self.groups = set(groups)
        self.clock = clock or LamportClock()
        self._publish = publish
        self._exchange = exchange
        self._serializer = serializer
        self._lock = threading.Lock()

    def send(self, type: str, blind: bool = False, **fields: object) -> None:
        """Publish an event, transient but confirmed; `blind` leaves the logical time out. Raises: PublishError."""
        if self.enabled and (not self.groups or type.partition("-")[0] in self.groups):
            event_fields = self._event(type, fields, blind=blind)
            self._publish(event_message(event_fields, self._exchange, serializer=self._serializer))

    def _event(self, type: str, fields: EventFields, *, blind: bool) -> EventDict:
        with self._lock:
            clock = None if blind else self.clock.forward()
        all_fields = {"timestamp": time.time(), "pid": os.getpid(), "utcoffset": utc_offset(), **fields}
        return event(type, self.hostname, clock=clock, **all_fields)

    def enable(self) -> None:
        """Send from now on."""
        self.enabled = True

    def disable(self) -> None:
        """Make `send` do nothing."""
        self.enabled = False

    def close(self) -> None:
        """Does nothing: it has no connection of its own."""

    def __enter__(self) -> EventDispatcher:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# Events in one message at most.
BATCH = 100


def sent_fields(message: Message) -> EventDict:
    """The fields of a task-sent event (celery/app/amqp.py) for a task message; for a delayed one with its destination."""
    headers = message.properties.headers
    exchange = headers.get(TO_HEADER, message.exchange)
    return {
        "uuid": headers["id"],
        "root_id": headers.get("root_id"),
        "parent_id": headers.get("parent_id"),
        "name": headers["task"],
        "args": headers.get("argsrepr"),
        "kwargs": headers.get("kwargsrepr"),
        "retries": headers.get("retries") or 0,
        "eta": headers.get("eta"),
        "expires": headers.get("expires"),
        # Any exchange but the default one chooses the queues itself.
        "queue": None if exchange else message.routing_key,
        "exchange": exchange,
        "routing_key": message.routing_key,
    }


class SentEvents:
    """Sends events for messages that were published; `publish` must not block for long, nor raise. `keeping`: task_history."""

    def __init__(
        self,
        publish: Callable[[Sequence[Message]], object],
        *,
        exchange: str,
        serializer: str,
        clock: LamportClock,
        keeping: Keeping | None = None,
    ) -> None:
        self._publish = publish
        self._exchange = exchange
        self._serializer = serializer
        self._clock = clock
        self._keeping = keeping

    def sent(self, messages: Sequence[Message]) -> None:
        """The broker has these task messages."""
        hostname, now, offset, pid = anonymous_name(), time.time(), utc_offset(), os.getpid()
        events = [
            event(
                "task-sent",
                hostname,
                timestamp=now,
                clock=self._clock.forward(),
                pid=pid,
                utcoffset=offset,
                **sent_fields(message),
                **({} if self._keeping is None else message_workflow(message)),
            )
            for message in messages
        ]
        if len(events) == 1:
            self._tell([event_message(events[0], self._exchange, serializer=self._serializer)])
        elif events:
            self._tell(
                [
                    events_message(events[start : start + BATCH], self._exchange, serializer=self._serializer)
                    for start in range(0, len(events), BATCH)
                ]
            )

    def _tell(self, messages: list[Message]) -> None:
        keeping = self._keeping
        if keeping is not None and keeping.copies:
            messages += [keeping.copy(message) for message in messages]
        elif keeping is not None:
            for message in messages:
                message.declare = keeping.declare
        self._publish(messages)


# -- What a task's message tells of where it comes from and where it leads: the group that it is a member of, the group whose
# results it gets, what follows; the periodic task that it is a run of.
#
# That is for history only (task_history): ids and names of tasks, no arguments. What follows is in the body, which is read for it
# when it may hold something, is JSON, and is not larger than what history keeps.

# Tasks that follow, of one task, that are told: each step of a long chain tells of the rest.
MOST_FOLLOWING = 20
# How a body ends that nothing follows: as JSON writes it (ours and Celery's).
_NOTHING_FOLLOWS = b'"chain": null, "chord": null}]'
_NO_CALLBACKS = b'{"callbacks": null,'


def workflow_fields(headers: Headers, body: bytes, content_type: str | None, content_encoding: str | None) -> EventDict:
    """Fields for task-sent and task-received: group_id, group_index, joins, follows, periodic; those that the message has."""
    fields: EventDict = {}
    if isinstance(headers.get(PERIODIC), str):
        fields["periodic"] = headers[PERIODIC]
    group = headers.get("group")
    if isinstance(group, str):
        fields["group_id"] = group
        if isinstance(headers.get("group_index"), int):
            fields["group_index"] = headers["group_index"]
    mark = headers.get(CHORD_HEADER)
    if isinstance(mark, str):
        fields["joins"] = read_mark(mark)[0]
    if not headers.get("compression"):
        follows = following(body, content_type, content_encoding)
        if follows:
            fields["follows"] = follows
    return fields


def message_workflow(message: Message) -> EventDict:
    """The same for a message that is published."""
    properties = message.properties
    return workflow_fields(properties.headers, message.body, properties.content_type, properties.content_encoding)


def following(body: bytes, content_type: str | None, content_encoding: str | None) -> list[JsonObject]:
    """What follows a task by the third part of its body: `{"how": chain, chord or link, "id", "task"}`, also `size` of a chord,
    and `{"more": 3}` at the end for those that are not told."""
    if (
        content_type != JSON
        or len(body) > LARGEST_KEPT
        or (body.endswith(_NOTHING_FOLLOWS) and _NO_CALLBACKS in body[-300:])
    ):
        return []
    try:
        document = loads(body, content_type, content_encoding, frozenset((JSON,)))
    except MessageError:
        return []
    embed = document[2] if isinstance(document, list) and len(document) == 3 else None
    if not isinstance(embed, Mapping):
        return []
    entries: list[JsonObject] = []
    for callback in _listed(embed.get("callbacks")):
        _add(entries, "link", callback)
    for step in reversed(_listed(embed.get("chain"))):
        _add(entries, "chain", step)
    _add(entries, "chord", embed.get("chord"))
    omitted = len(entries) - MOST_FOLLOWING
    return [*entries[:MOST_FOLLOWING], {"more": omitted}] if omitted > 0 else entries


def _listed(value: object) -> Sequence[Any]:
    if isinstance(value, (list, tuple)):
        return value
    return [] if value is None else [value]


def _add(entries: list[JsonObject], how: str, signature: object) -> None:
    """Note a signature; of a chain in it, its steps; of a group or a chord, their members' number."""
    if not isinstance(signature, Mapping):
        return
    name, kwargs, options = signature.get("task"), signature.get("kwargs"), signature.get("options")
    kwargs = kwargs if isinstance(kwargs, Mapping) else {}
    options = options if isinstance(options, Mapping) else {}
    if name == "celery.chain":
        for step in _listed(kwargs.get("tasks")):
            _add(entries, how, step)
        return
    entry: JsonObject = {"how": how, "task": str(name), "id": _text(options.get("task_id"))}
    members = kwargs.get("header") if name == "celery.chord" else kwargs.get("tasks")
    if name in ("celery.group", "celery.chord"):
        if isinstance(members, Mapping):  # a header that is a group
            inner = members.get("kwargs")
            members = inner.get("tasks") if isinstance(inner, Mapping) else None
        entry["members"] = len(_listed(members))
    if how == "chord" and isinstance(signature.get(SIZE), int):
        entry["size"] = signature[SIZE]
    entries.append(entry)
    if name == "celery.chord":
        _add(entries, "then", kwargs.get("body"))


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
