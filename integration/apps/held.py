"""Tasks that a test holds and lets go by files, with the ways of acknowledging."""

from __future__ import annotations

import os
import time
from pathlib import Path

from amqtask import AmqTask

app = AmqTask("held", backend="rpc://")
app.conf.task_default_queue = os.environ.get("HELD_QUEUE", "held")
if "HELD_GRACE" in os.environ:
    app.conf.worker_shutdown_timeout = float(os.environ["HELD_GRACE"])


def _hold(folder: str, name: str) -> str:
    place = Path(folder)
    with (place / "runs").open("a") as file:
        file.write(f"{name}\n")
    while not (place / f"release-{name}").exists():
        time.sleep(0.01)
    return name


@app.task(name="held.hold")
def hold(folder: str, name: str) -> str:
    """Write `name` into the file `runs`, then run until `release-<name>` exists."""
    return _hold(folder, name)


@app.task(name="held.hold_early", acks_late=False)
def hold_early(folder: str, name: str) -> str:
    """The same, acknowledged when it starts."""
    return _hold(folder, name)


@app.task(name="held.note")
def note(folder: str, name: str) -> str:
    """Write `name` into the file `runs`."""
    with (Path(folder) / "runs").open("a") as file:
        file.write(f"{name}\n")
    return name


@app.task(name="held.rare", rate_limit="1/m")
def rare(folder: str, name: str) -> str:
    """Once a minute at most."""
    return note.run(folder, name)  # type: ignore[no-any-return]
