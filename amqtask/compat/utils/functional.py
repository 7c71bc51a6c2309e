"""`celery.utils.functional`."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import chain as _chain
from itertools import islice
from typing import Any

__all__ = [
    "LRUCache", "chunks", "dictfilter", "first", "firstmethod", "fun_accepts_kwargs", "is_list", "lazy", "maybe", "maybe_list",
    "memoize", "noop", "padlist", "regen", "uniq",
]  # fmt: skip


def noop(*args: object, **kwargs: object) -> None:
    """Do nothing."""


def is_list(obj: object, scalars: tuple[type, ...] = (Mapping, str), iters: tuple[type, ...] = (Iterable,)) -> bool:
    """Whether a value is a list or another iterable, and no text or dictionary."""
    return isinstance(obj, iters) and not isinstance(obj, scalars or ())


def maybe_list(obj: object, scalars: tuple[type, ...] = (Mapping, str)) -> Any:
    """A value as a list, unless it is one or None."""
    return obj if obj is None or is_list(obj, scalars) else [obj]


def maybe(typ: Callable[[Any], object], val: object) -> Any:
    """A value converted by a type, unless it is None."""
    return typ(val) if val is not None else val


def first(predicate: Callable[[Any], object] | None, it: Iterable[object]) -> Any:
    """The first item for which the predicate is true (or that is not None); None when there is none."""
    fits = predicate or (lambda item: item is not None)
    return next((item for item in it if fits(item)), None)


def firstmethod(method: str, on_call: object = None) -> Callable[..., Any]:
    """A function that calls the method of each in turn until one answers."""

    def call(it: Iterable[object], *args: object, **kwargs: object) -> object:
        for item in it:
            answer = getattr(item, method)(*args, **kwargs)
            if answer is not None:
                return answer
        return None

    return call


def chunks(it: Iterable[object], n: int) -> Iterator[list[Any]]:
    """Lists of `n` items."""
    remaining = iter(it)
    for item in remaining:
        yield [item, *islice(remaining, n - 1)]


def padlist(container: Iterable[object], size: int, default: object = None) -> list[Any]:
    """The first `size` items, filled up."""
    items = list(container)[:size]
    return items + [default] * (size - len(items))


def uniq(it: Iterable[object]) -> Iterator[Any]:
    """Each item once, in order."""
    return iter(dict.fromkeys(it))


def regen(it: Iterable[object]) -> list[Any]:
    """A list of an iterable's items, which can be iterated again."""
    return it if isinstance(it, list) else list(it)


def dictfilter(d: Mapping[Any, object] | None = None, **kw: object) -> dict[Any, Any]:
    """A dictionary without the values that are None."""
    return {key: value for key, value in _chain((d or {}).items(), kw.items()) if value is not None}


def fun_accepts_kwargs(fun: Callable[..., object]) -> bool:
    """Whether a function takes any keyword."""
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in inspect.signature(fun).parameters.values())


def memoize(
    maxsize: int | None = None, keyfun: object = None, Cache: object = None
) -> Callable[[Callable[..., Any]], Any]:
    """Remember what a function returned."""
    return lru_cache(maxsize=maxsize)


class lazy:
    """A call that is made when its value is wanted: `lazy(f, 1)()`."""

    def __init__(self, fun: Callable[..., object], *args: object, **kwargs: object) -> None:
        self._fun, self._args, self._kwargs = fun, args, kwargs

    def __call__(self) -> Any:
        return self.evaluate()

    def evaluate(self) -> Any:
        """Make the call."""
        return self._fun(*self._args, **self._kwargs)


class LRUCache(OrderedDict[Any, Any]):
    """A dictionary that forgets what was used longest ago."""

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()
        self.limit = limit

    def __getitem__(self, key: object) -> Any:
        self.move_to_end(key)
        return super().__getitem__(key)

    def __setitem__(self, key: object, value: object) -> None:
        super().__setitem__(key, value)
        if self.limit and len(self) > self.limit:
            self.popitem(last=False)
