"""Chords under fire: worker processes are killed at random while many chords run; every body must run.

    python -m integration.chords [--chords 200] [--size 50] [--store rpc|redis]

Prints how many bodies ran, and how many ran more than once.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from pathlib import Path
from typing import NamedTuple

from amqtask import chord
from integration.killing import workers_under_fire
from integration.nodes import broker
from integration.servers import redis_server
from integration.workers import eventually


class Outcome(NamedTuple):
    """What came of it: bodies that ran with all values, more than once, not at all, or with other values; and the kills."""

    ran: int
    again: int
    missing: int
    wrong: int
    kills: int


def under_fire(
    broker_url: str,
    backend: str,
    *,
    chords: int,
    size: int,
    pause: tuple[float, float] = (0.5, 2.0),
    timeout: float = 240.0,
    delivery_limit: int = 5,
    seed: int | None = None,
) -> Outcome:
    """Run it: `pause` is the range of seconds between two kills of a worker's main process (its children die with it)."""
    folder = Path(tempfile.mkdtemp(prefix="chords-"))
    with workers_under_fire(broker_url, backend, pause=pause, delivery_limit=delivery_limit, seed=seed) as (app, kills):
        for number in range(chords):
            header = [app.signature("slow_same", (value, 0.01)) for value in range(size)]
            body = app.signature("leave_total", (), {"folder": str(folder), "name": f"{number}"})
            chord(header, body, app=app).apply_async()
        with contextlib.suppress(AssertionError):  # the figures say how many
            eventually(lambda: len(list(folder.iterdir())) >= chords, timeout, what="bodies that never ran", every=0.2)
    return _counted(folder, chords, sum(range(size)), len(kills))


def _counted(folder: Path, chords: int, total: int, kills: int) -> Outcome:
    runs = {path.name: path.read_text().split() for path in folder.iterdir()}
    wrong = sum(1 for lines in runs.values() if any(line != str(total) for line in lines))
    again = sum(1 for lines in runs.values() if len(lines) > 1)
    return Outcome(len(runs), again, chords - len(runs), wrong, kills)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chords", type=int, default=200)
    parser.add_argument("--size", type=int, default=50)
    parser.add_argument("--store", choices=["rpc", "redis", "both"], default="both")
    options = parser.parse_args()
    with broker() as url, redis_server() as redis_url:
        for store in ["rpc", "redis"] if options.store == "both" else [options.store]:
            backend = "rpc://" if store == "rpc" else redis_url
            found = under_fire(url, backend, chords=options.chords, size=options.size)
            print(
                f"{store}: {found.ran} of {options.chords} bodies ran, {found.again} more than once, "
                f"{found.wrong} with other values, during {found.kills} kills",
                flush=True,
            )


if __name__ == "__main__":
    main()
