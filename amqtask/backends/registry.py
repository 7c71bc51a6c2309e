"""Find a result backend by its URL's scheme (entry-point group `amqtask.backends`)."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from amqtask.exceptions import ConfigurationError
from amqtask.ground.imports import load_path
from amqtask.ground.plugins import plugins

if TYPE_CHECKING:
    from amqtask.backends.contract import BackendOptions, ResultBackend

GROUP = "amqtask.backends"
# Ours, which are found without importlib.metadata, for which a producer would pay 20 ms; the entry points say the same.
OURS = (
    "rpc",
    "redis",
    "rediss",
    "redis+cluster",
    "rediss+cluster",
    "sentinel",
    "cache+memory",
    "cache+memcached",
    "db",
    "file",
    "django-db",
    "django-cache",
    "mongodb",
    "mongodb+srv",
)
# What a missing library is installed with.
EXTRAS = {
    "rediss": "redis",
    "redis+cluster": "redis",
    "rediss+cluster": "redis",
    "sentinel": "redis",
    "cache+memcached": "memcached",
    "db": "sqlalchemy",
    "django-db": "django",
    "django-cache": "django",
    "mongodb+srv": "mongodb",
}
DISABLED = frozenset({"", "disabled", "none"})


def open_backend(url: str | None, options: BackendOptions) -> ResultBackend | None:
    """The backend for a URL (or bare scheme); None for no URL and `disabled://`.

    Raises: ConfigurationError for an unknown scheme or a missing library.
    """
    scheme = (url or "").partition("://")[0].lower()
    if scheme in DISABLED:
        return None
    backend: ResultBackend = find_backend(scheme)(options)
    return backend


def find_backend(scheme: str) -> Any:
    """The class of a scheme. Raises: ConfigurationError for an unknown one or a missing library."""
    # What follows db+ is SQLAlchemy's: db+postgresql://, db+mysql+pymysql://.
    scheme = "db" if scheme.startswith("db+") else scheme
    try:
        return _our_backend(scheme) or plugins().django_backend(scheme) or _other_backend(scheme)
    except ImportError as error:
        extra = EXTRAS.get(scheme, scheme)
        raise ConfigurationError(
            f'the result backend {scheme}:// needs a library that is not installed: pip install "amqtask[{extra}]" ({error})'
        ) from error


def _our_backend(scheme: str) -> Any:
    match scheme:
        case "rpc":
            from amqtask.backends.rpc import RpcBackend

            return RpcBackend
        case "redis" | "rediss" | "redis+cluster" | "rediss+cluster" | "sentinel":
            from amqtask.backends.redis import RedisBackend

            return RedisBackend
        case "cache+memory":
            from amqtask.backends.memory import MemoryBackend

            return MemoryBackend
        case "cache+memcached":
            from amqtask.backends.memcached import MemcachedBackend

            return MemcachedBackend
        case "db":
            from amqtask.backends.sql import SqlBackend

            return SqlBackend
        case "file":
            from amqtask.backends.filesystem import FileBackend

            return FileBackend
        case "mongodb" | "mongodb+srv":
            from amqtask.backends.mongodb import MongoBackend

            return MongoBackend
    return None


def _other_backend(scheme: str) -> Any:
    from importlib.metadata import entry_points

    paths = {point.name: point.value for point in entry_points(group=GROUP)}
    if scheme in paths:
        return load_path(paths[scheme])
    schemes = sorted({*OURS, *paths})
    near = difflib.get_close_matches(scheme, schemes, n=1)
    hint = f" Did you mean {near[0]}://?" if near else ""
    raise ConfigurationError(f"no result backend for {scheme}://.{hint} There are: {', '.join(schemes)}.")
