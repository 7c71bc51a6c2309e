"""The watchdog: a worker that could work and does not is ended, so that its supervisor starts a new one.

It acts when requests wait, slots are free and for a whole minute no request was started and none ended. That can
only be a fault of ours (or of a pool), so it ends the process and does not try to repair it: the broker still has every
message.

A publisher whose oldest message gets no confirm for as long, though the connection is open, is reported: in the log, and by
`/ready` and `/live`. Usually the queue lacks a majority of its nodes, and another process could not publish either.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from amqtask.ground.loop import Ticker
from amqtask.ground.printable import bounded_logger, count

if TYPE_CHECKING:
    from amqtask.protocol.message import Message
    from amqtask.worker.worker import Worker

logger = bounded_logger("amqtask.worker")

STUCK_SECONDS = 60.0
CHECK_SECONDS = 5.0


class WorkerStuck(Exception):
    """Requests wait, slots are free, nothing moves."""


class Watchdog:
    """Ends a stuck worker with a non-zero exit code."""

    name = "watchdog"

    def __init__(
        self,
        worker: Worker,
        *,
        stuck_after: float = STUCK_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._worker = worker
        self._stuck_after = stuck_after
        self._clock = clock
        self._last_counts = (0, 0)
        self._since = clock()
        # The message that waited longest for its confirm at the last look, since when, and whether that was logged.
        self._oldest: Message | None = None
        self._oldest_since = clock()
        self._is_told = False
        self._ticker = Ticker(worker.loop, CHECK_SECONDS, self.check)

    def start(self) -> None:
        self._since = self._clock()
        self._ticker.start()

    def stop(self) -> None:
        self._ticker.stop()

    def stuck_for(self) -> float:
        """Seconds for which tasks wait, slots are free and nothing moves; a few seconds in a healthy worker."""
        return self._clock() - self._since

    def unconfirmed_for(self) -> float:
        """Seconds for which the broker, though connected, has not confirmed the publisher's oldest message; else 0."""
        oldest = self._worker.publisher.oldest
        return self._clock() - self._oldest_since if oldest is not None and oldest is self._oldest else 0.0

    def _look_at_publisher(self, now: float) -> None:
        oldest = self._worker.publisher.oldest
        if oldest is None or oldest is not self._oldest:
            if self._is_told:
                logger.warning("publisher: the broker confirms again")
            self._oldest, self._oldest_since, self._is_told = oldest, now, False
        elif now - self._oldest_since >= self._stuck_after and not self._is_told:
            self._is_told = True
            logger.error(
                "publisher: %s (results, retries, dead letters) not confirmed by the broker, the oldest (to exchange %r, "
                "routing key %r) for %.0f s. Has its queue a majority of its nodes? The tasks behind them stay unacknowledged.",
                count(self._worker.publisher.outstanding, "message"), oldest.exchange, oldest.routing_key,
                now - self._oldest_since,
            )  # fmt: skip

    def check(self) -> None:
        """Check once."""
        worker = self._worker
        now = self._clock()
        self._look_at_publisher(now)
        counts = (worker.ended, len(worker.dispatcher.running))
        if counts != self._last_counts or not worker.dispatcher.could_start:
            self._last_counts, self._since = counts, now
        elif now - self._since >= self._stuck_after:
            self.stop()
            waiting = worker.dispatcher.waiting
            worker.lifecycle.shutdown.fail(
                WorkerStuck(
                    f"{count(waiting, 'task')} waiting, slots are free, and nothing has moved for {now - self._since:.0f} s"
                )
            )
