"""The parts of a chord that is joined in the broker: one durable queue per chord, one message per ended member of its header.

Celery has no chords without a result store that can count; this format is ours. A part is a result message (protocol.result)
whose header `group_index` says which member it is; `more` is how many members a task has added to the chord (`add_to_chord`).
A member that ran twice has two parts with one task id, of which one counts.

Only members of a chord can send parts: its queue's name ends in a token that is only in the bodies of its members' messages. A
group's id, which is also in headers, events and results, is not enough.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from amqtask import states
from amqtask.exceptions import ChordError, InvalidTaskError
from amqtask.protocol.entities import Queue, arguments
from amqtask.protocol.message import Message, Properties
from amqtask.protocol.result import ResultMessage, decode_result, encode_result, exception_from_dict
from amqtask.protocol.task import saferepr

if TYPE_CHECKING:
    from amqtask.ground.shapes import JsonFields, JsonObject, SignatureFields

# On the message of a chord's body: the group whose parts can be deleted once the body has run.
CHORD_HEADER = "x-amqtask-chord"
# A chord's queue that is unused for so many seconds (a week) is deleted.
EXPIRES_SECONDS = 7 * 86400.0
# Members of a header at most.
LARGEST = 10_000_000
_LAST = float("inf")


# The keys of a chord's size and token in the signature of its body; Celery's workers pass them on untouched.
SIZE, TOKEN = "chord_size", "chord_token"


def chord_queue(group_id: str, token: str = "", expires: float | None = None) -> Queue:
    """The queue for the parts of a chord; it is deleted `expires` seconds (default a week) after the last part.

    Classic: there is one short-lived queue per chord, and to start a quorum queue would cost more than the chord itself.
    """
    limit = int((expires or EXPIRES_SECONDS) * 1000)
    queue_arguments = arguments({"x-queue-type": "classic", "x-expires": max(1, limit)})
    return Queue(queue_name(group_id, token), arguments=queue_arguments)


def queue_name(group_id: str, token: str = "") -> str:
    """The name of a chord's queue; without a token, of a chord that an older version of this library has begun."""
    return f"amqtask.chord.{group_id}.{token}" if token else f"amqtask.chord.{group_id}"


def chord_mark(group_id: str, body_id: str) -> str:
    """The value of CHORD_HEADER."""
    return f"{group_id} {body_id}"


def read_mark(mark: str) -> tuple[str, str]:
    """The group's id, and the body's, of a CHORD_HEADER."""
    group_id, _, body_id = mark.rpartition(" ")
    return (group_id, body_id) if group_id else (mark, "")


def new_token() -> str:
    """A token that cannot be guessed. (The module `secrets` would import hmac and hashlib into every process.)"""
    return os.urandom(16).hex()


def token_of(body: SignatureFields) -> str:
    """The token of the chord whose body this is."""
    token = body.get(TOKEN)
    return token if isinstance(token, str) else ""


def size_of(body: SignatureFields) -> int | None:
    """How many members the header was published with; None where the broker does not count them (Celery's database backend).

    Raises: InvalidTaskError."""
    size = body.get(SIZE)
    if size is None:
        return None
    if size.__class__ is not int or not 0 < size <= LARGEST:
        raise InvalidTaskError(f"{SIZE} of a chord is {saferepr(size, 50)}, not a number from 1 to {LARGEST}")
    return int(size)


def without_chord_keys(body: SignatureFields) -> JsonObject:
    """The signature of a chord's body without these two keys."""
    return {key: value for key, value in body.items() if key not in (SIZE, TOKEN)}


class ChordPart(NamedTuple):
    """One ended member of a header: its message, and the data to publish the body once all members have ended.

    `body` is the signature to publish, `size` how many members the header was published with.
    """

    group_id: str
    task_id: str
    size: int
    body: SignatureFields
    message: Message
    # It replaces a part that could not be published.
    is_broken: bool = False

    @property
    def queue(self) -> str:
        """The queue of the chord's parts."""
        return self.message.routing_key


def part_message(queue: str, index: int | None, part: ResultMessage, serializer: str) -> Message:
    """The message of one part. Raises: EncodeError."""
    body, content_type, content_encoding = encode_result(part, serializer)
    properties = Properties(
        content_type=content_type,
        content_encoding=content_encoding,
        headers={"group_index": index},
        correlation_id=part.task_id,
    )
    return Message(body, properties, "", queue)


def more_message(queue: str, task_id: str) -> Message:
    """The message that a member was added to a chord."""
    properties = Properties(content_type="application/octet-stream", headers={"more": task_id}, correlation_id=task_id)
    return Message(b"", properties, "", queue)


class Gathered(NamedTuple):
    """The messages of a chord's queue: parts by task id with their index, and the ids of added members."""

    parts: dict[str, tuple[float, ResultMessage]]
    added: frozenset[str]

    def is_complete(self, size: int) -> bool:
        """Whether every member has ended."""
        return len(self.parts) >= size + len(self.added)

    def in_order(self) -> list[ResultMessage]:
        """The parts in the order of the header."""
        return [part for _, part in sorted(self.parts.values(), key=lambda entry: entry[0])]


def gather(
    messages: Iterable[tuple[bytes, str | None, str | None, JsonFields | None]], accept: frozenset[str]
) -> Gathered:
    """Read messages, each as (body, content type, content encoding, headers). Raises: ContentDisallowed, Undecodable."""
    parts: dict[str, tuple[float, ResultMessage]] = {}
    added: set[str] = set()
    for body, content_type, content_encoding, headers in messages:
        fields = headers or {}
        added_id = fields.get("more")
        if isinstance(added_id, str) and added_id:
            added.add(added_id)
            continue
        part = decode_result(body, content_type, content_encoding, accept)
        index = fields.get("group_index")
        # When a member ran twice, its success counts.
        if part.task_id not in parts or part.status == states.SUCCESS:
            parts[part.task_id] = (index if index.__class__ is int else _LAST, part)
    return Gathered(parts, frozenset(added))


def values_of(parts: Iterable[Any]) -> list[Any]:
    """The results in a chord's parts (lists of parts are lists of results).

    Raises: ChordError for the first that is no success, in Celery's words.
    """
    values = []
    for part in parts:
        if isinstance(part, list):
            values.append(values_of(part))
            continue
        if part.status in states.PROPAGATE_STATES:
            cause = exception_from_dict(part.result, part.traceback)
            raise ChordError(f"Dependency {part.task_id} raised {saferepr(cause, 500)}") from cause
        values.append(part.result)
    return values
