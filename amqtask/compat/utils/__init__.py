"""What `amqtask.utils` has only for programs written for Celery."""
