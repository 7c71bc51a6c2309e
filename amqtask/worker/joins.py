"""Chords that are joined in the broker: who has published the last part publishes the body, once, then deletes the queue.

A part is confirmed before anybody looks. The member whose look finds the chord complete stays unanswered until the body
is confirmed: whoever dies before that leaves it to be delivered again, and its new part makes for a new look.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from amqtask.exceptions import ChordError, MessageError, Unroutable
from amqtask.printable import bounded_logger
from amqtask.protocol.chord import Gathered, gather, queue_name

if TYPE_CHECKING:
    from amqtask.exceptions import PublishError
    from amqtask.execution.chords import Aftermath, Chords
    from amqtask.message import Delivery
    from amqtask.protocol.chord import ChordPart
    from amqtask.transport.contract import Gatherer, LoopPublisher

logger = bounded_logger(__name__)

OnDone = Callable[[], None]


class Joins:
    """Looks after chords for one worker. `accept` are the content types of results."""

    def __init__(self, gatherer: Gatherer, publisher: LoopPublisher, chords: Chords, accept: frozenset[str]) -> None:
        self._gatherer = gatherer
        self._publisher = publisher
        self._chords = chords
        self._accept = accept

    def join(self, part: ChordPart, on_done: OnDone) -> None:
        """A part was stored: publish the chord's body if it was the last. `on_done` when that is confirmed, or not ours."""
        self._gatherer.gather(
            queue_name(part.group_id),
            part.size,
            take=lambda found, finished: self._take(part, found, finished),
            on_done=on_done,
        )

    def stop(self) -> None:
        """Close the connection."""
        self._gatherer.stop()

    def _read(self, found: Sequence[Delivery]) -> Gathered:
        return gather(
            (
                (each.body, each.properties.content_type, each.properties.content_encoding, each.properties.headers)
                for each in found
            ),
            self._accept,
        )

    def _take(self, part: ChordPart, found: Sequence[Delivery], finished: OnDone) -> bool:
        """Publish the body if all parts are there."""
        try:
            gathered = self._read(found)
            if not gathered.is_complete(part.size):
                return False
            parts = gathered.in_order()
        except MessageError as error:
            # It cannot get better.
            after = self._chords.failed(
                part.body, ChordError(f"a part of chord {part.group_id} is unreadable: {error}")
            )
        else:
            after = self._chords.joined(part.body, part.group_id, parts, part.task_id)
        _Publishing(self, after, finished, lambda error: self._refused(part, error, finished)).start(self._publisher)
        return True

    def _refused(self, part: ChordPart, error: PublishError, finished: OnDone) -> None:
        """The body was not stored: it ends as a failure."""
        logger.error("the body of chord %s could not be published: %s", part.group_id, error)
        after = self._chords.failed(part.body, ChordError(f"Callback error: {error!r}"))
        _Publishing(self, after, finished, lambda _: finished()).start(self._publisher)


class _Publishing:
    """The messages of one body, or of its failure, until all are confirmed; then the chords that it was a part of."""

    def __init__(
        self, joins: Joins, after: Aftermath, finished: OnDone, refused: Callable[[PublishError], None]
    ) -> None:
        self._joins = joins
        self._after = after
        self._finished = finished
        self._on_refused = refused
        self._left = len(after.publish) + len(after.parts)
        self._stored: list[ChordPart] = []
        self._refused: PublishError | None = None

    def start(self, publisher: LoopPublisher) -> None:
        for message in self._after.publish:
            publisher.publish(message, self._one_done)
        for part in self._after.parts:
            publisher.publish(part.message, partial(self._part_done, part))
        if not self._left:
            self._finished()

    def _part_done(self, part: ChordPart, error: PublishError | None) -> None:
        if error is None:
            self._stored.append(part)
        elif not isinstance(error, Unroutable):
            logger.error("a part of chord %s could not be published: %s", part.group_id, error)
        self._one_done(None)

    def _one_done(self, error: PublishError | None) -> None:
        self._refused = self._refused or error
        self._left -= 1
        if self._left:
            return
        if self._refused is not None:
            self._on_refused(self._refused)
        else:
            self._go_on()

    def _go_on(self) -> None:
        if self._stored:
            self._joins.join(self._stored.pop(), self._go_on)
        else:
            self._finished()
