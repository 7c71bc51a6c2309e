"""`celery.contrib.testing.app`: applications for tests, on the in-memory broker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from amqtask.app import AmqTask
from amqtask.ground.current import replaced

if TYPE_CHECKING:
    from amqtask.ground.shapes import SettingValues

__all__ = ["DEFAULT_TEST_CONFIG", "TestApp", "Trap", "setup_default_app"]

DEFAULT_TEST_CONFIG = {"broker_url": "memory://", "result_backend": "cache+memory://"}


class Trap:
    """Stands for an application that must not be used."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("a test used the current application and must not")


def TestApp(
    name: str | None = None,
    config: SettingValues | None = None,
    enable_logging: bool = False,
    set_as_current: bool = False,
    log: object = None,
    backend: str | None = None,
    broker: str | None = None,
    **options: Any,
) -> AmqTask:
    """An application on the in-memory broker, unless `config` says otherwise."""
    app = AmqTask(name or "celery.tests", set_as_current=set_as_current, **options)
    app.conf.update({**DEFAULT_TEST_CONFIG, **(config or {})})
    if broker:
        app.conf.broker_url = broker
    if backend:
        app.conf.result_backend = backend
    return app


TestApp.__test__ = False  # type: ignore[attr-defined] # pytest would take it for a test


@contextmanager
def setup_default_app(app: AmqTask, use_trap: bool = False) -> Iterator[None]:
    """In the block `app` is the current application."""
    with replaced(app):
        yield
