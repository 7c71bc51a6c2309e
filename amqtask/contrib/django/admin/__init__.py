"""The admin of the outbox."""

from amqtask.contrib.django.admin import outbox

__all__ = ["outbox"]
