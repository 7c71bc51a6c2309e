"""Declare entities one after the other on a loop's channel; what exists with other arguments is used as it is found.

A refused declaration closes the channel (404, 405, 406: https://www.rabbitmq.com/amqp-0-9-1-reference), so the owner
opens a new one and calls `resume` with it; the entity that was refused is then declared passively.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pika.exceptions import ChannelClosedByBroker

from amqtask.entities import Binding, Declaration, Exchange
from amqtask.topology.plan import describe_difference, is_declarable
from amqtask.transport.link import PRECONDITION_FAILED, send_declaration


class Declaring:
    """One run through a list of entities."""

    def __init__(
        self,
        entities: Sequence[Declaration],
        *,
        found: set[Declaration],
        on_done: Callable[[], None],
        on_warning: Callable[[str], None],
    ) -> None:
        # `found` holds what is known to exist with other arguments; it is kept over reconnects by the owner.
        self._entities = list(entities)
        self._found = found
        self._on_done = on_done
        self._on_warning = on_warning
        self._at = 0

    @property
    def current(self) -> Declaration | None:
        """What is being declared."""
        return self._entities[self._at] if self._at < len(self._entities) else None

    def resume(self, channel: Any) -> None:
        """Go on with the current entity on this channel."""
        while True:
            entity = self.current
            if entity is None:
                self._on_done()
                return
            if not isinstance(entity, Exchange) or is_declarable(entity):
                break
            self._at += 1
        send_declaration(channel, entity, lambda _: self._declared(channel), passive=entity in self._found)

    def _declared(self, channel: Any) -> None:
        self._at += 1
        self.resume(channel)

    def explains(self, error: Exception) -> bool:
        """Whether the channel was closed because the current entity exists with other arguments: a warning was given,
        and a new channel may `resume`."""
        entity = self.current
        if (
            not isinstance(error, ChannelClosedByBroker)
            or error.reply_code != PRECONDITION_FAILED
            or entity is None
            or isinstance(entity, Binding)
            or entity in self._found
        ):
            return False
        self._found.add(entity)
        self._on_warning(describe_difference(entity, error.reply_text))
        return True
