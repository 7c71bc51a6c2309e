"""The current app, and the shared tasks that wait for apps."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from amqtask.ground.plugins import plugins

if TYPE_CHECKING:
    from amqtask.app import AmqTask

_default: list[Any] = []
# What `shared_task` noted: each makes one task in an app. Apps that exist and those to come take them.
_shared: list[Callable[[Any], Any]] = []
_apps: weakref.WeakSet[Any] = weakref.WeakSet()


class CurrentApp:
    """The app that the command line runs, else the one made last: `current_app()`, or `current_app.conf` and the like. Before
    there is any, as in Celery, one named `default` with default settings, which the first real one replaces.
    """

    def __call__(self) -> AmqTask:
        """The app itself."""
        return find_current_app() or _make_default()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self(), name)

    def __repr__(self) -> str:
        return f"<current_app: {find_current_app()!r}>"


current_app = CurrentApp()


def _make_default() -> AmqTask:
    app: AmqTask = plugins().default_app()
    set_current(app)
    return app


def find_current_app() -> AmqTask | None:
    """The current application, or None."""
    return _default[-1] if _default else None


def set_current(app: AmqTask) -> None:
    """Make `app` the process default."""
    _default[:] = [app]


@contextmanager
def replaced(app: AmqTask) -> Iterator[None]:
    """In the block `app` is the process default. For tests."""
    before = list(_default)
    set_current(app)
    try:
        yield
    finally:
        _default[:] = before


def note_app(app: AmqTask) -> None:
    """An app that takes shared tasks when it is finalised."""
    _apps.add(app)


def note_shared(make: Callable[[Any], Any]) -> None:
    """A shared task; apps that are finalised already get it now."""
    _shared.append(make)
    for app in list(_apps):
        if app.is_finalized:
            make(app)


def shared_tasks() -> tuple[Callable[[Any], Any], ...]:
    """All that `shared_task` noted."""
    return tuple(_shared)
