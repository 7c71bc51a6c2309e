"""What `amqtask.events` has only for programs written for Celery."""
