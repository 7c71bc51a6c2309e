"""Revokes as the broker keeps them, for workers that start later: a journal that each worker reads to its end when it starts, and
then as it grows.

An entry is an order of remote control, in the form in which workers hear it (amqtask.protocol.control), with two arguments more:
`kept`, which tells workers that hear the order that nobody needs to write it down, and `at`, when it was given.
"""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING

from amqtask.exceptions import AccessRefused, OperationalError, PublishError
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.control import Command, command_message, read_command

if TYPE_CHECKING:
    from amqtask.ground.shapes import CommandArguments, KeywordDict
    from amqtask.protocol.message import Delivery, Message
    from amqtask.transport.contract import Journal, JournalTail

logger = bounded_logger("amqtask.control")

JOURNAL = "amqtask.cancel"
# The orders that are kept.
ORDERS = frozenset({"revoke", "terminate", "revoke_by_stamped_headers"})
KEPT, AT = "kept", "at"
# An entry that tells its writer that it has read all that was written before.
MARK = "mark"
# Arguments of an order that only those who hear it now need.
_NOT_KEPT = frozenset({"terminate", "signal"})


class KeptRevokes:
    """Writes and reads them. `accept` are the content types that may be read."""

    def __init__(
        self,
        journal: Journal,
        *,
        serializer: str,
        accept: frozenset[str],
    ) -> None:
        self._journal = journal
        self._serializer = serializer
        self._accept = accept
        self._has_warned = False

    def keep(self, order: str, arguments: CommandArguments) -> bool:
        """Write an order down. False: this broker takes none, which is logged once. Raises: PublishError."""
        kept = {name: value for name, value in arguments.items() if name not in _NOT_KEPT}
        try:
            self._journal.write(
                self._entry("revoke" if order == "terminate" else order, {**kept, KEPT: True, AT: time.time()})
            )
        except PublishError as error:
            if not is_refused(error):
                raise
            self.tell_refused("a revoke is not kept from here, but by workers of ours that hear it", error)
            return False
        return True

    def mark(self, tail: JournalTail) -> str:
        """Write an entry that this reader finds after all that were written before. Its name. Raises: OperationalError."""
        name = str(uuid.uuid4())
        tail.write(self._entry(MARK, {"name": name}))
        return name

    def _entry(self, order: str, arguments: KeywordDict) -> Message:
        return command_message(Command(order, arguments), serializer=self._serializer)

    def tail(self, position: object = None) -> JournalTail:
        """Reads the entries after a position: `x-stream-offset` of a delivery, or None: of all that may still matter."""
        return self._journal.tail(position)

    def read(self, delivery: Delivery) -> Command:
        """The order. Raises: MessageError."""
        return read_command(*delivery.content, self._accept)

    def tell_refused(self, consequence: str, error: OperationalError) -> None:
        """Log it, once."""
        if not self._has_warned:
            self._has_warned = True
            logger.warning("%s: %s", consequence, error)


def is_refused(error: OperationalError) -> bool:
    """Whether it is of no use to try again soon: no right, or no streams."""
    return isinstance(error, AccessRefused) or type(error) in (PublishError, OperationalError)
