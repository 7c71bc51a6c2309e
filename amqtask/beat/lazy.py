"""BeatLazyFunc: an argument of a periodic task that is worked out when the task is sent (celery/beat.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from amqtask.ground.shapes import Keywords


class BeatLazyFunc:
    """`"kwargs": {"now": BeatLazyFunc(datetime.now)}`: the function is called each time the entry is sent."""

    def __init__(self, func: Callable[..., object], *args: object, **kwargs: object) -> None:
        self._function = func
        self._args = args
        self._kwargs = kwargs

    def __call__(self) -> object:
        """What the function says now."""
        return self._function(*self._args, **self._kwargs)

    delay = __call__


def evaluated(args: Iterable[object], kwargs: Keywords) -> tuple[tuple[object, ...], dict[str, object]]:
    """The arguments, with lazy ones worked out."""
    return (
        tuple(value() if isinstance(value, BeatLazyFunc) else value for value in args),
        {key: value() if isinstance(value, BeatLazyFunc) else value for key, value in kwargs.items()},
    )
