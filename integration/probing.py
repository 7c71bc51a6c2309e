"""When a cluster worked, as seen by a bare client: what our own clients' pauses are measured against.

Each round is on a new channel, because whoever was connected to a node that fails needs one: RabbitMQ 3.10 asks the node that
led a quorum queue before a channel's first message to it, without a time limit (rabbit_fifo_client:enqueue/3, an rpc:call),
and one that stands still is asked until its net_ticktime is over, 60 s by default.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from types import TracebackType

import pika

# A round through all probe queues that takes longer: the cluster does not work well enough to blame anybody.
SLOW = 1.0
PAUSE = 0.25
Stretch = tuple[float, float]


class Probe:
    """Publishes to a quorum queue of each node over each node, and gets it back, again and again."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._urls = list(urls)
        self._rounds: list[list[Stretch]] = [[] for _ in self._urls]
        self._over = threading.Event()
        # Daemons: a node that is paused keeps them.
        self._threads = [
            threading.Thread(target=self._watch, args=(number,), daemon=True) for number in range(len(self._urls))
        ]

    def __enter__(self) -> Probe:
        for number, url in enumerate(self._urls):
            with pika.BlockingConnection(pika.URLParameters(url)) as connection:
                arguments = {"x-queue-type": "quorum", "x-queue-leader-locator": "client-local"}
                connection.channel().queue_declare(_name(number), durable=True, arguments=arguments)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(2)

    def stretches(self, begin: float, end: float) -> list[Stretch]:
        """From when to when at least one node worked, within these times (of time.time)."""
        good = sorted(found for rounds in self._rounds for found in _joined(list(rounds)))
        merged: list[Stretch] = []
        for start, stop in good:
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            else:
                merged.append((start, stop))
        return [(max(start, begin), min(stop, end)) for start, stop in merged if start < end and stop > begin]

    def _watch(self, number: int) -> None:
        while not self._over.is_set():
            try:
                with pika.BlockingConnection(pika.URLParameters(self._urls[number] + "?heartbeat=600")) as connection:
                    self._rounds_on(connection, number)
            except (pika.exceptions.AMQPError, OSError):
                self._over.wait(PAUSE)

    def _rounds_on(self, connection: pika.BlockingConnection, number: int) -> None:
        while not self._over.wait(PAUSE):
            begun = time.time()
            channel = connection.channel()
            channel.confirm_delivery()
            for queue in range(len(self._urls)):
                channel.basic_publish("", _name(queue), b"", mandatory=True)
                channel.basic_get(_name(queue), auto_ack=True)
            channel.close()
            ended = time.time()
            if ended - begun < SLOW:
                self._rounds[number].append((begun, ended))


def without(stretches: Sequence[Stretch], gaps: Sequence[Stretch]) -> list[Stretch]:
    """The stretches, but for what is in gaps."""
    found = list(stretches)
    for begin, end in gaps:
        parts = [part for start, stop in found for part in ((start, min(stop, begin)), (max(start, end), stop))]
        found = [(start, stop) for start, stop in parts if start < stop]
    return found


def _joined(rounds: list[Stretch]) -> list[Stretch]:
    """From one good round to the next it worked, when they are close."""
    return [(one[0], other[1]) for one, other in pairwise(rounds) if other[0] - one[1] < PAUSE + SLOW]


def _name(number: int) -> str:
    return f"probe-{number}"
