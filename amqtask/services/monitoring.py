"""The services for monitors: metrics and health, on one port or on two. Not loaded by a worker with neither."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amqtask.services.health import Health
from amqtask.services.http import HttpServer, Page
from amqtask.services.metrics import CountedPublisher, Metrics

if TYPE_CHECKING:
    from amqtask.pool import Loop
    from amqtask.services.watchdog import Watchdog
    from amqtask.transport.contract import LoopPublisher
    from amqtask.worker.options import WorkerOptions
    from amqtask.worker.setup import Service
    from amqtask.worker.worker import Worker


class Monitoring:
    """Makes these services. The worker must publish with `publisher`, so that its confirms are counted."""

    def __init__(self, options: WorkerOptions, loop: Loop, publisher: LoopPublisher) -> None:
        self._options = options
        self._loop = loop
        self._counted = CountedPublisher(publisher) if options.metrics_port is not None else None
        self.publisher: LoopPublisher = self._counted or publisher

    def services(self, worker: Worker, watchdog: Watchdog) -> list[Service]:
        """Raises: ConfigurationError (prometheus_client is not installed)."""
        options = self._options
        services: list[Service] = []
        pages: dict[int, dict[str, Page]] = {}
        if options.metrics_port is not None and self._counted is not None:
            metrics = Metrics(worker, self._counted)
            services.append(metrics)
            pages.setdefault(options.metrics_port, {}).update(metrics.pages)
        if options.health_port is not None:
            health = Health(worker, watchdog.stuck_for, watchdog.unconfirmed_for)
            pages.setdefault(options.health_port, {}).update(health.pages)
        for port, served in pages.items():
            services.append(HttpServer(self._loop, host=options.http_host, port=port, pages=served))
        return services
