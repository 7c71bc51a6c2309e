"""The outbox that the setting `outbox` names."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, cast

from amqtask.exceptions import ConfigurationError

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.outbox.contract import Outbox

DJANGO = "amqtask.contrib.django.outbox"


def find_outbox(told: Any, app: AmqTask) -> Outbox:
    """True: Django's; `module:name`: that object. Raises: ConfigurationError."""
    if told is True or told in ("django", "True", "true", "1"):
        made: Outbox = importlib.import_module(DJANGO).DjangoOutbox(app.conf.outbox_database)
        return made
    if not isinstance(told, str):
        return cast("Outbox", told)
    module, _, name = told.partition(":")
    try:
        found = getattr(importlib.import_module(module), name) if name else None
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"outbox = {told!r}: {error}") from error
    if not hasattr(found, "transaction"):
        raise ConfigurationError(
            f"outbox = {told!r} names no outbox: True is Django's, 'proj.db:outbox' an object in a module of yours"
        )
    return cast("Outbox", found)
