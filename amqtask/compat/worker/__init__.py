"""What `amqtask.worker` has only for programs written for Celery."""
