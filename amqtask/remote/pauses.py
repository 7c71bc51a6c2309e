"""Paused queues, and paused periodic tasks: what no worker is to consume, or no beat to send, kept by the broker until somebody
resumes it.

All of it is one document, the broker's note `amqtask.config`. Whoever changes it reads it again afterwards, and changes it once
more if somebody else's change came in between, so that two people who pause two queues at once have paused both.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, NamedTuple

from amqtask.exceptions import OperationalError
from amqtask.ground.printable import bounded_logger
from amqtask.topology.declarations import base_of

if TYPE_CHECKING:
    from amqtask.ground.shapes import JsonObject
    from amqtask.transport.contract import Note

logger = bounded_logger("amqtask.control")

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
