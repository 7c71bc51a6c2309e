"""A camera as users write them."""

from __future__ import annotations

from amqtask.events.snapshot import Polaroid
from amqtask.events.state import State


class Camera(Polaroid):
    """Prints who is alive."""

    def on_shutter(self, state: State) -> None:
        for worker in state.alive_workers():
            print(f"alive: {worker.hostname}", flush=True)
