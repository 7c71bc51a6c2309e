"""Chains under fire: worker processes are killed at random while many chains run; every step must run, few twice.

    python -m integration.chains [--chains 200] [--size 50] [--store rpc|redis] [--seconds 0.1]

Prints how many chains came to their end, and how many steps ran more than once.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from amqtask import chain
from integration.killing import workers_under_fire
from integration.nodes import broker
from integration.servers import redis_server


class Outcome(NamedTuple):
    """What came of it: chains with the right end, steps that ran more than once and not at all, and the kills."""

    ended: int
    again: int
    missing: int
    kills: int


def under_fire(
    broker_url: str,
    backend: str,
    *,
    chains: int,
    size: int,
    seconds: float = 0.1,
    pause: tuple[float, float] = (0.5, 2.0),
    timeout: float = 240.0,
    delivery_limit: int = 5,
    seed: int | None = None,
) -> Outcome:
    """Run it; workers go on with a chain by themselves for `seconds`. Raises: TimeoutError for a chain without an end."""
    folder = Path(tempfile.mkdtemp(prefix="chains-"))
    with workers_under_fire(
        broker_url, backend, pause=pause, delivery_limit=delivery_limit, seed=seed, chain_seconds=seconds
    ) as (app, kills):
        results = []
        for number in range(chains):
            where = (str(folder), f"{number}")
            steps = [app.signature("leave_step", where if step else (0, *where)) for step in range(size)]
            results.append(chain(*steps).apply_async())
        ended = sum(result.get(timeout=timeout) == size for result in results)
    runs = Counter((path.name, line) for path in folder.iterdir() for line in path.read_text().split())
    again = sum(1 for times in runs.values() if times > 1)
    return Outcome(ended, again, chains * size - len(runs), len(kills))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chains", type=int, default=200)
    parser.add_argument("--size", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=0.1)
    parser.add_argument("--store", choices=["rpc", "redis", "both"], default="both")
    options = parser.parse_args()
    with broker() as url, redis_server() as redis_url:
        for store in ["rpc", "redis"] if options.store == "both" else [options.store]:
            backend = "rpc://" if store == "rpc" else redis_url
            found = under_fire(url, backend, chains=options.chains, size=options.size, seconds=options.seconds)
            print(
                f"{store}: {found.ended} of {options.chains} chains ended, {found.missing} steps did not run, {found.again} of "
                f"{options.chains * options.size} ran more than once, during {found.kills} kills",
                flush=True,
            )


if __name__ == "__main__":
    main()
