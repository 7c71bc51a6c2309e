"""Changes of Django's settings at run time, as `override_settings` makes them in tests, reach the application's settings."""

from __future__ import annotations

import weakref

from django.core.signals import setting_changed

from amqtask.settings import Settings


def follow(conf: Settings, namespace: str | None) -> None:
    """Follow changes of Django's settings from now on, for as long as `conf` lives."""
    reference = weakref.ref(conf)

    def changed(*, setting: str, value: object, **_: object) -> None:
        settings = reference()
        name = None if settings is None else settings.setting_meant_by(setting, namespace)
        if settings is None or name is None:
            return
        if value is None:  # it was none of Django's settings before
            del settings[name]
        else:
            settings[name] = value

    setting_changed.connect(changed, weak=False, dispatch_uid=("amqtask", id(conf), namespace))
