"""Headers that fit: makes the headers of a received message small enough for a copy.

All headers of a message have to go into one frame (AMQP 0-9-1, section 4.2.6.1), which RabbitMQ bounds at 131,072 bytes unless
configured otherwise; for a larger one it closes the connection. So the largest are replaced by a short text until the others
fit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from amqtask.ground.printable import printable
from amqtask.protocol.task import saferepr
from amqtask.transport.fields import field_size

if TYPE_CHECKING:
    from amqtask.ground.shapes import HeaderDict, Headers

# Bytes; leaves room in a frame for the properties, for the headers of a dead letter, and for those that brokers add.
ROOM = 98_304
# The names of headers that were shortened or dropped.
CUT_HEADER = "x-amqtask-cut"
# Characters of the text that replaces a value, and of the list of such headers.
_SHORT, _LISTED = 200, 1000
# These are dropped last.
_FIRST = ("task", "id", "lang", "root_id", "parent_id", "group", "retries", "eta", "expires")


def fitted(headers: Headers) -> HeaderDict:
    """The headers, shortened where they do not fit or cannot be encoded; CUT_HEADER names those that were changed."""
    kept, sizes, cut = dict(headers), {}, []
    for name in sorted(headers, key=lambda name: name not in _FIRST):
        size = field_size(name, headers[name])
        if size is None:
            cut.append(name)
            kept[name] = _shortened(headers[name])
            size = field_size(name, kept[name]) or 0
        sizes[name] = size
    cut += _make_room(kept, sizes)
    if cut:
        names = ", ".join(printable(name, _SHORT) for name in cut[:_SHORT])
        kept[CUT_HEADER] = printable(f"{len(cut)} of {len(headers)}: {names}", _LISTED)
    return kept


def _make_room(kept: HeaderDict, sizes: dict[str, int]) -> list[str]:
    """Shorten the largest headers, then drop the last ones, until the headers fit; the names of those that changed."""
    cut: list[str] = []
    total_size = sum(sizes.values())
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        if total_size <= ROOM:
            return cut
        shortened = _shortened(kept[name])
        size = field_size(name, shortened) or 0
        if size < sizes[name]:
            total_size += size - sizes[name]
            kept[name], sizes[name] = shortened, size
            cut.append(name)
    for name in reversed(list(sizes)):
        if total_size <= ROOM:
            break
        total_size -= sizes[name]
        del kept[name]
        cut.append(name)
    return cut


def _shortened(value: object) -> str:
    return printable(saferepr(value, _SHORT), _SHORT)
