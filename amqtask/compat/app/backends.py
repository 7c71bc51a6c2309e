"""`celery.app.backends`: the class of a result store by its name or URL."""

from __future__ import annotations

from typing import Any

from amqtask.backends.registry import find_backend


def by_name(backend: str | None = None, loader: Any = None, extension_namespace: str = "") -> Any:
    """The class. Raises: ConfigurationError."""
    return find_backend((backend or "").partition("://")[0].lower())


def by_url(backend: str | None = None, loader: Any = None) -> tuple[Any, str | None]:
    """The class, and the URL."""
    return by_name(backend), backend if backend and "://" in backend else None
