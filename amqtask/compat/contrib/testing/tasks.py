"""`celery.contrib.testing.tasks`."""

from amqtask.client.registry import shared_task


@shared_task(name="celery.ping")
def ping() -> str:
    """Answers."""
    return "pong"
