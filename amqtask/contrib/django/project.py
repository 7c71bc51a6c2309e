"""A Django project: its applications and settings, also for those who do not know Django, and its AmqTask application."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import django
from django.apps import apps
from django.conf import settings
from django.core.signals import setting_changed

from amqtask.exceptions import AppNotFound
from amqtask.ground.current import find_current_app
from amqtask.ground.plugins import plugins
from amqtask.settings import Settings

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


def load_applications() -> None:
    """Have Django's applications ready; nothing is done if they are."""
    if not apps.ready:
        django.setup()


def time_zone() -> str:
    """The settings' TIME_ZONE."""
    return str(settings.TIME_ZONE)


def follow(conf: Settings, namespace: str | None) -> None:
    """Follow changes of Django's settings from now on, for as long as `conf` lives."""
    reference = weakref.ref(conf)

    def changed(*, setting: str, value: object, **_: object) -> None:
        ours = reference()
        name = None if ours is None else ours.setting_meant_by(setting, namespace)
        if ours is None or name is None:
            return
        if value is None:  # it was none of Django's settings before
            del ours[name]
        else:
            ours[name] = value

    setting_changed.connect(changed, weak=False, dispatch_uid=("amqtask", id(conf), namespace))
