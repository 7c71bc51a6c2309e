"""How many of a worker's slots a queue may take, as command line and settings say it: `2`, `2+`, `1-4`."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from typing import NamedTuple

from amqtask.exceptions import ConfigurationError

_FORM = r"(?a)(?P<first>\d+)(?P<rest>\+|-(?P<most>\d+))?"
WANTED = "2 (at most 2 slots), 2+ (2 are kept free for it, and it may take more) or 1-4 (1 is kept free, at most 4)"


class QueueSlots(NamedTuple):
    """`reserved` slots are kept free for a queue; it takes at most `most` (None: as many as are free)."""

    reserved: int = 0
    most: int | None = None

    def __str__(self) -> str:
        if not self.reserved:
            return str(self.most)
        return f"{self.reserved}+" if self.most is None else f"{self.reserved}-{self.most}"


def queue_slots(value: object) -> QueueSlots:
    """What a number or a text like `2+` means. Raises: ValueError."""
    match = re.fullmatch(_FORM, str(value)) if isinstance(value, (int, str)) and not isinstance(value, bool) else None
    if match is None:
        raise ValueError
    first = int(match["first"])
    if match["rest"] is None:
        slots = QueueSlots(most=first)
    else:
        slots = QueueSlots(first, None if match["most"] is None else int(match["most"]))
        if first < 1:
            raise ValueError
    if slots.most is not None and slots.most < max(1, slots.reserved):
        raise ValueError
    return slots


def slots_by_queue(value: object) -> dict[str, str]:
    """The setting `worker_queue_slots`, as texts. Raises: ValueError, TypeError."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise TypeError
    return {name: str(queue_slots(slots)) for name, slots in value.items()}


def asked_slots(name: str, value: object) -> QueueSlots:
    """The slots that somebody asks for a queue. Raises: ConfigurationError, which says what to write."""
    try:
        return queue_slots(value)
    except ValueError:
        raise ConfigurationError(f"the slots of queue {name} are {WANTED}, not {str(value)!r}") from None


def with_slots(text: str, known: Container[str]) -> tuple[str, QueueSlots | None]:
    """The queue and the slots in an item of -Q: `name`, `name:2`, or `name:` for a name that ends like that.

    What is `known` is a name, and so is what has a letter after its last colon. Raises: ConfigurationError.
    """
    name, _, after = text.rpartition(":")
    if not name or text in known or after[:1].isalpha() or after[:1] == "_":
        return text, None
    if not after:
        return name, None
    try:
        return name, queue_slots(after)
    except ValueError:
        raise ConfigurationError(
            f"-Q {text}: after the colon comes {WANTED}. If all of it is the queue's name, write {text}:"
        ) from None
