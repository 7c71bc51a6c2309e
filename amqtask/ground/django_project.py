"""Whether this is a Django project, found out without importing Django, and its time zone."""

from __future__ import annotations

import importlib.util
import os
import sys

from amqtask.ground.plugins import plugins

VARIABLE = "DJANGO_SETTINGS_MODULE"


def uses_django() -> bool:
    """Whether this is a Django project: DJANGO_SETTINGS_MODULE names its settings, or `settings.configure()` was called."""
    if os.environ.get(VARIABLE):
        return importlib.util.find_spec("django") is not None
    conf = sys.modules.get("django.conf")
    # Settings made by hand have no module.
    return conf is not None and conf.settings.configured and conf.settings.SETTINGS_MODULE is None


def django_time_zone() -> str | None:
    """TIME_ZONE of a Django project's settings, else None."""
    return plugins().django_time_zone() if uses_django() else None
