"""What a task's message tells of where it comes from and where it leads: the group that it is a member of, the group whose
results it gets, what follows; the periodic task that it is a run of.

That is for history only (task_history): ids and names of tasks, no arguments. What follows is in the body, which is read for it
when it may hold something, is JSON, and is not larger than what history keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from amqtask.exceptions import MessageError
from amqtask.protocol.chord import CHORD_HEADER, SIZE, read_mark
from amqtask.protocol.event import LARGEST_KEPT
from amqtask.protocol.serialization import JSON, loads
from amqtask.protocol.task import PERIODIC

if TYPE_CHECKING:
    from amqtask.ground.shapes import EventDict, Headers, JsonObject
    from amqtask.protocol.message import Message

# Tasks that follow, of one task, that are told: each step of a long chain tells of the rest.
MOST_FOLLOWING = 20
# How a body ends that nothing follows: as JSON writes it (ours and Celery's).
_NOTHING = b'"chain": null, "chord": null}]'
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
    if content_type != JSON or len(body) > LARGEST_KEPT or (body.endswith(_NOTHING) and _NO_CALLBACKS in body[-300:]):
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
