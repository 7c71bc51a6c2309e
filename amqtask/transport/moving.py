"""Messages that move from a queue to a publisher, for the command line: what became of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from amqtask.exceptions import (
    BrokerUnreachable,
    ConnectionBlocked,
    MessageTooLarge,
    PublishError,
    PublishTimeout,
    Unroutable,
)

if TYPE_CHECKING:
    from amqtask.protocol.message import Delivery, Message
    from amqtask.transport.contract import Moved, Publisher

# How many messages are under way at once when messages move: so many may be stored twice after a kill.
# RabbitMQ's client of a quorum queue keeps acknowledgements to itself while 32 are not yet applied (rabbit_fifo_client's
# soft limit), and forgets those of basic.get when the channel closes (3.10: 67 of 100 came back). Each basic.get waits for
# all that came before it, so fewer than that at once are safe.
BATCH = 25
# Errors that fail every message; other errors concern one message only (a nack may be either).
_NO_BROKER = (BrokerUnreachable, ConnectionBlocked, PublishTimeout)
_ITS_OWN = (Unroutable, MessageTooLarge)


def publish_pairs(publisher: Publisher, pairs: Sequence[tuple[Delivery, Message]], done: Moved) -> list[Delivery]:
    """Publish the messages, and note in `done` what became of them; the deliveries whose messages are stored."""
    if not pairs:
        return []
    try:
        errors: Sequence[PublishError | None] = publisher.publish_many([message for _, message in pairs])
    except PublishError as error:
        errors = [error] * len(pairs)
    stored = [delivery for (delivery, _), error in zip(pairs, errors, strict=True) if error is None]
    failures = [error for error in errors if error is not None]
    done.failed += len(failures)
    done.failure = done.failure or next(iter(failures), None)
    done.is_over = any(isinstance(error, _NO_BROKER) for error in failures) or (
        not stored and not all(isinstance(error, _ITS_OWN) or type(error) is PublishError for error in failures)
    )
    done.moved += len(stored)
    done.repeated += sum(delivery.redelivered for delivery in stored)
    return stored
