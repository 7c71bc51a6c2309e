"""The delay queues of earlier versions, in which messages may wait for weeks after an update.

A broker that has them forwards their messages by itself: each queue, `<prefix>.<level>.<digit>`, dead-letters to the exchange
`<prefix>.<level - 1>`, the last one to `<prefix>.out`, which later versions use too. Nothing publishes to them any more; this
module finds the messages that still wait: digits of base 16, units of 125 ms, a queue for each priority but 0 (`.p<priority>`,
`.pnone`), and from level 2 on four lanes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from amqtask.ground.shapes import Headers

UNIT_MS = 125
LEVELS = 6
LANES = 4
_FIRST_LEVEL_WITH_LANES = 2


def queue_names(prefix: str, priorities: Iterable[int | None]) -> Iterator[tuple[int, str]]:
    """(level, queue) of the queues in which messages of these priorities may wait, the longest waits first."""
    classes = dict.fromkeys(priorities)
    for level in reversed(range(LEVELS)):
        lanes = [f".{lane}" for lane in range(LANES)] if level >= _FIRST_LEVEL_WITH_LANES else [""]
        for digit in reversed(range(1, 16)):
            for priority in classes:
                of_priority = "" if priority == 0 else f".p{'none' if priority is None else priority}"
                for lane in lanes:
                    yield level, f"{prefix}.{level}.{digit:x}{of_priority}{lane}"


def exchange(prefix: str, level: int) -> str:
    """The exchange of a level."""
    return f"{prefix}.{level}"


def level_of(prefix: str, queue: str) -> int | None:
    """The level whose queue this is; None for another queue."""
    match = re.fullmatch(re.escape(prefix) + r"\.(\d+)\.[0-9a-f](\.p\w+)?(\.\d+)?", queue)
    return int(match[1]) if match else None


def longest_wait(headers: Headers, level: int) -> float:
    """The longest time, in seconds, that a message in a queue of that level still waits, by its headers."""
    digits = {lower: headers.get(f"amqtask-delay-{lower}") for lower in range(level + 1)}
    return sum(
        (int(digit, 16) << (4 * lower)) * UNIT_MS / 1000
        for lower, digit in digits.items()
        if isinstance(digit, str) and re.fullmatch("[0-9a-f]", digit)
    )
