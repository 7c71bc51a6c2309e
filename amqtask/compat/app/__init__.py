"""What `amqtask.app` has only for programs written for Celery."""
