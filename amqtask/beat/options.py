"""What the command line asks of beat."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BeatOptions:
    """`schedule` is `-s`, `scheduler` is `-S`; None: as the settings say. `max_interval` is in seconds."""

    schedule: str | None = None
    scheduler: str | None = None
    max_interval: float | None = None
    # The node name for `inspect ping`, and whether to answer it; None: as beat_enable_remote_control says.
    hostname: str | None = None
    remote_control: bool | None = None
