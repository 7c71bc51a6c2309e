"""A camera."""

from __future__ import annotations

from amqtask.events.snapshot import Polaroid
from amqtask.events.state import State


class Camera(Polaroid):
    """Says that it is there."""

    def on_shutter(self, state: State) -> None:
        """A look."""
        print("camera:", state.event_count, "events", flush=True)
