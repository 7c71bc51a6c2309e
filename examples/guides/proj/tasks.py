"""Tasks of the project."""

import os
import time

from redis import Redis

from .celery import app

seen = Redis.from_url(os.environ["CELERY_RESULT_BACKEND"])


@app.task
def add(x, y):
    return x + y


@app.task
def mul(x, y):
    return x * y


@app.task
def xsum(numbers):
    return sum(numbers)


@app.task
def same(value=None):
    return value


@app.task
def fail(*args):
    raise ValueError("on purpose")


@app.task
def nap(seconds):
    time.sleep(seconds)
    return "slept"


@app.task(bind=True)
def about(self):
    request = self.request
    info = request.delivery_info
    return {
        "retries": request.retries,
        "routing_key": info["routing_key"],
        "priority": info["priority"],
        "limits": list(request.timelimit or ()),
        "root": request.root_id == request.id,
        "parent": request.parent_id,
        "shop": getattr(request, "shop", None),
    }


@app.task(bind=True, max_retries=2, default_retry_delay=0)
def flaky(self, good_at):
    if self.request.retries < good_at:
        raise self.retry(exc=KeyError("not yet"))
    return self.request.retries


@app.task(autoretry_for=(KeyError,), retry_kwargs={"max_retries": 1, "countdown": 0})
def automatic():
    raise KeyError("never")


@app.task
def on_error(request, exc, traceback):
    seen.rpush("guide-errors-" + request.id, str(exc))


@app.task(ignore_result=True)
def note(value, key):
    seen.rpush(key, str(value))


@app.task(bind=True)
def feed_import(self, name):
    return [name, self.request.delivery_info["routing_key"].split("-")[0]]


@app.task(bind=True)
def urgent(self):
    return [self.request.delivery_info["routing_key"].split("-")[0], self.request.delivery_info["priority"]]


@app.task(bind=True)
def progress(self, steps):
    for step in range(steps):
        self.update_state(state="PROGRESS", meta={"current": step, "total": steps})
        time.sleep(0.05)
    return steps


@app.task(bind=True)
def becomes(self, x):
    return self.replace(add.s(x, 1) | mul.s(10))


@app.task(soft_time_limit=1)
def tidy():
    from amqtask.exceptions import SoftTimeLimitExceeded

    try:
        time.sleep(30)
    except SoftTimeLimitExceeded:
        return "cleaned up"
