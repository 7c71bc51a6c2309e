"""Django's applications and settings, loaded for those who do not know Django; and changes of settings at run time."""

from __future__ import annotations

import weakref

import django
from django.apps import apps
from django.conf import settings
from django.core.signals import setting_changed

from amqtask.settings import Settings


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
