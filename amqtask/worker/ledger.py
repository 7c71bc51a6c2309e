"""The ledger: which deliveries of a channel are unanswered, and the fewest ack frames that answer the finished
ones.

Delivery tags of one channel count upwards and are void on any other channel, so the ledger knows one
`epoch` (channel incarnation) at a time. `basic.ack` with `multiple` answers every unanswered tag up to and
including its own. So at the end of a loop turn the finished tags below the oldest open one need one frame
together; those above it (a long task is still running below them) need one each.

Invariants: a tag is answered once; a `multiple` ack never covers an open tag, and names a tag that is
itself unanswered. Memory is bound by the prefetch windows: only open tags and those finished in this turn
are kept. Each operation is O(1) amortised; the search for the oldest open tag passes over the entries that
a dictionary keeps of deleted keys, which are as many as it has slots at most, once per turn.
"""

from __future__ import annotations

from typing import NamedTuple


class Acks(NamedTuple):
    """What to send: `upto` with `multiple=True` first (0: nothing), then `singles`, each alone."""

    upto: int
    singles: list[int]


NOTHING = Acks(0, [])


class Ledger:
    """Outstanding delivery tags of one epoch."""

    __slots__ = ("_finished", "_open", "epoch")

    def __init__(self, epoch: int = 0) -> None:
        self.epoch = epoch
        self._open: dict[int, None] = {}
        self._finished: list[int] = []

    def begin(self, epoch: int) -> None:
        """A new channel: all tags of the old one are void."""
        self.epoch = epoch
        self._open = {}
        self._finished = []

    def add(self, tag: int) -> None:
        """A delivery came; tags come in rising order."""
        self._open[tag] = None

    def is_open(self, tag: int) -> bool:
        """Whether the delivery has neither an answer nor been finished."""
        return tag in self._open

    def finish(self, tag: int) -> None:
        """Ack this delivery at the end of the turn."""
        del self._open[tag]
        self._finished.append(tag)

    def drop(self, tag: int) -> None:
        """Forget a delivery that the caller answers now (reject, nack, or an ack of its own)."""
        del self._open[tag]

    def flush(self) -> Acks:
        """The frames that ack all deliveries finished since the last flush."""
        finished = self._finished
        if not finished:
            return NOTHING
        self._finished = []
        if len(finished) == 1:
            return Acks(0, finished)
        if not self._open:
            return Acks(max(finished), [])
        oldest_open = next(iter(self._open))
        prefix = [tag for tag in finished if tag < oldest_open]
        if len(prefix) < 2:
            return Acks(0, finished)
        return Acks(max(prefix), [tag for tag in finished if tag > oldest_open])

    @property
    def outstanding(self) -> int:
        """How many deliveries have no answer yet (finished ones that wait for the flush included)."""
        return len(self._open) + len(self._finished)

    @property
    def open_tags(self) -> tuple[int, ...]:
        """The tags of deliveries that are not finished, oldest first."""
        return tuple(self._open)
