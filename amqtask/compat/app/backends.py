"""`celery.app.backends`: the class of a result store by its name or URL."""

from __future__ import annotations

from typing import Any

from amqtask.backends.registry import find_named


def by_name(backend: str | None = None, loader: object = None, extension_namespace: str = "") -> Any:
    """The class. Raises: ConfigurationError."""
    return find_named(backend or "")[0]


def by_url(backend: str | None = None, loader: object = None) -> tuple[Any, str | None]:
    """The class, and the URL."""
    backend_class, url = find_named(backend or "")
    return backend_class, url if url and "://" in url else None
