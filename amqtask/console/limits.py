"""Limits over all workers in the console: how far they are used, and other numbers for them; see app.limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from amqtask.exceptions import ConfigurationError

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.ground.shapes import JsonObject

# Keys of a limit that are shown.
MOST_KEYS = 10


def limits(app: AmqTask) -> JsonObject:
    """All limits of all tasks."""
    app.load_tasks()
    try:
        found = app.limits.read()
    except ConfigurationError as error:
        return {"limits": [], "problem": str(error)}
    rows = [asdict(limit) | {"keys": [use._asdict() for use in limit.keys[:MOST_KEYS]]} for limit in found]
    return {"limits": rows, "problem": None}


# -- actions; see console.actions


def set_limit(app: AmqTask, form: Mapping[str, str], user: str) -> str:
    """Have a limit be another number in all workers: a whole number, or a rate as 500/m with its burst."""
    burst = form.get("burst", "").strip()
    if burst and not burst.isdecimal():
        raise ConfigurationError(f"a burst is a whole number, not {burst}")
    task, limit, value = form["task"], form["limit"], form["value"].strip()
    app.limits.set(task, limit, value, burst=int(burst) if burst else None, by=user)
    return f"{limit} of {task} is {value}"


def reset_limit(app: AmqTask, form: Mapping[str, str], user: str) -> str:
    """Have a limit be what the code says again."""
    task, limit = form["task"], form["limit"]
    return f"{limit} of {task} is what the code says" + ("" if app.limits.reset(task, limit) else ", as it was")
