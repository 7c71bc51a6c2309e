"""The AmqTask application of a Django project."""

from __future__ import annotations

from typing import TYPE_CHECKING

from django.conf import settings

from amqtask.exceptions import AppNotFound
from amqtask.ground.current import find_current_app
from amqtask.ground.plugins import plugins

if TYPE_CHECKING:
    from amqtask.app import AmqTask


def project_app() -> AmqTask:
    """What the setting DJANGO_AMQTASK_APP names, else the application that was made in this process, else the one in
    the project's package (`<project>.amqtask`, `<project>.celery`).

    Raises: AppNotFound.
    """
    named = getattr(settings, "DJANGO_AMQTASK_APP", None)
    if named:
        return _load(str(named), "DJANGO_AMQTASK_APP")
    app: AmqTask | None = find_current_app()
    if app is not None:
        return app
    module = settings.SETTINGS_MODULE
    if not module:
        raise AppNotFound('say where the application is: DJANGO_AMQTASK_APP = "package.module:app" in the settings')
    return _load(str(module).partition(".")[0], "the settings' package")


def _load(name: str, source: str) -> AmqTask:
    app: AmqTask = plugins().load_app(name, source)
    return app
