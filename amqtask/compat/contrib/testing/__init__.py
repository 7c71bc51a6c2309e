"""`celery.contrib.testing`; ours is `amqtask.testing`."""
