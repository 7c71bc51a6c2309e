"""Calling tasks: options of apply_async, callbacks, errbacks, times, serializers."""

import json
import time
from datetime import datetime, timedelta, timezone

from amqtask.exceptions import TaskRevokedError
from proj.celery import app
from proj.tasks import about, add, automatic, fail, flaky, note, on_error, same, seen, tidy


def listed(key):
    """What a task left in Redis, as soon as it is there."""
    found = seen.blpop([key], timeout=30)
    return found[1].decode() if found else None


def main():
    found = {}
    found["by name"] = app.send_task("proj.tasks.add", args=[2, 3], kwargs={}).get(timeout=30)
    found["own id"] = add.apply_async((1, 1), task_id="my-own-id-" + app.conf.task_default_queue).get(timeout=30)
    started = time.monotonic()
    found["countdown"] = add.apply_async((2, 2), countdown=1).get(timeout=30)
    found["waited"] = time.monotonic() - started > 0.9
    soon = datetime.now(timezone.utc) + timedelta(seconds=0.5)
    found["eta"] = add.apply_async((3, 3), eta=soon).get(timeout=30)
    found["expires"] = add.apply_async((4, 4), expires=60).get(timeout=30)
    try:
        add.apply_async((5, 5), countdown=0.5, expires=0.1).get(timeout=30)
    except TaskRevokedError as error:
        found["expired"] = str(error)

    key = "guide-note-" + app.conf.task_default_queue
    add.apply_async((2, 2), link=note.s(key)).get(timeout=30)
    found["link"] = listed(key)
    add.apply_async((2, 2), link=[add.s(16), note.s(key)]).get(timeout=30)
    found["links"] = listed(key)
    failed = fail.apply_async(link_error=on_error.s())
    found["link_error"] = listed("guide-errors-" + failed.id)

    found["json"] = same.apply_async(([1, "two", None, {"a": 0.5}],), serializer="json").get(timeout=30)
    for compression in ("zlib", "bzip2"):
        found[compression] = same.apply_async(("x" * 1000,), compression=compression).get(timeout=30) == "x" * 1000
    told = about.apply_async(headers={"shop": "north"}, priority=3, time_limit=20, soft_time_limit=10).get(timeout=30)
    told["routing_key"] = told["routing_key"] == app.conf.task_default_queue
    found["about"] = told
    found["ignored"] = add.apply_async((1, 1), ignore_result=True).get(timeout=30)
    found["retries"] = [flaky.delay(n).get(timeout=30) for n in (0, 1, 2)]
    for name, result in (("too often", flaky.delay(3)), ("automatic", automatic.delay())):
        found[name] = repr(result.get(timeout=30, propagate=False))
    found["soft limit"] = tidy.delay().get(timeout=30)
    for name, call in (("wrong arguments", lambda: add.delay(1)), ("unknown keyword", lambda: add.delay(1, 2, z=3))):
        try:
            call()
        except TypeError:
            found[name] = "TypeError"
    print(json.dumps(found))


if __name__ == "__main__":
    main()
