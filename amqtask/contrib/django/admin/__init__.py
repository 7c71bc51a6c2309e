"""The admin of results, periodic tasks and the outbox."""

from amqtask.contrib.django.admin import outbox, results, schedules

__all__ = ["outbox", "results", "schedules"]
