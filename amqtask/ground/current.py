"""The current app, and the shared tasks that wait for apps."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from amqtask.ground.plugins import plugins

# The application's class, which stands above this module: `amqtask.current_app` says which one it is.
App = TypeVar("App")
_default: list[object] = []
# What `shared_task` noted: each makes one task in an app. Apps that exist and those to come take them.
_shared: list[Callable[[Any], object]] = []
_apps: weakref.WeakSet[Any] = weakref.WeakSet()


class CurrentApp(Generic[App]):
    """The app that the command line runs, else the one made last: `current_app()`, or `current_app.conf` and the like. Before
    there is any, as in Celery, one named `default` with default settings, which the first real one replaces.
    """

    def __call__(self) -> App:
        """The app itself."""
        app: App = find_current_app() or _make_default()
        return app

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self(), name)

    def __repr__(self) -> str:
        return f"<current_app: {find_current_app()!r}>"


current_app: CurrentApp[Any] = CurrentApp()


def _make_default() -> Any:
    app = plugins().default_app()
    set_current(app)
    return app


def find_current_app() -> Any:
    """The current application, or None."""
    return _default[-1] if _default else None


def set_current(app: object) -> None:
    """Make `app` the process default."""
    _default[:] = [app]


@contextmanager
def replaced(app: object) -> Iterator[None]:
    """In the block `app` is the process default. For tests."""
    before = list(_default)
    set_current(app)
    try:
        yield
    finally:
        _default[:] = before


def note_app(app: object) -> None:
    """An app that takes shared tasks when it is finalised."""
    _apps.add(app)


def note_shared(make: Callable[[Any], object]) -> None:
    """A shared task; apps that are finalised already get it now."""
    _shared.append(make)
    for app in list(_apps):
        if app.is_finalized:
            make(app)


def shared_tasks() -> tuple[Callable[[Any], object], ...]:
    """All that `shared_task` noted."""
    return tuple(_shared)
