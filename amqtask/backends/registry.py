"""Find a result backend by its URL's scheme (entry-point groups `amqtask.backends` and Celery's), or by its class."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from amqtask.backends.contract import MadeForApp, StoreDefaults
from amqtask.exceptions import ConfigurationError
from amqtask.ground.plugins import completed, load_path, near_names, plugins
from amqtask.ground.printable import mask_urls
from amqtask.transport.redis import SCHEMES

if TYPE_CHECKING:
    from amqtask.backends.contract import BackendOptions, ResultBackend

GROUPS = ("amqtask.backends", "celery.result_backends")
# A class is named as `module:Class`, `module.Class`, or, with what it shall connect to, `module:Class+scheme://…`.
_CLASS = re.compile(r"(?P<module>[A-Za-z_][\w.]*)[:.](?P<name>[A-Za-z_]\w*)(\+(?P<url>[\w+.-]+://.*))?")
DISABLED = frozenset({"", "disabled", "none"})


def open_backend(url: str | None, options: BackendOptions, app: Any = None) -> ResultBackend | None:
    """The backend for a URL (or bare scheme, or a class); None for no URL and `disabled://`.

    `app` is whom a store that was written for Celery is made for.
    Raises: ConfigurationError for an unknown scheme, a missing library, or a class that is no store.
    """
    if (url or "").partition("://")[0].lower() in DISABLED:
        return None
    kind, address = find_named(url or "")
    kind = completed(kind, StoreDefaults)
    backend: ResultBackend = kind(app=app, url=address) if issubclass(kind, MadeForApp) else kind(options)
    return backend


def find_named(url: str) -> tuple[object, str | None]:
    """The class that a URL, a scheme or a class's own name means, and what it shall connect to. Raises: ConfigurationError."""
    named = _CLASS.fullmatch(url)
    kind = (
        find_backend(url.partition("://")[0].lower()) if named is None else _find_class(named["module"], named["name"])
    )
    if not isinstance(kind, type) or not hasattr(kind, "iter_ready"):
        raise ConfigurationError(
            f"result_backend {mask_urls(url)!r} names {kind!r}, which is no result store: derive it from "
            "amqtask.backends.polling.PollingBackend or, as with Celery, from amqtask.backends.base.BaseBackend or "
            "KeyValueStoreBackend"
        )
    return kind, url if named is None else named["url"]


def _find_class(module: str, name: str) -> object:
    try:
        return load_path(f"{module}:{name}")
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(
            f"result_backend names the class {name} of {module}, which cannot be imported: {error}"
        ) from error


def find_backend(scheme: str) -> object:
    """The class of a scheme. Raises: ConfigurationError for an unknown one or a missing library."""
    # What follows db+ is SQLAlchemy's: db+postgresql://, db+mysql+pymysql://.
    scheme = "db" if scheme.startswith("db+") else scheme
    find, extra = (
        (_redis, "redis") if scheme in SCHEMES else OURS.get(scheme) or (partial(_other_backend, scheme), scheme)
    )
    try:
        return find()
    except ImportError as error:
        raise ConfigurationError(
            f'the result backend {scheme}:// needs a library that is not installed: pip install "amqtask[{extra}]" ({error})'
        ) from error


def _memory() -> object:
    from amqtask.backends.memory import MemoryBackend

    return MemoryBackend


def _memcached() -> object:
    from amqtask.backends.memcached import MemcachedBackend

    return MemcachedBackend


def _files() -> object:
    from amqtask.backends.filesystem import FileBackend

    return FileBackend


def _mongodb() -> object:
    from amqtask.backends.mongodb import MongoBackend

    return MongoBackend


def _redis() -> object:
    from amqtask.backends.redis import RedisBackend

    return RedisBackend


def _rpc() -> object:
    from amqtask.backends.rpc import RpcBackend

    return RpcBackend


def _sql() -> object:
    from amqtask.backends.sql import SqlBackend

    return SqlBackend


def _django(scheme: str) -> object:
    return plugins().django_backend(scheme)


# Ours, and what a missing library of theirs is installed with. They are found without importlib.metadata, for which a producer
# would pay 20 ms; the entry points say the same.
OURS: dict[str, tuple[Callable[[], object], str]] = {
    "rpc": (_rpc, ""),
    **dict.fromkeys(("redis", "rediss", "redis+cluster", "rediss+cluster", "sentinel"), (_redis, "redis")),
    "cache+memory": (_memory, ""),
    "cache+memcached": (_memcached, "memcached"),
    "db": (_sql, "sqlalchemy"),
    "file": (_files, ""),
    "django-db": (partial(_django, "django-db"), "django"),
    "django-cache": (partial(_django, "django-cache"), "django"),
    **dict.fromkeys(("mongodb", "mongodb+srv"), (_mongodb, "mongodb")),
}


def _other_backend(scheme: str) -> object:
    from importlib.metadata import entry_points

    paths = {point.name: point.value for group in reversed(GROUPS) for point in entry_points(group=group)}
    if scheme in paths:
        return load_path(paths[scheme])
    schemes = sorted({*OURS, *SCHEMES, *paths})
    near = near_names(scheme, schemes)
    hint = f" Did you mean {near[0]}://?" if near else ""
    raise ConfigurationError(f"no result backend for {scheme}://.{hint} There are: {', '.join(schemes)}.")
