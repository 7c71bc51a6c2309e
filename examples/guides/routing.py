"""Routing: by pattern, by name, by call."""

import json

from proj.celery import FEEDS, QUEUE, app
from proj.tasks import about, feed_import, urgent


def main():
    found = {}
    found["by pattern"] = feed_import.delay("news").get(timeout=30)
    found["by name"] = urgent.delay().get(timeout=30)
    found["default"] = about.delay().get(timeout=30)["routing_key"] == QUEUE
    found["by call"] = about.apply_async(queue=FEEDS).get(timeout=30)["routing_key"] == FEEDS
    found["by signature"] = about.s().set(queue=FEEDS).apply_async().get(timeout=30)["routing_key"] == FEEDS
    found["in a chain"] = (about.si() | feed_import.si("old")).apply_async().get(timeout=30)
    found["sent by name"] = app.send_task("proj.tasks.feed_import", ("x",)).get(timeout=30)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
