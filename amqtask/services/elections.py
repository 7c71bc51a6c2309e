"""Elections: of the workers that get an election, exactly one runs its action (`app.control.election`).

Celery's workers vote with events that they send each other, and count the votes of the workers that they know
(celery/worker/consumer/gossip.py). Here the broker decides: each worker declares an exclusive queue that is named after the
election, and RabbitMQ gives it to one connection. The elected worker keeps it for KEEP_SECONDS, so that a worker that gets
the election later does not win it again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from amqtask.ground.printable import bounded_logger
from amqtask.protocol.entities import Queue, arguments
from amqtask.transport.contract import ConsumerListener

if TYPE_CHECKING:
    from amqtask.ground.shapes import JsonFields
    from amqtask.pool import Loop, Timer
    from amqtask.protocol.message import Delivery
    from amqtask.transport.contract import Consumer

logger = bounded_logger("amqtask.worker")

KEEP_SECONDS = 60.0
# Of the 255 bytes that a queue's name may have.
LONGEST_ID = 200
# Elections at once: each has a connection of its own.
MOST = 100


class Elections:
    """Takes part in elections; `call` runs an elected worker's action, and may block: it is called in a thread."""

    name = "elections"

    def __init__(
        self,
        *,
        loop: Loop,
        make_consumer: Callable[[ConsumerListener], Consumer],
        call: Callable[[JsonFields], object],
        prefix: str = "celery",
    ) -> None:
        self._loop = loop
        self._make_consumer = make_consumer
        self._call = call
        self._prefix = prefix
        self._candidates: dict[str, _Candidate] = {}

    def start(self) -> None:
        """Does nothing: an election begins with a command."""

    def hold(self, election_id: str, topic: str, action: object) -> None:
        """Stand for election, once for each id. Raises: ValueError for an id or action that is not valid, and for too many."""
        if topic != "task":
            raise ValueError(f"an election is about the topic 'task', not {topic!r}")
        if not isinstance(action, Mapping) or not isinstance(action.get("task"), str):
            raise ValueError(f"an election's action is a task's signature, not {action!r}")
        if not election_id or len(election_id.encode()) > LONGEST_ID:
            raise ValueError(f"an election's id has 1 to {LONGEST_ID} bytes, not {election_id[:LONGEST_ID]!r}")
        if len(self._candidates) >= MOST and election_id not in self._candidates:
            raise ValueError(f"this worker takes part in {MOST} elections already")
        if election_id not in self._candidates:
            candidate = _Candidate(election_id, lambda: self._won(election_id, action))
            self._candidates[election_id] = candidate
            candidate.stand(self._make_consumer, f"{election_id}.{self._prefix}.election", self._loop, self._over)

    def _over(self, election_id: str) -> None:
        self._candidates.pop(election_id, None)

    def _won(self, election_id: str, action: JsonFields) -> None:
        logger.info("election %s: this worker is elected, and calls %s", election_id, action["task"])
        name = f"amqtask election {election_id}"
        threading.Thread(target=self._run, args=(election_id, action), name=name, daemon=True).start()

    def _run(self, election_id: str, action: JsonFields) -> None:
        try:
            self._call(action)
        except Exception:  # routers and receivers of signals are the user's
            logger.exception("election %s: %s could not be called", election_id, action["task"])

    def stop(self) -> None:
        """Leave all elections that are under way."""
        for candidate in list(self._candidates.values()):
            candidate.leave()


class _Candidate(ConsumerListener):
    """One election, on a connection of its own: a refused queue closes its channel."""

    def __init__(self, election_id: str, on_won: Callable[[], None]) -> None:
        self._id = election_id
        self._on_won = on_won
        self._is_decided = False
        self._consumer: Consumer | None = None
        self._timer: Timer | None = None
        self._on_over: Callable[[str], None] = lambda election_id: None

    def stand(
        self,
        make_consumer: Callable[[ConsumerListener], Consumer],
        queue: str,
        loop: Loop,
        on_over: Callable[[str], None],
    ) -> None:
        """Consume the queue; KEEP_SECONDS later the election is over."""
        self._on_over = on_over
        self._consumer = make_consumer(self)
        # The queue is deleted with its connection; x-expires is for a broker that does not notice the connection's end.
        queue_arguments = arguments({"x-expires": int(KEEP_SECONDS * 1000)})
        self._consumer.add_queue(
            Queue(queue, durable=False, exclusive=True, auto_delete=True, arguments=queue_arguments), prefetch=1
        )
        self._consumer.start()
        self._timer = loop.call_later(KEEP_SECONDS, self.leave)

    def leave(self) -> None:
        """Give the queue up."""
        self._is_decided = True
        self._let_go()
        if self._timer is not None:
            self._timer.cancel()
        self._on_over(self._id)

    def _let_go(self) -> None:
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            consumer.stop()

    # -- the consumer's events

    def on_consuming(self, epoch: int) -> None:
        if not self._is_decided:
            self._is_decided = True
            self._on_won()

    def on_fatal(self, error: Exception) -> None:
        """Usually the queue belongs to another worker. This worker remembers the election as long as that one keeps it."""
        if not self._is_decided:
            self._is_decided = True
            logger.info("election %s: it is not this worker: %s", self._id, error)
        self._let_go()

    def on_delivery(self, delivery: Delivery) -> None:
        logger.debug("election %s: a message that nobody should have sent", self._id)

    def on_connection_lost(self, error: Exception) -> None:
        logger.info("election %s: connection lost: %s", self._id, error)

    def on_cancelled(self, queue: str, reason: str) -> None:
        logger.debug("election %s: consumer cancelled: %s", self._id, reason)

    def on_warning(self, text: str) -> None:
        logger.debug("election %s: %s", self._id, text)
