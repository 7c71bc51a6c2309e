"""`celery.utils.dispatch`."""

from __future__ import annotations

from collections.abc import Iterable

from amqtask import signals

__all__ = ["Signal"]


class Signal(signals.Signal):
    """A signal of one's own, made as Celery's are."""

    def __init__(
        self, providing_args: Iterable[str] | None = None, use_caching: bool = False, name: object = None
    ) -> None:
        super().__init__(str(name), tuple(providing_args or ()))
