"""Health: two pages for Kubernetes and load balancers, `/live` and `/ready`, each 200 or 503 with a line that says why.

Live means: the I/O loop runs (it answers) and the watchdog sees no standstill; a broker that is away is no reason to restart a
worker. Ready means: it consumes and is not shutting down. A worker is neither when the broker does not confirm its results,
retries or dead letters though it is connected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from amqtask.ground.wording import count
from amqtask.services.http import Page, Reply, text

if TYPE_CHECKING:
    from amqtask.worker.worker import Worker

# Seconds; the watchdog ends the worker after a minute, probes fail earlier.
STUCK_SECONDS = 30.0
# Seconds; a queue that gets a new leader confirms nothing for some seconds.
UNCONFIRMED_SECONDS = 15.0


class Health:
    """The two pages. `stuck_for()` and `unconfirmed_for()` are the watchdog's: seconds for which tasks wait, slots are free and
    nothing moves; seconds for which a message waits for its confirm."""

    def __init__(
        self, worker: Worker, stuck_for: Callable[[], float], unconfirmed_for: Callable[[], float] = lambda: 0.0
    ) -> None:
        self._worker = worker
        self._stuck_for = stuck_for
        self._unconfirmed_for = unconfirmed_for

    @property
    def pages(self) -> dict[str, Page]:
        return {"/live": self.live, "/ready": self.ready}

    def live(self, headers: Mapping[str, str]) -> Reply:
        stuck = self._stuck_for()
        if stuck >= STUCK_SECONDS:
            waiting = self._worker.dispatcher.waiting
            return text(
                503, f"stuck: {count(waiting, 'task')} waiting, slots are free, and nothing has moved for {stuck:.0f} s"
            )
        return self._unconfirmed(2 * STUCK_SECONDS) or text(200, "live")

    def _unconfirmed(self, longest: float) -> Reply | None:
        seconds = self._unconfirmed_for()
        if seconds < longest:
            return None
        waiting = count(self._worker.publisher.outstanding, "message")
        return text(
            503, f"publishing is stuck: {waiting} waiting, and the oldest was not confirmed for {seconds:.0f} s"
        )

    def ready(self, headers: Mapping[str, str]) -> Reply:
        worker = self._worker
        if worker.is_quiet:
            running = len(worker.dispatcher.running)
            return text(503, f"shutting down: {count(running, 'task')} still run{'s' if running == 1 else ''}")
        if not worker.consumer.is_consuming:
            return text(503, "reconnecting to the broker" if worker.lifecycle.is_ready else "connecting to the broker")
        queues = ", ".join(sorted(queue.name for queue in worker.consumed))
        return self._unconfirmed(UNCONFIRMED_SECONDS) or text(
            200, f"ready: consuming {queues or 'nothing: all queues were cancelled (cancel_consumer)'}"
        )
