"""A camera as users write them."""

from __future__ import annotations

import os
from pathlib import Path

from amqtask.events.snapshot import Polaroid
from amqtask.events.state import State


class Camera(Polaroid):
    """Prints who is alive."""

    def on_shutter(self, state: State) -> None:
        for worker in state.alive_workers():
            print(f"alive: {worker.hostname}", flush=True)


class Album(Polaroid):
    """Writes them into the file ALBUM."""

    def on_shutter(self, state: State) -> None:
        with Path(os.environ["ALBUM"]).open("a") as file:
            for worker in state.alive_workers():
                file.write(f"alive: {worker.hostname}\n")

    def cancel(self) -> None:
        super().cancel()
        with Path(os.environ["ALBUM"]).open("a") as file:
            file.write("the last one\n")
