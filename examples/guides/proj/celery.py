"""The project of most chapters: one application, its tasks in a module of their own."""

import os

from amqtask import Celery

QUEUE, FEEDS = "proj-" + os.environ["GUIDE"], "feeds-" + os.environ["GUIDE"]

app = Celery("proj", include=["proj.tasks"])
app.conf.update(
    broker_url="amqp://",
    result_backend="redis://localhost/0",
    result_expires=3600,
    task_default_queue=QUEUE,
    task_track_started=True,
    task_send_sent_event=True,
    task_routes=([("proj.tasks.feed_*", {"queue": FEEDS}), ("proj.tasks.urgent", {"queue": FEEDS, "priority": 7})],),
)

if __name__ == "__main__":
    app.start()
