"""Finding the modules that tasks are in: `autodiscover_tasks`, and the program that was started itself."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

from amqtask.exceptions import ConfigurationError
from amqtask.ground.imports import load
from amqtask.ground.plugins import plugins
from amqtask.ground.printable import bounded_logger

logger = bounded_logger("amqtask.worker")
VARIABLE = "DJANGO_SETTINGS_MODULE"


def uses_django() -> bool:
    """Whether this is a Django project: DJANGO_SETTINGS_MODULE names its settings, or `settings.configure()` was called."""
    if os.environ.get(VARIABLE):
        return importlib.util.find_spec("django") is not None
    conf = sys.modules.get("django.conf")
    # Settings made by hand have no module.
    return conf is not None and conf.settings.configured and conf.settings.SETTINGS_MODULE is None


def prepare_django() -> None:
    """Load Django's applications if this is a Django project."""
    if uses_django():
        plugins().load_django()
    elif os.environ.get(VARIABLE):
        logger.warning("%s is %r, and Django is not installed here", VARIABLE, os.environ[VARIABLE])


def django_time_zone() -> str | None:
    """TIME_ZONE of a Django project's settings, else None."""
    return plugins().django_time_zone() if uses_django() else None


def django_apps() -> list[str]:
    """Django's applications, when this is a Django project."""
    if not uses_django() and "django.apps" not in sys.modules:
        return []
    plugins().load_django()
    return [config.name for config in sys.modules["django.apps"].apps.get_app_configs()]


def import_related(package: str, related_name: str) -> None:
    """Import `<package>.<related_name>` if there is such a module; errors inside it are shown as they are."""
    if not related_name:
        load(package)
        return
    try:
        load(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ConfigurationError(f"autodiscover_tasks names {package!r}, and there is no such package") from error
    full = f"{package}.{related_name}"
    if importlib.util.find_spec(full) is not None:
        load(full)


def name_of_main() -> str:
    """The name under which others import the program that was started (`python -m proj.app`, `python app.py`)."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return str(spec.name)
    return os.path.splitext(os.path.basename(getattr(main, "__file__", None) or "__main__"))[0]


def twin_of_main(value: object, load: Callable[[], None]) -> object | None:
    """The object that `value` of the started program is in the same module as others import it: such a program exists
    twice. None: `value` is not the program's, or nobody imported the program."""
    name = next((name for name, attribute in vars(sys.modules["__main__"]).items() if attribute is value), None)
    if name is None:
        return None
    load()
    return getattr(sys.modules.get(name_of_main()), name, None)


def app_of_flask(value: object) -> Any:
    """The application of a Flask app, in its `extensions` under "amqtask" or, as Flask's documentation teaches, "celery";
    None for what is no Flask app, or has no application."""
    extensions = getattr(value, "extensions", None)
    if not isinstance(extensions, dict):
        return None
    return extensions.get("amqtask") or extensions.get("celery")
