"""What `amqtask.backends` has only for programs written for Celery."""
