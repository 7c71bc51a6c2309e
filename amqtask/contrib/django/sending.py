"""How a periodic task is published: the options of its row."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING

from amqtask.contrib.django.times import aware

if TYPE_CHECKING:
    from amqtask.contrib.django.models import PeriodicTask
    from amqtask.ground.shapes import OptionDict

# Results and other readers know by this header what published a task (django_celery_results/backends/database.py).
NAME_HEADER = "periodic_task_name"


def options_of(periodic: PeriodicTask) -> OptionDict:
    """The options of `apply_async` for a row. Raises: ValueError for headers that are no JSON object."""
    options: OptionDict = {
        name: value
        for name in ("queue", "exchange", "routing_key", "priority")
        if (value := getattr(periodic, name)) is not None
    }
    expires = periodic.expires_
    if expires is not None:
        options["expires"] = aware(expires) if isinstance(expires, datetime) else expires
    headers = json.loads(periodic.headers or "{}")
    if not isinstance(headers, dict):
        raise ValueError(f"the headers of periodic task {periodic.name!r} are no JSON object: {periodic.headers}")
    options["headers"] = {**headers, NAME_HEADER: periodic.name}
    return options
