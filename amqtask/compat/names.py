"""Short names, each at a place of Celery's that `amqtask.compat` lists: where one comes from is said there."""

from __future__ import annotations

import copy
import logging
import os
import platform
import signal as _signals
import sys
import time
from abc import ABC
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from amqtask import ground, signals
from amqtask.backends.registry import find_named
from amqtask.compat.local import Proxy
from amqtask.ground.current import current_app
from amqtask.ground.plugins import load
from amqtask.protocol.entities import Exchange
from amqtask.result import AsyncResult
from amqtask.results import ResultSet

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.ground.shapes import EventDict


# -- celery


class VersionInfo(NamedTuple):
    """`amqtask.VERSION >= (0, 1)`."""

    major: int
    minor: int
    micro: int
    releaselevel: str = ""
    serial: str = ""


VERSION = VersionInfo(*map(int, ground.VERSION.split(".")[:3]))  # type: ignore[arg-type] # three numbers


# -- celery.app


def app_or_default(app: AmqTask | None = None) -> AmqTask:
    """`app`, else the current application."""
    return current_app() if app is None else app


def bugreport(app: AmqTask | None = None) -> str:
    """Versions, and the settings without secrets; `amqtask report` says more."""
    settings = app_or_default(app).conf.table()
    software, system = f"amqtask:{ground.VERSION} py:{platform.python_version()}", platform.platform()
    rows = (f"{name}: {value!r}" for name, value in sorted(settings.items()))
    return "\n".join([f"software -> {software}", f"platform -> {system}", "", *rows])


# -- celery.app.backends


def by_name(backend: str | None = None, loader: object = None, extension_namespace: str = "") -> Any:
    """The class of a result store by its name. Raises: ConfigurationError."""
    return find_named(backend or "")[0]


def by_url(backend: str | None = None, loader: object = None) -> tuple[Any, str | None]:
    """The class of a result store, and the URL."""
    backend_class, url = find_named(backend or "")
    return backend_class, url if url and "://" in url else None


# -- celery.result and celery.states

PRECEDENCE = ("SUCCESS", "FAILURE", None, "REVOKED", "STARTED", "RECEIVED", "REJECTED", "RETRY", "PENDING")


class ResultBase(ABC):  # noqa: B024 - only for isinstance
    """Any kind of result, for `isinstance`."""


ResultBase.register(AsyncResult)
ResultBase.register(ResultSet)


def precedence(name: str) -> int:
    """The place of a state: what is smaller says more."""
    return PRECEDENCE.index(name) if name in PRECEDENCE else PRECEDENCE.index(None)


class state(str):
    """`state("SUCCESS") > state("PENDING")`."""

    __slots__ = ()

    def __gt__(self, other: str) -> bool:
        return precedence(self) < precedence(other)

    def __ge__(self, other: str) -> bool:
        return precedence(self) <= precedence(other)

    def __lt__(self, other: str) -> bool:
        return precedence(self) > precedence(other)

    def __le__(self, other: str) -> bool:
        return precedence(self) >= precedence(other)


# -- celery.utils.collections, .dispatch, .log and .objects


class AttributeDict(dict[str, Any]):
    """Its items are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


class Signal(signals.Signal):
    """A signal of one's own, made as Celery's are."""

    def __init__(
        self, providing_args: Iterable[str] | None = None, use_caching: bool = False, name: object = None
    ) -> None:
        super().__init__(str(name), tuple(providing_args or ()))


LOG_LEVELS: dict[Any, Any] = {
    **logging._nameToLevel,
    "FATAL": logging.CRITICAL,
    **{number: name for name, number in logging._nameToLevel.items()},
}
base_logger = logging.getLogger("amqtask")


def mlevel(level: int | str | None) -> int | str | None:
    """The number of a level's name."""
    return LOG_LEVELS[level.upper()] if level and not isinstance(level, int) else level


def mro_lookup(cls: type, attr: str, stop: Any = None, monkey_patched: object = None) -> type | None:
    """The class that defines an attribute."""
    for ancestor in cls.mro():
        if stop and ancestor in stop:
            return None
        if attr in ancestor.__dict__:
            return ancestor
    return None


# -- celery.events.event

event_exchange = Exchange("celeryev", type="topic")


def Event(
    type: str, _fields: EventDict | None = None, __dict__: type = dict, __now__: Any = time.time, **fields: object
) -> Any:
    """An event as the dictionary that it is on the wire."""
    event = {**(_fields or {}), **fields, "type": type}
    event.setdefault("timestamp", __now__())
    return event


def group_from(type: str) -> str:
    """`task` of `task-sent`."""
    return type.partition("-")[0]


def get_exchange(conn: object = None, name: str = "celeryev") -> Exchange:
    """The exchange that events go to."""
    return copy.copy(event_exchange) if name == event_exchange.name else Exchange(name, type="topic")


# -- celery.platforms

SYSTEM = sys.platform.capitalize()
IS_macOS, IS_WINDOWS = sys.platform == "darwin", sys.platform == "win32"
EX_OK, EX_FAILURE, EX_USAGE, EX_UNAVAILABLE = 0, 1, 64, 69


def isatty(fh: object) -> bool:
    """Whether it is a terminal."""
    return bool(fh is not None and os.isatty(fh.fileno()))  # type: ignore[attr-defined] # a file, or it has no fileno


def signal_name(signum: int) -> str:
    """`TERM` of 15."""
    return _signals.Signals(signum).name.removeprefix("SIG")


# -- celery.registry

tasks = Proxy(lambda: current_app().tasks)
registry = load("amqtask.registry")
