"""The producers of the cluster suite: each calls tasks until the scenario is over, then waits for the results it asked for.

    python -m integration.producing sync|async|forked|delayed SCENARIO [--delayed N] [--patience SECONDS]

Each call leaves a line in the file `calls`, each result one in `results` (CLUSTER_FOLDER).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime, timezone
from typing import Any

from amqtask import chain, chord
from amqtask.exceptions import PublishError
from amqtask.exceptions import TimeoutError as NotInTime
from integration.apps.clustered import FOLDER, again, app, gather, note, rarely, write

# Calls a second, of one producer.
RATE = 20
# What a producer calls, in turns; it waits for the result of some.
TURNS = ("plain", "result", "plain", "retry", "plain", "chain", "plain", "chord", "plain", "rare")
WITH_RESULT = {"result", "chain", "chord"}


class Producer:
    """One line of calls; its name is in the numbers of its calls."""

    def __init__(self, name: str, scenario: str, *, patience: float = 60.0) -> None:
        self.name = name
        self.scenario = scenario
        self.results: list[tuple[str, str, Any]] = []
        self._patience = patience
        self._over = FOLDER / f"over-{scenario}"

    def numbers(self) -> Iterator[tuple[str, str]]:
        """Kinds and numbers, until the scenario is over."""
        count = 0
        while not self._over.exists():
            yield TURNS[count % len(TURNS)], f"{self.name}-{count}"
            count += 1

    def signature(self, kind: str, number: str) -> Any:
        """What to publish."""
        of = self.scenario
        if kind == "rare":
            return rarely.si(of, number)
        if kind == "retry":
            return again.si(of, number)
        if kind == "chain":
            steps = [note.si(of, "step", f"{number}.{step}") for step in range(2)]
            return chain(*steps, note.si(of, kind, number))
        if kind == "chord":
            members = [note.si(of, "member", f"{number}.{member}") for member in range(4)]
            return chord(members, gather.s(of, number))
        return note.si(of, kind, number)

    def call(self, kind: str, number: str) -> None:
        """Publish one, and write down what came of it."""
        started = time.time()
        try:
            found = self.signature(kind, number).apply_async()
        except PublishError as error:
            self._refused(kind, number, started, error)
            return
        self._accepted(kind, number, started, found)

    async def acall(self, kind: str, number: str) -> None:
        """The same over the async publisher."""
        started = time.time()
        try:
            found = await self.signature(kind, number).aapply_async()
        except PublishError as error:
            self._refused(kind, number, started, error)
            return
        self._accepted(kind, number, started, found)

    def call_delayed(self, count: int, *, ahead: float, spread: float) -> None:
        """So many at once, with ETAs `ahead` seconds from now and more."""
        first, burst = time.time() + ahead, 250
        for begin in range(0, count, burst):
            etas = [first + spread * number / count for number in range(begin, min(begin + burst, count))]
            started = time.time()
            ids, pipeline = {}, app.pipeline()
            with suppress(PublishError), pipeline:  # which were not stored, the pipeline knows
                for number, eta in enumerate(etas, begin):
                    due = datetime.fromtimestamp(eta, timezone.utc)
                    called = note.si(self.scenario, "delayed", f"{self.name}-{number}").set(eta=due)
                    ids[called.apply_async().id] = f"{self.name}-{number}", eta
            for task_id, (name, eta) in ids.items():
                if task_id in pipeline.failed:
                    self._refused("delayed", name, started, pipeline.failed[task_id])
                else:
                    self._accepted("delayed", name, started, None, eta)

    def _accepted(self, kind: str, number: str, started: float, found: Any, eta: float = 0.0) -> None:
        self._write(kind, number, "accepted", started, eta or "")
        if kind in WITH_RESULT:
            self.results.append((kind, number, found))

    def _refused(self, kind: str, number: str, started: float, error: PublishError) -> None:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        self._write(kind, number, "refused", started, text[:300])

    def _write(self, kind: str, number: str, outcome: str, started: float, more: object) -> None:
        ended = f"{time.time():.3f}"
        write("calls", self.scenario, kind, number, outcome, f"{started:.3f}", ended, self.name, more)

    def collect(self) -> None:
        """Get what was asked for."""
        deadline = time.monotonic() + self._patience
        for kind, number, result in self.results:
            try:
                result.get(timeout=max(0.1, deadline - time.monotonic()))
                self._got(kind, number, "got", "")
            except NotInTime:
                self._got(kind, number, "missing", "")
            except Exception as error:  # whatever the caller is told
                self._got(kind, number, "told", error)

    async def acollect(self) -> None:
        """The same, awaiting them."""
        deadline = time.monotonic() + self._patience
        for kind, number, result in self.results:
            try:
                await result.aget(timeout=max(0.1, deadline - time.monotonic()))
                self._got(kind, number, "got", "")
            except NotInTime:
                self._got(kind, number, "missing", "")
            except Exception as error:  # whatever the caller is told
                self._got(kind, number, "told", error)

    def _got(self, kind: str, number: str, outcome: str, error: object) -> None:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300] if error else ""
        write("results", self.scenario, kind, number, outcome, text)


def _produce(producer: Producer) -> None:
    for kind, number in producer.numbers():
        producer.call(kind, number)
        time.sleep(1 / RATE)
    producer.collect()


async def _produce_async(producer: Producer) -> None:
    for kind, number in producer.numbers():
        await producer.acall(kind, number)
        await asyncio.sleep(1 / RATE)
    await producer.acollect()
    await app.aclose()


def _produce_forked(make: Callable[[str], Producer]) -> None:
    make("parent").call("first", "parent-0")
    children = []
    for number in range(2):
        pid = os.fork()
        if not pid:
            _produce(make(f"child{number}"))
            app.close()
            os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)


def main() -> int:
    """The command line; ready once it says so."""
    parser = argparse.ArgumentParser(prog="python -m integration.producing")
    parser.add_argument("kind", choices=["sync", "async", "forked", "delayed"])
    parser.add_argument("scenario")
    parser.add_argument("--delayed", type=int, default=5000)
    parser.add_argument("--ahead", type=float, default=8.0)
    parser.add_argument("--spread", type=float, default=30.0)
    parser.add_argument("--patience", type=float, default=60.0)
    options = parser.parse_args()

    def make(name: str) -> Producer:
        return Producer(name, options.scenario, patience=options.patience)

    print("producer ready.", flush=True)
    if options.kind == "sync":
        _produce(make("sync"))
    elif options.kind == "async":
        asyncio.run(_produce_async(make("async")))
    elif options.kind == "forked":
        _produce_forked(make)
    else:
        make("delayed").call_delayed(options.delayed, ahead=options.ahead, spread=options.spread)
    app.close()
    print("producer ended.", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
