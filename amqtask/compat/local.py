"""`celery.local`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from amqtask.ground.plugins import load

if TYPE_CHECKING:
    from amqtask.ground.shapes import Arguments

__all__ = ["PromiseProxy", "Proxy", "maybe_evaluate", "try_import"]


class Proxy:
    """Stands for what a function returns, asked each time."""

    __slots__ = ("_found",)

    def __init__(self, local: Callable[..., Any], args: Arguments = (), kwargs: Any = None, name: Any = None) -> None:
        object.__setattr__(self, "_found", lambda: local(*args, **(kwargs or {})))

    def _get_current_object(self) -> Any:
        return object.__getattribute__(self, "_found")()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._get_current_object(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._get_current_object(), name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._get_current_object()(*args, **kwargs)

    def __getitem__(self, name: Any) -> Any:
        return self._get_current_object()[name]

    def __contains__(self, item: Any) -> bool:
        return item in self._get_current_object()

    def __iter__(self) -> Any:
        return iter(self._get_current_object())

    def __len__(self) -> int:
        return len(self._get_current_object())

    def __bool__(self) -> bool:
        return bool(self._get_current_object())

    def __eq__(self, other: object) -> bool:
        return bool(self._get_current_object() == other)

    def __hash__(self) -> int:
        return hash(self._get_current_object())

    def __repr__(self) -> str:
        return repr(self._get_current_object())


class PromiseProxy(Proxy):
    """Asked once."""

    __slots__ = ()

    def __init__(self, local: Callable[..., Any], args: Arguments = (), kwargs: Any = None, name: Any = None) -> None:
        kept: list[object] = []

        def found() -> object:
            if not kept:
                kept.append(local(*args, **(kwargs or {})))
            return kept[0]

        super().__init__(found)


def maybe_evaluate(obj: Any) -> Any:
    """What a promise stands for; anything else is itself."""
    return obj._get_current_object() if isinstance(obj, PromiseProxy) else obj


def try_import(module: str, default: Any = None) -> Any:
    """The module, or `default` where it cannot be imported."""
    try:
        return load(module)
    except ImportError:
        return default
