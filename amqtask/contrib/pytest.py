"""`pytest_plugins = ("amqtask.contrib.pytest",)`: celery.contrib.pytest's fixtures, at its place."""

pytest_plugins = ("amqtask.testing.celery_fixtures",)
