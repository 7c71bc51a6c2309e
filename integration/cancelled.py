"""Cancellations thrown into publishes of an event loop, at random moments.

    python -m integration.cancelled [--count 2000] [--seed N]

Coroutines publish with `adelay()`, `aapply_async()` and in batches, while connections are cut now and then; each is
cancelled after a random time. It prints how many publishes ended, were cancelled, swallowed a cancellation, took longer than
their deadline, failed otherwise, and how many connections were open at the end; the exit code says whether all is well.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
import uuid
from collections import Counter
from contextlib import suppress

import pika

from amqtask import AmqTask
from amqtask.exceptions import PublishError
from amqtask.protocol.message import Message, Properties
from integration.faults import Forwarder
from integration.nodes import broker

# Of which a publish may take some more when the machine is busy; a hang takes for ever.
DEADLINE, LONGEST = 5.0, 30.0
# How long before a cancellation: from less than a publish takes to more than all at once take on a busy machine.
SHORTEST, LONGEST_WAIT = 0.0003, 1.0
AT_ONCE = 20
CUT_EVERY = 200


class Cancelled:
    """Publishes, cancels, counts."""

    def __init__(self, app: AmqTask, queue: str, way: Forwarder, dice: random.Random) -> None:
        self.ends: Counter[str] = Counter()
        self._app = app
        self._queue = queue
        self._way = way
        self._dice = dice
        self._task = app.task(name="cancelled.task")(_nothing)

    async def run(self, count: int) -> None:
        """So many publishes; then one that has to work."""
        places = asyncio.Semaphore(AT_ONCE)
        async with places:
            await self._publish("adelay")

        async def one(number: int) -> None:
            async with places:
                if number % CUT_EVERY == CUT_EVERY - 1:
                    self._way.cut()
                await self._cancel_one(self._dice.choice(("adelay", "aapply_async", "publish_many")))

        await asyncio.gather(*(one(number) for number in range(count)))
        await self._publish("adelay")

    async def _cancel_one(self, how: str) -> None:
        publishing = asyncio.ensure_future(self._publish(how))
        began = time.monotonic()
        seconds = SHORTEST * (LONGEST_WAIT / SHORTEST) ** self._dice.random()
        await asyncio.wait({publishing}, timeout=seconds)
        was_done = publishing.done()
        publishing.cancel()
        await asyncio.wait({publishing}, timeout=LONGEST)
        if time.monotonic() - began > LONGEST:
            self.ends["late"] += 1
        if not publishing.done():
            self.ends["hung"] += 1
        elif publishing.cancelled():
            self.ends["cancelled"] += 1
        elif isinstance(publishing.exception(), PublishError):
            self.ends["failed"] += 1
        elif publishing.exception() is not None:
            self.ends[f"raised {publishing.exception()!r}"] += 1
        else:
            # What ends in the very turn in which it is cancelled has ended.
            self.ends["ended" if was_done else "swallowed"] += 1

    async def _publish(self, how: str) -> None:
        if how == "adelay":
            await self._task.adelay()
        elif how == "aapply_async":
            await self._task.aapply_async(queue=self._queue)
        else:
            batch = [Message(b"", Properties(), "", self._queue) for _ in range(30)]
            errors = await self._app.async_publisher.publish_many(batch, timeout=DEADLINE)
            for error in errors:
                if error is not None:
                    raise error


def _nothing() -> None:
    """A task that nobody runs."""


def cancel(url: str, count: int, seed: int) -> Counter[str]:
    """What came of so many publishes; `connections` are those that were open at the end."""
    queue = f"cancelled-{uuid.uuid4().hex[:8]}"
    with Forwarder(url) as way:
        app = AmqTask("cancelled", broker=way.url, broker_publish_timeout=DEADLINE, task_default_queue=queue)
        found = Cancelled(app, queue, way, random.Random(seed))

        async def main() -> None:
            await found.run(count)
            found.ends["connections"] = way.open_connections
            await app.async_publisher.close()

        with suppress(KeyboardInterrupt):
            asyncio.run(main())
    connection = pika.BlockingConnection(pika.URLParameters(url))
    for name in (queue, f"{queue}.dead"):
        connection.channel().queue_delete(name)
    connection.close()
    return found.ends


def is_well(ends: Counter[str]) -> bool:
    """Whether nothing hung, was late, swallowed, raised something else, or left connections behind."""
    return set(ends) <= {"cancelled", "ended", "failed", "connections"} and ends["connections"] <= 2


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m integration.cancelled")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with broker() as url:
        ends = cancel(url, options.count, options.seed)
    print(dict(ends))
    return 0 if is_well(ends) else 1


if __name__ == "__main__":
    sys.exit(main())
