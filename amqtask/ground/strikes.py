"""Exceptions that are raised into a call from outside, by a signal handler (a time limit, an alarm) or by another thread. They
are meant for whoever makes the call; but many are OSErrors, as the network's are, and libraries make errors of their own of them.
"""

from __future__ import annotations

import sys
from asyncio import CancelledError
from collections.abc import Iterator
from types import FrameType

# Where errors are from that mean the network: classes that nobody else raises, and those of Python's, which anybody may raise;
# the modules that raise the latter then.
_LIBRARIES = frozenset({"redis", "hiredis", "amqtask", "dns", "idna"})
_PYTHON = sys.stdlib_module_names
_MAKERS = _LIBRARIES | _PYTHON | {"async_timeout", "uvloop", "eventlet", "gevent"}


def let_through(error: BaseException) -> None:
    """Raise what struck from outside, if this error, which was just caught, is that, or was made of it."""
    strike = strike_in(error)
    if strike is not None:
        raise strike


def strike_in(error: BaseException) -> BaseException | None:
    """What struck from outside, if this error, which was just caught, is that, or was made of it. What a caller of the code that
    caught it is about to handle is none of it, though Python takes it for its context."""
    callers = set(_callers(error))
    link: BaseException | None = error
    for _ in range(20):
        if link is None or _handler(link) in callers:
            return None
        if _is_from_outside(link):
            return link
        link = link.__cause__ or link.__context__
    return None


def _handler(error: BaseException) -> FrameType | None:
    """Where it was caught."""
    return None if error.__traceback__ is None else error.__traceback__.tb_frame


def _callers(error: BaseException) -> Iterator[FrameType]:
    """Of the code that caught it."""
    frame = _handler(error)
    while frame is not None and (frame := frame.f_back) is not None:
        yield frame


def _is_from_outside(error: BaseException) -> bool:
    root = _root(type(error).__module__)
    # A coroutine's timeout is made of a cancellation, and a generator may be closed on the way.
    if root in _LIBRARIES or isinstance(error, (CancelledError, GeneratorExit)):
        return False
    if root not in _PYTHON:
        return True
    tb = error.__traceback__
    if tb is None:
        return False
    while tb.tb_next is not None:
        tb = tb.tb_next
    module = _module(tb.tb_frame)
    # Another thread gives a class, whose exception has no arguments.
    return module not in _MAKERS or (module == "amqtask" and not error.args)


def _module(frame: FrameType) -> str:
    return _root(str(frame.f_globals.get("__name__", "")))


def _root(name: str) -> str:
    return name.partition(".")[0]
