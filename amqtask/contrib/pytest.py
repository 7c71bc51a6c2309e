"""`pytest_plugins = ("amqtask.contrib.pytest",)`: celery.contrib.pytest's fixtures, at its place."""

from __future__ import annotations

from amqtask.ground.plugins import others_names

pytest_plugins = ("amqtask.testing.celery_fixtures",)

__getattr__ = others_names(__name__)
