"""Find a result backend by its URL's scheme (entry-point group `amqtask.backends`)."""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING, Any

from amqtask.exceptions import ConfigurationError

if TYPE_CHECKING:
    from amqtask.backends.contract import BackendOptions, ResultBackend

GROUP = "amqtask.backends"
# Ours by name, so that a producer does not pay for importlib.metadata (20 ms); the entry points say the same.
OURS = {
    "rpc": "amqtask.backends.rpc:RpcBackend",
    "redis": "amqtask.backends.redis:RedisBackend",
    "rediss": "amqtask.backends.redis:RedisBackend",
    "redis+cluster": "amqtask.backends.redis:RedisBackend",
    "rediss+cluster": "amqtask.backends.redis:RedisBackend",
    "sentinel": "amqtask.backends.redis:RedisBackend",
    "cache+memory": "amqtask.backends.memory:MemoryBackend",
    "cache+memcached": "amqtask.backends.memcached:MemcachedBackend",
    "db": "amqtask.backends.sql:SqlBackend",
    "file": "amqtask.backends.filesystem:FileBackend",
    "django-db": "amqtask.contrib.django.backend:DatabaseBackend",
    "django-cache": "amqtask.contrib.django.cache:CacheBackend",
    "mongodb": "amqtask.backends.mongodb:MongoBackend",
    "mongodb+srv": "amqtask.backends.mongodb:MongoBackend",
}
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
    path = OURS.get(scheme) or _plugin(scheme)
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        extra = EXTRAS.get(scheme, scheme)
        raise ConfigurationError(
            f'the result backend {scheme}:// needs a library that is not installed: pip install "amqtask[{extra}]" ({error})'
        ) from error


def _plugin(scheme: str) -> str:
    metadata = importlib.import_module("importlib.metadata")
    paths = {point.name: point.value for point in metadata.entry_points(group=GROUP)}
    if scheme in paths:
        return str(paths[scheme])
    schemes = sorted({*OURS, *paths})
    near = difflib.get_close_matches(scheme, schemes, n=1)
    hint = f" Did you mean {near[0]}://?" if near else ""
    raise ConfigurationError(f"no result backend for {scheme}://.{hint} There are: {', '.join(schemes)}.")
