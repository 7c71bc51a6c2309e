"""The services for monitors: metrics and health, on one port or on two. Not loaded by a worker with neither."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from amqtask.ground.printable import count
from amqtask.services.metrics import CountedPublisher, HttpServer, Metrics, Page, Reply, text

if TYPE_CHECKING:
    from amqtask.client.flow_store import LimitState
    from amqtask.pool import Loop
    from amqtask.services.watchdog import Watchdog
    from amqtask.transport.contract import LoopPublisher
    from amqtask.worker.options import Service, WorkerOptions
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


class Monitoring:
    """Makes these services. The worker must publish with `publisher`, so that its confirms are counted."""

    def __init__(
        self,
        options: WorkerOptions,
        loop: Loop,
        publisher: LoopPublisher,
        *,
        breakers: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        self._options = options
        self._loop = loop
        self._breakers = breakers
        self._counted = CountedPublisher(publisher) if options.metrics_port is not None else None
        self.publisher: LoopPublisher = self._counted or publisher

    def services(self, worker: Worker, watchdog: Watchdog, limits: Callable[[], Iterable[LimitState]]) -> list[Service]:
        """Raises: ConfigurationError (prometheus_client is not installed)."""
        options = self._options
        services: list[Service] = []
        pages: dict[int, dict[str, Page]] = {}
        if options.metrics_port is not None and self._counted is not None:
            metrics = Metrics(worker, self._counted, limits=limits, breakers=self._breakers)
            services.append(metrics)
            pages.setdefault(options.metrics_port, {}).update(metrics.pages)
        if options.health_port is not None:
            health = Health(worker, watchdog.stuck_for, watchdog.unconfirmed_for)
            pages.setdefault(options.health_port, {}).update(health.pages)
        for port, served in pages.items():
            services.append(HttpServer(self._loop, host=options.http_host, port=port, pages=served))
        return services
