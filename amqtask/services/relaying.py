"""The relay of an outbox in a worker: in a thread of its own, because it waits for a database."""

from __future__ import annotations

import threading

from amqtask.ground.printable import bounded_logger
from amqtask.outbox.relay import Relay

logger = bounded_logger("amqtask.worker")

STOP_SECONDS = 10.0
PAUSE_SECONDS = 5.0


class Relaying:
    """Runs a relay while the worker runs."""

    name = "relay"

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="amqtask relay", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._relay.stop()
        if self._thread is not None:
            self._thread.join(STOP_SECONDS)
            self._thread = None

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                self._relay.run()
            except Exception:
                logger.exception("the relay failed, nothing is lost; it starts again in %g s", PAUSE_SECONDS)
                self._over.wait(PAUSE_SECONDS)
