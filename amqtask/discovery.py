"""Finding the modules that tasks are in: `autodiscover_tasks`."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys

from amqtask.exceptions import ConfigurationError


def django_apps() -> list[str]:
    """Django's applications, when Django is configured in this process."""
    apps = sys.modules.get("django.apps")
    if apps is None and not os.environ.get("DJANGO_SETTINGS_MODULE"):
        return []
    if apps is None or not apps.apps.ready:
        importlib.import_module("django").setup()
        apps = sys.modules["django.apps"]
    return [config.name for config in apps.apps.get_app_configs()]


def import_related(package: str, related_name: str) -> None:
    """Import `<package>.<related_name>` if there is such a module; errors inside it are shown as they are."""
    if not related_name:
        importlib.import_module(package)
        return
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ConfigurationError(f"autodiscover_tasks names {package!r}, and there is no such package") from error
    full = f"{package}.{related_name}"
    if importlib.util.find_spec(full) is not None:
        importlib.import_module(full)
