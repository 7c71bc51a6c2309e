"""Workers: what they are asked and told while they run."""

import json
import os
import time

from amqtask.exceptions import TaskRevokedError
from proj.celery import FEEDS, QUEUE, app
from proj.tasks import add, nap

NODE = os.environ["GUIDE_NODE"]


def until(ask, seconds=30):
    """The first answer that says something."""
    end = time.monotonic() + seconds
    while not (found := ask()) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def main():
    found = {}
    inspect = app.control.inspect(destination=[NODE], timeout=5)
    found["ping"] = inspect.ping()[NODE]
    found["pings"] = [answer[NODE] for answer in app.control.ping(timeout=5, destination=[NODE])]
    found["registered"] = sorted(name for name in inspect.registered()[NODE] if name.startswith("proj."))
    queues = sorted(queue["name"] for queue in inspect.active_queues()[NODE])
    found["queues"] = queues == sorted([FEEDS, QUEUE])
    found["concurrency"] = inspect.stats()[NODE]["pool"]["max-concurrency"]

    sleeping = nap.delay(60)
    active = until(lambda: inspect.active()[NODE])
    found["active"] = [[task["name"], task["args"], task["id"] == sleeping.id] for task in active]
    found["query"] = [state for state, _ in inspect.query_task(sleeping.id)[NODE].values()]
    sleeping.revoke(terminate=True)
    try:
        sleeping.get(timeout=30)
    except TaskRevokedError as error:
        found["terminated"] = type(error).__name__
    found["state"] = sleeping.state

    told = {"destination": [NODE], "reply": True, "timeout": 5}
    found["rate limit"] = list(app.control.rate_limit("proj.tasks.add", "200/m", **told)[0][NODE])
    found["time limit"] = list(app.control.time_limit("proj.tasks.nap", soft=60, hard=120, **told)[0][NODE])
    found["no such task"] = list(app.control.rate_limit("proj.tasks.none", "1/m", **told)[0][NODE])
    extra = "extra-" + QUEUE
    found["add consumer"] = list(app.control.add_consumer(extra, **told)[0][NODE])
    found["through it"] = add.apply_async((1, 2), queue=extra).get(timeout=30)
    found["cancel consumer"] = list(app.control.cancel_consumer(extra, **told)[0][NODE])
    found["back"] = sorted(queue["name"] for queue in inspect.active_queues()[NODE]) == queues
    found["grown"] = list(app.control.pool_grow(1, **told)[0][NODE])
    found["shrunk"] = list(app.control.pool_shrink(1, **told)[0][NODE])
    found["nobody"] = app.control.inspect(destination=["nobody@nowhere"], timeout=0.5).ping()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
