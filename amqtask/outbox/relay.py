"""Relay: publishes the rows of an outbox, and deletes what the broker has confirmed.

The model. Rows appear in the table when a transaction is committed, and never otherwise. The relay takes the first rows by
id that are due and that no other relay holds, publishes them in one burst, waits for the confirms, deletes what was
confirmed, and commits; then the next ones. Whatever dies in between, the database gives the rows back as they were, so
a row leaves the table only after the broker has its message. What was confirmed and not yet deleted is published again, with
the same task id: at least once.

Invariants, and why:

- The broker being away is nobody's fault: no row's attempts count, and the relay waits (half a second, doubled up to
  five) before it tries again. Whatever was confirmed before it went away is deleted.
- A message that the broker returns or refuses is that row's own fault: it stays with the error, is tried again after
  one second, two, four … up to a minute, and does not hold up the rows behind it.
- A confirm that does not come may be either. Three bursts in a row without a single confirm count as the rows' fault,
  so that a queue which lost its majority does not hold up all others.

A worker runs it in a thread of its own (`Relaying`), because it waits for a database.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, NamedTuple

from amqtask.exceptions import AccessRefused, BrokerUnreachable, ConnectionBlocked, PublishError, PublishTimeout
from amqtask.ground.loop import exponential_backoff
from amqtask.ground.printable import bounded_logger
from amqtask.outbox.contract import FailedRow, OutboxUnreachable, RowUnreadable, Store, StoredRow, Verdict, as_message

if TYPE_CHECKING:
    from amqtask.protocol.message import Message
    from amqtask.topology.delays import DelayPlan
    from amqtask.transport.contract import Publisher

logger = bounded_logger("amqtask.relay")

BATCH = 500
INTERVAL_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 5.0
LONGEST_RETRY_SECONDS = 60.0
# After so many bursts without one confirm the rows are blamed, not the broker.
PATIENT_TIMEOUTS = 3


class Step(NamedTuple):
    """The outcome of one batch; `pause` is seconds to wait before the next one."""

    rows: int = 0
    sent: int = 0
    failed: int = 0
    pause: float = 0.0


class Relay:
    """Publishes what one outbox holds. Several may run for the same table, in threads, processes or hosts.

    `batch` is rows per transaction, `interval` seconds between two looks at an empty table, `timeout` seconds for a
    burst (None: no limit), `on_sent` gets the messages that were confirmed.
    """

    name = "relay"

    def __init__(
        self,
        store: Store,
        publisher: Publisher,
        delays: DelayPlan,
        *,
        batch: int = BATCH,
        interval: float = INTERVAL_SECONDS,
        timeout: float | None = 5.0,
        on_sent: Callable[[Sequence[Message]], object] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.store = store
        self._publisher = publisher
        self._delays = delays
        self._batch = batch
        self._interval = interval
        self._timeout = timeout
        self._on_sent = on_sent
        self._clock = clock
        self._stopping = threading.Event()
        self._outages = 0
        self._timeouts = 0
        self._verdict = Verdict()
        self._outage: Exception | None = None

    # -- running

    def run(self) -> None:
        """Relay until `stop` is called."""
        logger.info("relaying %s", self.store.name)
        while not self._stopping.is_set():
            step = self.step()
            if step.pause:
                self._stopping.wait(step.pause)
        self.store.close()

    def stop(self) -> None:
        """Let `run` return after the batch at hand; from any thread, or a signal's handler."""
        self._stopping.set()

    def drain(self) -> Step:
        """Relay until nothing is due any more, or nothing can be sent; the sum. Raises: PublishError, OutboxUnreachable."""
        rows = sent = failed = 0
        try:
            while not self._stopping.is_set():
                step = self._relayed()
                rows, sent, failed = rows + step.rows, sent + step.sent, failed + step.failed
                if self._outage is not None:
                    raise self._outage
                if not step.rows:
                    break
        finally:
            self.store.close()
        return Step(rows, sent, failed)

    def step(self) -> Step:
        """Relay one batch. An error that will pass is not raised but logged, and the pause gets longer."""
        try:
            step = self._relayed()
        except OutboxUnreachable as error:
            return Step(pause=self._pause(error))
        if self._outage is not None:
            return step._replace(pause=self._pause(self._outage))
        if self._outages:
            logger.warning("relaying %s again", self.store.name)
            self._outages = 0
        return step if step.rows == self._batch else step._replace(pause=self._interval)

    def _pause(self, error: Exception) -> float:
        seconds = exponential_backoff(self._outages, factor=self._interval, maximum=LONGEST_PAUSE_SECONDS)
        if not self._outages:
            logger.warning("nothing is lost, but %s cannot be relayed for now: %s", self.store.name, error)
        self._outages += 1
        return seconds

    # -- one batch

    def _relayed(self) -> Step:
        self._verdict, self._outage = Verdict(), None
        now = datetime.fromtimestamp(self._clock(), timezone.utc)
        rows = self.store.relay(self._batch, now, self._send)
        return Step(rows, len(self._verdict.sent), len(self._verdict.failed))

    def _send(self, rows: Sequence[StoredRow]) -> Verdict:
        """Publish a batch, within the store's transaction."""
        readable: list[StoredRow] = []
        messages: list[Message] = []
        failed: list[FailedRow] = []
        for row in rows:
            try:
                messages.append(as_message(row.message, row.body, self._delays, now=self._clock()))
                readable.append(row)
            except RowUnreadable as unreadable:
                failed.append(self._failed(row, unreadable))
        errors = self._publish(messages)
        sent = [row.id for row, error in zip(readable, errors, strict=True) if error is None]
        blames_rows = self._blames_rows(errors)
        for row, error in zip(readable, errors, strict=True):
            if error is None:
                continue
            if _may_pass(error, blames_rows):
                self._outage = error
            else:
                failed.append(self._failed(row, error))
        if self._on_sent is not None and sent:
            self._on_sent([message for message, error in zip(messages, errors, strict=True) if error is None])
        self._verdict = Verdict(sent, failed)
        return self._verdict

    def _publish(self, messages: Sequence[Message]) -> Sequence[PublishError | None]:
        if not messages:
            return []
        timeout = None if self._timeout is None else self._timeout + len(messages) / 1000
        return self._publisher.publish_many(messages, timeout=timeout)

    def _blames_rows(self, errors: Sequence[PublishError | None]) -> bool:
        """Whether missing confirms are put down to the rows, not to the broker."""
        if not errors:
            return False
        if all(isinstance(error, PublishTimeout) for error in errors):
            self._timeouts += 1
            return self._timeouts >= PATIENT_TIMEOUTS
        self._timeouts = 0
        return None in errors

    def _failed(self, row: StoredRow, error: Exception) -> FailedRow:
        attempts = row.attempts + 1
        seconds = exponential_backoff(row.attempts, maximum=LONGEST_RETRY_SECONDS)
        text = f"{type(error).__name__}: {error}"
        logger.error("row %d of %s stays, after %d attempts: %s", row.id, self.store.name, attempts, text)
        return FailedRow(row.id, text, attempts, datetime.fromtimestamp(self._clock() + seconds, timezone.utc))


def _may_pass(error: PublishError, blames_rows: bool) -> bool:
    """Whether an error means that the broker is away, not that it refuses this message."""
    if isinstance(error, PublishTimeout):
        return not blames_rows
    return isinstance(error, (BrokerUnreachable, ConnectionBlocked)) and not isinstance(error, AccessRefused)


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
            except Exception:  # a database's driver: the thread must not end
                logger.exception("the relay failed, nothing is lost; it starts again in %g s", PAUSE_SECONDS)
                self._over.wait(PAUSE_SECONDS)
