"""The outbox that the setting `outbox` names."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, cast

from amqtask.exceptions import ConfigurationError

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.outbox.contract import Outbox

DJANGO = "amqtask.contrib.django.outbox"


def find_outbox(setting: Any, app: AmqTask) -> Outbox:
    """True: Django's; `module:name`: that object. Raises: ConfigurationError."""
    if setting is True or setting in ("django", "True", "true", "1"):
        django_outbox: Outbox = importlib.import_module(DJANGO).DjangoOutbox(app.conf.outbox_database)
        return django_outbox
    if not isinstance(setting, str):
        return cast("Outbox", setting)
    module, _, name = setting.partition(":")
    try:
        outbox = getattr(importlib.import_module(module), name) if name else None
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"outbox = {setting!r}: {error}") from error
    if not hasattr(outbox, "transaction"):
        raise ConfigurationError(
            f"outbox = {setting!r} names no outbox: True is Django's, 'proj.db:outbox' an object in a module of yours"
        )
    return cast("Outbox", outbox)
