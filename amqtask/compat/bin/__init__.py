"""`celery.bin`; ours is `amqtask.cli`."""
