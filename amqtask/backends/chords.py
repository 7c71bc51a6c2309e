"""Chords counted in this process: for the in-memory broker and for `cache+memory://`.

Parts pass through the serializer, as they would elsewhere.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from amqtask import states
from amqtask.protocol.result import ResultMessage, decode_result, encode_result
from amqtask.protocol.serialization import content_types

_LAST = float("inf")


@dataclass
class _Chord:
    size: int
    body_id: str = ""
    parts: dict[str, tuple[float, ResultMessage]] = field(default_factory=dict)
    added: set[str] = field(default_factory=set)


class MemoryChords:
    """See amqtask.execution.contract.ChordStore."""

    def __init__(self, serializer: str = "json") -> None:
        self._format = (serializer, content_types([serializer]))
        self._chords: dict[str, _Chord] = {}
        self._lock = threading.Lock()

    def set_chord_size(self, group_id: str, size: int, body_id: str = "") -> None:
        """Open a chord: a header of `size` members is about to be published."""
        with self._lock:
            chord = self._chords.setdefault(group_id, _Chord(size))
            chord.size, chord.body_id = size, body_id

    def add_chord_part(
        self, group_id: str, index: int | None, part: ResultMessage, body_id: str = ""
    ) -> list[ResultMessage] | None:
        """Add the part of a member that has ended; all parts, in order, when it completes the chord. Raises: EncodeError."""
        serializer, accept = self._format
        part = decode_result(*encode_result(part, serializer), accept)
        with self._lock:
            chord = self._chords.get(group_id)
            if chord is None or (chord.body_id and chord.body_id != body_id):
                return None  # its body has run, or the part is of another chord
            earlier = chord.parts.get(part.task_id)
            if earlier is None or part.status == states.SUCCESS:
                chord.parts[part.task_id] = (_LAST if index is None else index, part)
            if len(chord.parts) < chord.size + len(chord.added):
                return None
            return [member_result for _, member_result in sorted(chord.parts.values(), key=lambda item: item[0])]

    def add_to_chord(self, group_id: str, task_id: str) -> None:
        """Add a member to the chord."""
        with self._lock:
            chord = self._chords.get(group_id)
            if chord is not None:
                chord.added.add(task_id)

    def end_chord(self, group_id: str, body_id: str = "") -> None:
        """Forget a chord whose body has run."""
        with self._lock:
            chord = self._chords.get(group_id)
            if chord is not None and chord.body_id in ("", body_id):
                del self._chords[group_id]
