"""What `amqtask.contrib` has only for programs written for Celery."""
