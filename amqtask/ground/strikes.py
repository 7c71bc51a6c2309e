"""Exceptions that are raised into a call from outside, by a signal handler (a time limit, an alarm) or by another thread. They
are meant for whoever makes the call; but many are OSErrors, as the network's are, and libraries make errors of their own of them.
"""

from __future__ import annotations

import sys
from asyncio import CancelledError
from types import FrameType

# Where errors are from that mean the network: classes that nobody else raises, and those of Python's, which anybody may raise;
# the modules that raise the latter then.
_LIBRARIES = frozenset({"redis", "hiredis", "amqtask", "dns", "idna"})
_PYTHON = sys.stdlib_module_names
_MAKERS = _LIBRARIES | _PYTHON | {"async_timeout", "uvloop", "eventlet", "gevent"}


def handled() -> BaseException | None:
    """What the caller is about to handle; for `let_through`, before anything else is caught."""
    return sys.exc_info()[1]


def let_through(error: BaseException, before: BaseException | None = None) -> None:
    """Raise what struck from outside, if this error is that, or was made of it. `before`: see `handled`."""
    strike = strike_in(error, before)
    if strike is not None:
        raise strike


def strike_in(error: BaseException, before: BaseException | None = None) -> BaseException | None:
    """What struck from outside, if this error is that, or was made of it. `before`: see `handled`."""
    link: BaseException | None = error
    for _ in range(20):
        if link is None or link is before:
            return None
        if _is_from_outside(link):
            return link
        link = link.__cause__ or link.__context__
    return None


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
