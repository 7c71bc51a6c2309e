"""`cache+memory://`: results in this process, and chords counted here."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from amqtask import states
from amqtask.backends.contract import Arrived, BackendOptions, KnownStore, await_arrival
from amqtask.backends.rpc import Arrivals, Mailbox
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


class MemoryBackend(MemoryChords, KnownStore):
    """See amqtask.backends.contract.ResultBackend. Values pass through the serializer, as they would elsewhere."""

    # What nobody holds goes by itself (amqtask.backends.rpc.Mailbox).
    supports_autoexpire = True

    def __init__(self, options: BackendOptions) -> None:
        super().__init__(options.serializer)
        self._serializer = options.serializer
        self._accept = content_types([options.serializer])
        self._mailbox = Mailbox()
        self._changed = threading.Condition()
        self._groups: dict[str, object] = {}

    def store(self, result: ResultMessage) -> None:
        """Keep a copy, as another process would read it. Raises: EncodeError."""
        self._mailbox.put(decode_result(*encode_result(result, self._serializer), self._accept))
        with self._changed:
            self._changed.notify_all()

    def hold(self, task_id: str, holder: object) -> None:
        """Keep the result while `holder` lives."""
        self._mailbox.hold(task_id, holder)

    def find(self, task_id: str) -> ResultMessage | None:
        """The stored result, or None."""
        return self._mailbox.find(task_id)

    def wait(self, task_id: str, *, timeout: float | None) -> ResultMessage:
        """Block until the result is there."""
        return next(self.iter_ready([task_id], timeout=timeout))[1]

    async def await_result(self, task_id: str, *, timeout: float | None) -> ResultMessage:
        """`wait` for an event loop."""

        def subscribe(arrived: Arrived) -> Callable[[], None]:
            self._mailbox.when_ready(task_id, arrived)
            return lambda: self._mailbox.cancel(task_id, arrived)

        return await await_arrival(task_id, timeout, subscribe)

    def iter_ready(self, task_ids: Sequence[str], *, timeout: float | None) -> Iterator[tuple[str, ResultMessage]]:
        """Each result as it is stored."""

        def wait(deadline: float | None) -> bool:
            with self._changed:
                remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
                return self._changed.wait_for(arrivals.__bool__, remaining)

        with contextlib.closing(Arrivals(self._mailbox, task_ids)) as arrivals:
            yield from arrivals.each(timeout, wait)

    def add_callback(self, task_id: str, callback: Callable[[ResultMessage], None]) -> None:
        """Call once when the result is stored."""
        self._mailbox.when_ready(task_id, callback)

    def forget(self, task_id: str) -> None:
        """Drop the result."""
        self._mailbox.forget(task_id)

    def save_group(self, group_id: str, members: object) -> None:
        """Keep a group's results (their ids)."""
        self._groups[group_id] = members

    def restore_group(self, group_id: str) -> object:
        """What `save_group` kept; None when there is nothing."""
        return self._groups.get(group_id)

    def delete_group(self, group_id: str) -> None:
        """Delete the group."""
        self._groups.pop(group_id, None)
