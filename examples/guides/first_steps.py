"""First steps: an application, a task, a call, its result."""

import json
import os

from amqtask import Celery
from amqtask.exceptions import TimeoutError

app = Celery("first_steps", broker="amqp://guest@localhost//", backend="redis://localhost/0")
app.conf.task_default_queue = "first-" + os.environ["GUIDE"]


@app.task
def add(x, y):
    return x + y


@app.task
def divide(x, y):
    return x / y


def main():
    found = {}
    result = add.delay(4, 4)
    found["add"] = result.get(timeout=30)
    found["ready"] = [result.ready(), result.successful(), result.failed(), result.state]

    failed = divide.delay(1, 0)
    try:
        failed.get(timeout=30)
    except ZeroDivisionError as error:
        found["error"] = str(error)
    found["kept"] = repr(failed.get(propagate=False))
    found["traceback"] = "ZeroDivisionError: division by zero" in failed.traceback
    found["state"] = failed.state

    never = app.AsyncResult("an-id-that-nobody-has")
    found["unknown"] = never.state
    try:
        never.get(timeout=0.1)
    except TimeoutError as error:
        found["timeout"] = type(error).__name__
    found["name"] = add.name
    print(json.dumps(found))


if __name__ == "__main__":
    main()
