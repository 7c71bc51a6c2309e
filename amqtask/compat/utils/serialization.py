"""`celery.utils.serialization`."""

from __future__ import annotations

import base64
import numbers
import pickle
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import date, datetime, time, timedelta
from itertools import takewhile
from typing import Any, NoReturn

from amqtask.protocol.task import saferepr

__all__ = [
    "UnpickleableExceptionWrapper",
    "b64decode",
    "b64encode",
    "create_exception_cls",
    "ensure_serializable",
    "find_pickleable_exception",
    "get_pickleable_etype",
    "get_pickleable_exception",
    "get_pickled_exception",
    "jsonify",
    "raise_with_context",
    "strtobool",
    "subclass_exception",
]

STRTOBOOL_DEFAULT_TABLE = {
    "false": False, "no": False, "0": False, "off": False, "true": True, "yes": True, "1": True, "on": True,
}  # fmt: skip
# No error is told by these instead of its own class.
_TOO_WIDE = (Exception, BaseException, object)


def b64encode(s: bytes | str) -> str:
    """Base 64 as text."""
    return base64.b64encode(s.encode() if isinstance(s, str) else s).decode()


def b64decode(s: bytes | str) -> bytes:
    """And back."""
    return base64.b64decode(s)


def strtobool(term: object, table: dict[str, bool] | None = None) -> Any:
    """The truth value of a word. Raises: TypeError."""
    if not isinstance(term, str):
        return term
    try:
        return (table or STRTOBOOL_DEFAULT_TABLE)[term.lower()]
    except KeyError:
        raise TypeError(f"Cannot coerce {term!r} to type bool") from None


def subclass_exception(name: str, parent: type[BaseException], module: str) -> type[BaseException]:
    """A class of exceptions."""
    return type(name, (parent,), {"__module__": module})


def create_exception_cls(name: str, module: str, parent: type[BaseException] | None = None) -> type[BaseException]:
    """The same; derived from Exception, unless told."""
    return subclass_exception(name, parent or Exception, module)


def raise_with_context(exc: BaseException) -> NoReturn:
    """Raise it; what is being handled, if that is something else, is its cause."""
    handled = sys.exc_info()[1]
    if handled is None or handled is exc:
        raise exc
    raise exc from handled


def ensure_serializable(items: Iterable[object], encoder: Callable[[Any], object]) -> tuple[Any, ...]:
    """The items, those that the encoder cannot take as text."""
    return tuple(item if _succeeds(lambda item=item: encoder(item)) else saferepr(item) for item in items)  # type: ignore[misc]


class UnpickleableExceptionWrapper(Exception):
    """Stands for an exception that cannot be pickled."""

    def __init__(self, exc_module: str, exc_cls_name: str, exc_args: Iterable[object], text: str | None = None) -> None:
        arguments = ensure_serializable(exc_args, _round)
        super().__init__(exc_module, exc_cls_name, arguments, text)
        self.exc_module, self.exc_cls_name, self.exc_args, self.text = exc_module, exc_cls_name, arguments, text

    @classmethod
    def from_exception(cls, exc: BaseException) -> UnpickleableExceptionWrapper:
        """Of an exception; arguments that cannot be pickled are shown."""
        wrapper = cls(type(exc).__module__, type(exc).__name__, exc.args, saferepr(exc))
        return wrapper.with_traceback(exc.__traceback__)

    def restore(self) -> BaseException:
        """One of a class with the same name."""
        return create_exception_cls(self.exc_cls_name, self.exc_module)(*self.exc_args)

    def __str__(self) -> str:
        return self.text or self.exc_cls_name


def find_pickleable_exception(
    exc: BaseException,
    loads: Callable[[bytes], object] = pickle.loads,
    dumps: Callable[[Any], bytes] = pickle.dumps,
) -> BaseException | None:
    """The same of the nearest class above it that can be pickled; None, if there is none below Exception."""
    for parent in takewhile(lambda ancestor: ancestor not in _TOO_WIDE, type(exc).__mro__):
        try:
            rebuilt = parent(*exc.args)
            loads(dumps(rebuilt))
        except Exception:  # noqa: BLE001 - a class's own constructor and methods may raise anything
            continue
        assert isinstance(rebuilt, BaseException)
        return rebuilt
    return None


def get_pickleable_exception(exc: BaseException) -> BaseException:
    """It, or what stands for it where it cannot be pickled."""
    if _succeeds(lambda: _round(exc)):
        return exc
    return find_pickleable_exception(exc) or UnpickleableExceptionWrapper.from_exception(exc)


def get_pickleable_etype(
    cls: type[BaseException],
    loads: Callable[[bytes], object] = pickle.loads,
    dumps: Callable[[Any], bytes] = pickle.dumps,
) -> type[BaseException]:
    """The class, or Exception where it cannot be pickled."""
    return cls if _succeeds(lambda: loads(dumps(cls))) else Exception


def get_pickled_exception(exc: BaseException) -> BaseException:
    """What `get_pickleable_exception` was given, as far as it can be had again."""
    return exc.restore() if isinstance(exc, UnpickleableExceptionWrapper) else exc


def _round(value: object) -> object:
    return pickle.loads(pickle.dumps(value))


def _succeeds(work: Callable[[], object]) -> bool:
    try:
        work()
    except Exception:  # noqa: BLE001 - a value's own methods may raise anything
        return False
    return True


def jsonify(
    obj: object,
    builtin_types: tuple[type, ...] = (numbers.Real, str),
    key: object = None,
    keyfilter: Callable[[Any], object] | None = None,
    unknown_type_filter: Callable[[Any], object] | None = None,
) -> Any:
    """As JSON can carry it: times as text, tuples as lists; of mappings the keys that `keyfilter` lets through.

    Raises: ValueError for anything else, where `unknown_type_filter` does not say what it becomes.
    """

    def inner(value: object, name: object = key) -> object:
        return jsonify(value, builtin_types, name, keyfilter, unknown_type_filter)

    if hasattr(obj, "as_dict"):  # kombu's entities
        obj = obj.as_dict(recurse=True)
    if obj is None or isinstance(obj, builtin_types):
        return obj
    if isinstance(obj, (tuple, list)):
        return [inner(item) for item in obj]
    if isinstance(obj, Mapping):
        return {name: inner(value, name) for name, value in obj.items() if keyfilter is None or keyfilter(name)}
    if isinstance(obj, (date, time)):
        return _moment(obj)
    if isinstance(obj, timedelta):
        return str(obj)
    if unknown_type_filter is None:
        raise ValueError(f"Unsupported type: {type(obj)!r} {obj!r} (parent: {key})")
    return unknown_type_filter(obj)


def _moment(when: date | time) -> str:
    """In milliseconds, as JavaScript writes it."""
    if isinstance(when, datetime):
        text = when.isoformat(timespec="milliseconds" if when.microsecond else "auto")
        return text.removesuffix("+00:00") + "Z" if text.endswith("+00:00") else text
    return when.isoformat()[:12] if isinstance(when, time) and when.microsecond else when.isoformat()
