"""`celery.contrib.testing.tasks`."""

from amqtask.client.shared_tasks import shared_task


@shared_task(name="celery.ping")
def ping() -> str:
    """Answers."""
    return "pong"
