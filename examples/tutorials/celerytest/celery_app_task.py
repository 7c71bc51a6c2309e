import os
import time

import amqtask

backend = "redis://127.0.0.1:6379/1"  # with a password: redis://:123456@127.0.0.1:6379/1
broker = "amqp://guest:guest@127.0.0.1:5672//"
cel = amqtask.AmqTask("test", backend=backend, broker=broker)


@cel.task
def add(x, y):
    return x + y


@cel.task
def divide(x, y):
    return x / y


@cel.task(bind=True, max_retries=None, default_retry_delay=1)
def read(self, path):
    """Tried again each second until there is such a file."""
    try:
        with open(path) as file:
            return file.read()
    except OSError as error:
        raise self.retry(exc=error) from error


@cel.task(track_started=True)
def wait_for(path):
    while not os.path.exists(path):
        time.sleep(0.05)
