"""`celery.registry`: the tasks of the current application."""

from __future__ import annotations

from amqtask.compat.local import Proxy
from amqtask.ground.current import current_app

tasks = Proxy(lambda: current_app().tasks)
