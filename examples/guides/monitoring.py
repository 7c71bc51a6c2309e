"""Monitoring: events as they come, and the state that they add up to."""

import json
import threading

from proj.celery import app
from proj.tasks import add, fail, flaky


ENDS = {"task-succeeded", "task-failed"}


class Monitor:
    """Listens in a thread."""

    def __init__(self):
        self.state = app.events.State()
        self.seen = {}
        self.names = set()
        self.listens = threading.Event()
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self):
        with app.connection() as connection:
            receiver = app.events.Receiver(connection, handlers={"*": self.on_event})
            receiver.capture(limit=None, timeout=60, wakeup=True)

    def on_event(self, event):
        self.state.event(event)
        with self.changed:
            if event["type"].startswith("worker-"):
                self.listens.set()
            else:
                self.seen.setdefault(event["uuid"], []).append(event["type"])
            self.changed.notify_all()

    def wait_for(self, task_id, also=()):
        """Its events, once it has ended; those in between may come later."""

        def is_complete():
            seen = set(self.seen.get(task_id, ()))
            return ENDS & seen and seen.issuperset(also)

        with self.changed:
            self.changed.wait_for(is_complete, timeout=30)
            return sorted(self.seen.get(task_id, ()))


def main():
    found = {}
    monitor = Monitor()
    monitor.thread.start()
    if not monitor.listens.wait(30):
        raise SystemExit("no worker was heard")
    for name, result in {"good": add.delay(2, 2), "bad": fail.delay(), "again": flaky.delay(1)}.items():
        found[name] = monitor.wait_for(result.id, also=["task-retried"] if name == "again" else [])
        task = monitor.state.tasks[result.id]
        found[name + " is"] = [task.name, task.args, task.result, task.worker is not None]
        if name != "again":  # Celery tells of a retry when it likes, also after the end
            found[name + " ended"] = [task.state, task.exception]
    found["types"] = sorted(set(monitor.state.task_types()) & {"proj.tasks.add", "proj.tasks.fail", "proj.tasks.flaky"})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
