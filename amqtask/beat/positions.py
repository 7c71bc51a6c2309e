"""Positions of entries (their last due times), and the form in which beats hand them to each other through the broker.

The form is JSON: `{"v": 1, "entries": {name: [time, total_run_count, has_run]}}`, times in ISO 8601 with their offset.
Readers ignore what they do not know, so that beats of different versions can follow each other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, NamedTuple

VERSION = 1


class Position(NamedTuple):
    """`since` is the last due time, or for an entry that never ran the moment at which it was first seen."""

    since: datetime
    total_run_count: int = 0
    has_run: bool = False


def encode(positions: Mapping[str, Position]) -> bytes:
    """A state of positions as a message body."""
    entries = {
        name: [position.since.isoformat(), position.total_run_count, int(position.has_run)]
        for name, position in positions.items()
    }
    return json.dumps({"v": VERSION, "entries": entries}, separators=(",", ":")).encode()


def decode(body: bytes) -> dict[str, Position]:
    """The positions of a message body. Raises: ValueError for what is no such state."""
    try:
        document = json.loads(body)
        return {str(name): _position(*fields[:3]) for name, fields in document["entries"].items()}
    except (
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        UnicodeDecodeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise ValueError(f"no state of a beat: {error!r}") from error


def _position(since: Any, count: Any = 0, has_run: Any = 0) -> Position:
    moment = datetime.fromisoformat(since)
    if moment.tzinfo is None:
        raise ValueError(f"a time without a zone: {since!r}")
    return Position(moment, int(count), bool(has_run))


def merged(states: Iterable[Mapping[str, Position]]) -> dict[str, Position]:
    """The furthest position of each entry."""
    furthest: dict[str, Position] = {}
    for state in states:
        for name, position in state.items():
            current = furthest.get(name)
            if current is None or _rank(position) > _rank(current):
                furthest[name] = position
    return furthest


def _rank(position: Position) -> tuple[bool, datetime, int]:
    # An entry that has run stands further than one that was only seen, whenever that was.
    return position.has_run, position.since, position.total_run_count
