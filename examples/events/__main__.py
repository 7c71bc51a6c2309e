"""`python -m examples.events`: every event of two tasks, and what a state makes of them."""

from __future__ import annotations

import threading
from typing import Any

from amqtask.events import State
from amqtask.testing.worker import start_worker
from examples.events.tasks import app, resize, upload


def show(event: dict[str, Any]) -> None:
    """One line for an event about a task."""
    own = {name: event[name] for name in ("done", "of", "result", "exception") if event.get(name) is not None}
    print(f"  {event['uuid']:<7} {event['type']:<14} {own or ''}".rstrip())


def watch(state: State, listening: threading.Event) -> None:
    """Until both tasks have ended."""

    def on_task(event: dict[str, Any]) -> None:
        state.event(event)
        show(event)

    def on_other(event: dict[str, Any]) -> None:
        state.event(event)
        listening.set()  # the worker lives

    handlers = {"worker-online": on_other, "worker-heartbeat": on_other, "*": on_task}
    with app.connection() as connection:
        receiver = app.events.Receiver(connection, handlers=handlers)
        for _ in receiver.itercapture(timeout=60.0, wakeup=True):
            if len(state.tasks) == 2 and all(task.ready for task in state.tasks.values()):
                return


def main() -> None:
    """A worker, somebody who watches, and two calls."""
    state = app.events.State()
    listening = threading.Event()
    with start_worker(app):
        watcher = threading.Thread(target=watch, args=(state, listening))
        watcher.start()
        listening.wait(60.0)
        print("events:")
        resize.apply_async((2,), task_id="resize")
        upload.apply_async(("cat.jpg",), task_id="upload")
        watcher.join()
    print("state:")
    for uuid, task in sorted(state.tasks.items()):
        print(f"  {uuid:<7} {task.state:<8} {task.info(['args', 'result', 'exception'])}")
    print(f"  workers: {len(state.workers)}, types: {state.task_types()}")
    app.close()


if __name__ == "__main__":
    main()
