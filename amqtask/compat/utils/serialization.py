"""`celery.utils.serialization`."""

from __future__ import annotations

import base64
import pickle
from typing import Any

__all__ = ["UnpickleableExceptionWrapper", "b64decode", "b64encode", "strtobool", "subclass_exception"]

_WORDS = {
    "false": False, "no": False, "0": False, "off": False, "true": True, "yes": True, "1": True, "on": True,
}  # fmt: skip


def b64encode(s: bytes | str) -> str:
    """Base 64 as text."""
    return base64.b64encode(s.encode() if isinstance(s, str) else s).decode()


def b64decode(s: bytes | str) -> bytes:
    """And back."""
    return base64.b64decode(s)


def strtobool(term: Any, table: dict[str, bool] | None = None) -> Any:
    """The truth value of a word. Raises: TypeError."""
    if not isinstance(term, str):
        return term
    try:
        return (table or _WORDS)[term.lower()]
    except KeyError:
        raise TypeError(f"cannot coerce {term!r} to type bool") from None


def subclass_exception(name: str, parent: type[BaseException], module: str) -> type[BaseException]:
    """A class of exceptions."""
    return type(name, (parent,), {"__module__": module})


class UnpickleableExceptionWrapper(Exception):
    """Stands for an exception that cannot be pickled."""

    def __init__(self, exc_module: str, exc_cls_name: str, exc_args: tuple[Any, ...], text: str | None = None) -> None:
        super().__init__(exc_module, exc_cls_name, exc_args, text)
        self.exc_module, self.exc_cls_name, self.exc_args, self.text = exc_module, exc_cls_name, exc_args, text

    @classmethod
    def from_exception(cls, exc: BaseException) -> UnpickleableExceptionWrapper:
        """Of an exception; arguments that cannot be pickled are shown."""
        return cls(type(exc).__module__, type(exc).__name__, tuple(map(_pickleable, exc.args)), repr(exc))

    def __str__(self) -> str:
        return self.text or self.exc_cls_name


def _pickleable(value: Any) -> Any:
    try:
        pickle.loads(pickle.dumps(value))
    except Exception:  # noqa: BLE001 - the value's own methods may raise anything
        return repr(value)
    return value
