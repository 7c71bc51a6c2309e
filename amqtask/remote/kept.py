"""What the broker keeps for workers and beats that start later: what is paused (queues, periodic tasks), and what was revoked."""

from __future__ import annotations

import json
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, NamedTuple

from amqtask.exceptions import AccessRefused, OperationalError, PublishError
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.control import Command, command_message, read_command
from amqtask.topology.declarations import base_of

if TYPE_CHECKING:
    from amqtask.ground.shapes import CommandArguments, JsonObject, KeywordDict
    from amqtask.protocol.message import Delivery, Message
    from amqtask.transport.contract import Journal, JournalTail, Note

logger = bounded_logger("amqtask.control")

# -- Paused queues, and paused periodic tasks: what no worker is to consume, or no beat to send, kept by the broker until somebody
# resumes it.
#
# All of it is one document, the broker's note `amqtask.config`. Whoever changes it reads it again afterwards, and changes it once
# more if somebody else's change came in between, so that two people who pause two queues at once have paused both.

NOTE = "amqtask.config"
# Where in the document the queues are.
QUEUES = "paused"
_ATTEMPTS = 5
# The latest time of a pause (Unix time).
_LATEST = 1e10


class NotOurs(OperationalError):
    """Somebody else has written the note."""


class Pause(NamedTuple):
    """A queue (or a periodic task) that is paused: since when (Unix time), and by whom."""

    queue: str
    since: float
    by: str

    @property
    def began(self) -> datetime:
        """Since when."""
        return datetime.fromtimestamp(self.since, timezone.utc)


def here() -> str:
    """Who does something: user@host."""
    import getpass

    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        user = "somebody"
    return f"{user}@{socket.gethostname()}"


def of_beat(leader: str) -> str:
    """The section of the periodic tasks that the beats with this leaders' queue send."""
    return f"paused in {leader}"


class Pauses:
    """Reads and changes what is paused in the virtual host: queues, or those of another section of the document.

    Each method raises OperationalError, and NotOurs."""

    def __init__(self, note: Note, *, section: str = QUEUES) -> None:
        self._note = note
        self._section = section

    def read(self) -> dict[str, Pause]:
        """What is paused, by name."""
        return _pauses(self._document().get(self._section) or {})

    def pause(self, queue: str, by: str | None = None) -> bool:
        """Have no worker consume the queue (no beat send the task). False: it was paused already."""
        pause = Pause(queue, time.time(), by or here())
        return self._change(lambda paused: {**paused, queue: pause._asdict()} if queue not in paused else None)

    def resume(self, queue: str) -> bool:
        """Go on with it. False: it was not paused."""
        return self._change(
            lambda paused: {name: entry for name, entry in paused.items() if name != queue} if queue in paused else None
        )

    def _change(self, changed: Callable[[JsonObject], JsonObject | None]) -> bool:
        has_changed = False
        for _ in range(_ATTEMPTS):
            document = self._document()
            after = changed(document.get(self._section) or {})
            if after is None:
                return has_changed
            self._note.write(json.dumps({**document, self._section: after}))
            has_changed = True
        raise OperationalError(f"the note {NOTE} was changed by others {_ATTEMPTS} times; try again")

    def _document(self) -> JsonObject:
        written = self._note.read()
        if written is None:
            return {}
        try:
            document = json.loads(written)
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict) or not isinstance(document.get(self._section, {}), dict):
            raise NotOurs(f"{NOTE} on the broker is not what amqtask writes there; delete it and pause again")
        return document


def pause_of(paused: Mapping[str, Pause], queue: str) -> Pause | None:
    """The pause of a queue, of these; a shard is paused with its queue."""
    return paused.get(queue) or paused.get(base_of(queue))


def _pauses(entries: JsonObject) -> dict[str, Pause]:
    return {
        name: Pause(name, _moment(entry.get("since")), str(entry.get("by") or ""))
        for name, entry in entries.items()
        if isinstance(entry, dict)
    }


def _moment(since: object) -> float:
    """A Unix time that the calendar has."""
    return float(since) if isinstance(since, (int, float)) and 0 <= since < _LATEST else 0.0


# -- Revokes: a journal that each worker reads to its end when it starts, and then as it grows.
#
# An entry is an order of remote control, in the form in which workers hear it (amqtask.protocol.control), with two arguments
# more: `kept`, which tells workers that hear the order that nobody needs to write it down, and `at`, when it was given.

JOURNAL = "amqtask.cancel"
# The orders that are kept.
ORDERS = frozenset({"revoke", "terminate", "revoke_by_stamped_headers"})
KEPT, AT = "kept", "at"
# An entry that tells its writer that it has read all that was written before.
MARK = "mark"
# Arguments of an order that only those who hear it now need.
_NOT_KEPT = frozenset({"terminate", "signal"})


class KeptRevokes:
    """Writes and reads them. `accept` are the content types that may be read."""

    def __init__(
        self,
        journal: Journal,
        *,
        serializer: str,
        accept: frozenset[str],
    ) -> None:
        self._journal = journal
        self._serializer = serializer
        self._accept = accept
        self._has_warned = False

    def keep(self, order: str, arguments: CommandArguments) -> bool:
        """Write an order down. False: this broker takes none, which is logged once. Raises: PublishError."""
        kept = {name: value for name, value in arguments.items() if name not in _NOT_KEPT}
        try:
            self._journal.write(
                self._entry("revoke" if order == "terminate" else order, {**kept, KEPT: True, AT: time.time()})
            )
        except PublishError as error:
            if not is_refused(error):
                raise
            self.tell_refused("a revoke is not kept from here, but by workers of ours that hear it", error)
            return False
        return True

    def mark(self, tail: JournalTail) -> str:
        """Write an entry that this reader finds after all that were written before. Its name. Raises: OperationalError."""
        name = str(uuid.uuid4())
        tail.write(self._entry(MARK, {"name": name}))
        return name

    def _entry(self, order: str, arguments: KeywordDict) -> Message:
        return command_message(Command(order, arguments), serializer=self._serializer)

    def tail(self, position: object = None) -> JournalTail:
        """Reads the entries after a position: `x-stream-offset` of a delivery, or None: of all that may still matter."""
        return self._journal.tail(position)

    def read(self, delivery: Delivery) -> Command:
        """The order. Raises: MessageError."""
        return read_command(*delivery.content, self._accept)

    def tell_refused(self, consequence: str, error: OperationalError) -> None:
        """Log it, once."""
        if not self._has_warned:
            self._has_warned = True
            logger.warning("%s: %s", consequence, error)


def is_refused(error: OperationalError) -> bool:
    """Whether it is of no use to try again soon: no right, or no streams."""
    return isinstance(error, AccessRefused) or type(error) in (PublishError, OperationalError)
