"""Functions of `celery.app`, and `celery.registry`."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from amqtask.compat import registry as registry
from amqtask.ground import VERSION
from amqtask.ground.current import current_app

if TYPE_CHECKING:
    from amqtask.app import AmqTask


def app_or_default(app: AmqTask | None = None) -> AmqTask:
    """`app`, else the current application."""
    return current_app() if app is None else app


def bugreport(app: AmqTask | None = None) -> str:
    """Versions, and the settings without secrets; `amqtask report` says more."""
    settings = app_or_default(app).conf.table()
    lines = [f"software -> amqtask:{VERSION} py:{platform.python_version()}", f"platform -> {platform.platform()}"]
    return "\n".join([*lines, "", *(f"{name}: {value!r}" for name, value in sorted(settings.items()))])
