"""The outbox that the setting `outbox` names."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from amqtask.exceptions import ConfigurationError
from amqtask.ground.imports import load_path
from amqtask.ground.plugins import plugins

if TYPE_CHECKING:
    from amqtask.outbox.contract import Outbox


def find_outbox(setting: object, database: str) -> Outbox:
    """True: Django's; `module:name`: that object. Raises: ConfigurationError."""
    if setting is True or setting in ("django", "True", "true", "1"):
        django: Outbox = plugins().django_outbox(database)
        return django
    if not isinstance(setting, str):
        return cast("Outbox", setting)
    try:
        outbox = load_path(setting) if setting.partition(":")[2] else None
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"outbox = {setting!r}: {error}") from error
    if not hasattr(outbox, "transaction"):
        raise ConfigurationError(
            f"outbox = {setting!r} names no outbox: True is Django's, 'proj.db:outbox' an object in a module of yours"
        )
    return cast("Outbox", outbox)
