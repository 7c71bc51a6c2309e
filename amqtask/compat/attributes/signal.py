"""What libraries look for on a signal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from amqtask.signals import Signal


class OfSignal(Signal):
    """Bound to a signal."""

    def send_robust(self, sender: object = None, **arguments: object) -> list[tuple[Callable[..., Any], Any]]:
        """`send` under Django's name."""
        return self.send(sender, **arguments)

    @property
    def providing_args(self) -> set[str]:
        """Names of the arguments that receivers get."""
        return set(self.arguments)

    @property
    def receivers(self) -> list[tuple[Any, Callable[[], Any]]]:
        """Those that are connected: ((what it is known by, the sender's key), a function that gives the receiver)."""
        return [(key, reference) for key, (_, reference) in self.connected.items()]
