"""An application as programs for Celery have them: a consumer step, and a scheduler that keeps its entries elsewhere."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from typing import Any

from amqtask import AmqTask
from amqtask.compat.beat import Scheduler
from amqtask.compat.bootsteps import ConsumerStep

FILE = os.environ.get("CELERYS_FILE", os.devnull)
QUEUE = os.environ.get("CELERYS_QUEUE", "celerys")

app = AmqTask("celerys", backend=os.environ.get("CELERYS_BACKEND"), task_default_queue=QUEUE)


def note(line: str) -> None:
    """One write call, so that lines of several processes do not mix."""
    file = os.open(FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, f"{line}\n".encode())
    finally:
        os.close(file)


@app.task(name="celerys.tick", bind=True)
def tick(self: Any, word: str) -> None:
    """Called by the scheduler."""
    note(f"{word} {self.request.headers.get('celery_beat_task')}")


@app.task(name="celerys.tell", bind=True)
def tell(self: Any, status: str, fails: bool = False) -> str:
    """Writes to the store itself, as some libraries do."""
    self.backend.store_result(self.request.id, {"done": 50}, status, request=self.request)
    if fails:
        raise KeyError("k")
    return status


class Listens(ConsumerStep):
    """Takes messages that are no tasks from a queue of its own."""

    def get_consumers(self, channel: Any) -> Iterable[Any]:
        kombu = importlib.import_module("kombu")
        queue = kombu.Queue(f"{QUEUE}.own", kombu.Exchange(f"{QUEUE}.own"), f"{QUEUE}.own", durable=True)
        return [kombu.Consumer(channel, queues=[queue], callbacks=[self.heard], accept=["json"])]

    def start(self, parent: Any) -> None:
        super().start(parent)
        note(f"listens {parent.restart_count}")

    def stop(self, parent: Any) -> None:
        super().stop(parent)
        note("stopped")

    def heard(self, body: Any, message: Any) -> None:
        note(f"heard {body['word']}")
        message.ack()


if "CELERYS_LISTENS" in os.environ:
    app.steps["consumer"].add(Listens)  # type: ignore[attr-defined] # of amqtask.compat


class Elsewhere(Scheduler):
    """Entries and last runs are where it says, not in the settings."""

    sync_every = 0

    def setup_schedule(self) -> None:
        self.update_from_dict(
            {
                "often": {"task": "celerys.tick", "schedule": 0.2, "args": ("often",)},
                "rarely": {"task": "celerys.tick", "schedule": 86400, "args": ("rarely",)},
            }
        )

    def sync(self) -> None:
        note(f"synced {self.schedule['often'].total_run_count}")
