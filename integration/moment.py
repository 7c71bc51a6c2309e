"""A consumer that is started in the very moment in which its node loses the others.

    python -m integration.moment --version 4.3 [--roots DIR]

Two queues are led by the node that is cut off. Right after the cut the window of a consumer of the one grows, which starts
another consumer on its channel; beside a consumer of the other one a second one is started, on a channel of its own. Both leave
the node by themselves. When it is back, 300 messages are published to each queue, and consumers on another node take them, too.
It prints how long it took until all of them were delivered.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from amqtask.protocol.entities import Queue, arguments
from amqtask.protocol.message import Message, Properties
from amqtask.testing.suites.transport import Listener
from amqtask.topology.declarations import DISCONNECTED
from amqtask.transport.amqp import AmqpSharedEnds
from amqtask.transport.connection import LoopConnection
from amqtask.transport.loop import PikaLoop
from amqtask.transport.publisher import PikaPublisher
from amqtask.transport.url import parse_broker_urls
from integration.nodes import Cluster, RabbitNode
from integration.roots import RELEASES, root_of

MESSAGES, WINDOW = 300, 100
# Seconds: how long the node is cut off, how long all may take after that, and what is prompt.
CUT, PATIENCE, PROMPT = 15.0, 90.0, 5.0
SAME, OWN = "on the same channel", "on its own channel"


class Way:
    """A queue that the node leads, a consumer there, which may leave for `third`, and one on another node."""

    def __init__(self, name: str, loop: PikaLoop, cut: RabbitNode, third: RabbitNode, other: RabbitNode) -> None:
        words = {"x-queue-type": "quorum", "x-queue-leader-locator": "client-local"}
        self.queue = Queue(f"moment {name}", arguments=arguments({**words, **DISCONNECTED}))
        publisher(cut).declare([self.queue])
        self.ends = AmqpSharedEnds(LoopConnection(parse_broker_urls(f"{cut.url};{third.url}"), loop))
        self.there = self._consuming(self.ends, WINDOW)
        self.elsewhere = self._consuming(AmqpSharedEnds(LoopConnection(parse_broker_urls(other.url), loop)), 10)

    def _consuming(self, ends: AmqpSharedEnds, prefetch: int, *, is_second: bool = False) -> Listener:
        listener = Listener(acks=True)
        listener.consumer = ends.consumer(listener, is_second=is_second)
        listener.consumer.add_queue(self.queue, prefetch=prefetch, declare=(self.queue,) if not is_second else ())
        listener.consumer.start()
        return listener

    def second(self) -> Listener:
        """A second consumer beside that on the node."""
        return self._consuming(self.ends, WINDOW, is_second=True)

    @property
    def is_consuming(self) -> bool:
        return bool(self.there.consuming and self.elsewhere.consuming)

    @property
    def delivered(self) -> int:
        """How many different messages were."""
        return len({*self.there.bodies, *self.elsewhere.bodies})


def publisher(node: RabbitNode) -> PikaPublisher:
    """To one node."""
    return PikaPublisher(parse_broker_urls(node.url), timeout=10, on_warning=print)


def turn(loop: PikaLoop, seconds: float, until: Callable[[], object] = lambda: False) -> None:
    """Turn the loop."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not until():
        loop.run_once(0.01)


def run(root: str) -> dict[str, float]:
    """By way: after how many seconds all messages were delivered."""
    loop = PikaLoop()
    with Cluster(root=root) as cluster:
        other, cut, third = cluster.nodes
        ways = {name: Way(name, loop, cut, third, other) for name in (SAME, OWN)}
        turn(loop, PATIENCE, lambda: all(way.is_consuming for way in ways.values()))
        cutting = threading.Thread(target=cluster.isolate, args=(cut,))
        cutting.start()
        turn(loop, PATIENCE, lambda: not cutting.is_alive())
        same, own = ways[SAME], ways[OWN]
        if same.there.consumer is not None:
            same.there.consumer.set_prefetch(same.queue.name, 2 * WINDOW)
        second = own.second()
        turn(loop, CUT, lambda: own.there.lost)
        if second.consumer is not None:
            second.consumer.stop()  # as the forwarder does when the first consumer has lost its connection
        turn(loop, CUT)
        cluster.heal()
        cluster.await_whole()
        return _delivered(loop, ways, publisher(other))


def _delivered(loop: PikaLoop, ways: dict[str, Way], publishing: PikaPublisher) -> dict[str, float]:
    began: dict[str, float] = {}
    for name, way in ways.items():
        began[name] = time.monotonic()
        for number in range(MESSAGES):
            publishing.publish(Message(b"%d" % number, Properties(), "", way.queue.name))
    seconds: dict[str, float] = {}

    def look() -> bool:
        for name, way in ways.items():
            if way.delivered == MESSAGES:
                seconds.setdefault(name, time.monotonic() - began[name])
        return len(seconds) == len(ways)

    turn(loop, PATIENCE, look)
    return {name: seconds.get(name, PATIENCE) for name in ways}


def main() -> int:
    """The command line; the exit code says whether the way of the delay queues was prompt."""
    parser = argparse.ArgumentParser(prog="python -m integration.moment")
    parser.add_argument("--version", choices=sorted(RELEASES), help="default: this machine's RabbitMQ")
    parser.add_argument("--roots", type=Path, default=Path(".roots"), help="where other versions are, or are put")
    options = parser.parse_args()
    seconds = run(root_of(options.version, options.roots.resolve()) if options.version else "")
    for name, taken in seconds.items():
        print(f"another consumer {name}: all {MESSAGES} messages delivered after {taken:.1f} s", flush=True)
    return 0 if seconds[OWN] < PROMPT else 1


if __name__ == "__main__":
    sys.exit(main())
