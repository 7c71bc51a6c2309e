"""Beats on an in-memory broker whose time the test turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta, timezone
from typing import ClassVar

from amqtask import AmqTask
from amqtask.beat.contract import Entry, Run, ScheduleStore
from amqtask.beat.leader import LeaderListener, Leadership, leader_queue
from amqtask.beat.scheduler import Scheduler
from amqtask.beat.sender import AppSender
from amqtask.beat.service import Beat, Clerk
from amqtask.protocol.task import decode_body
from amqtask.schedules import schedule
from amqtask.testing.loop import PlainLoop
from amqtask.transport.connection import LoopConnection
from amqtask.transport.consumer import PikaConsumer
from amqtask.transport.loop_publisher import PikaLoopPublisher
from amqtask.transport.memory.broker import ManualClock, MemoryBroker
from amqtask.transport.memory.local import MemoryAddress

START = datetime(2026, 5, 4, 12, tzinfo=timezone.utc)
QUEUE = "amqtask.beat.test"


def entry(name: str = "tick", seconds: float = 10.0, **fields: object) -> Entry:
    values: dict[str, object] = {"task": "tasks.tick", "schedule": schedule(seconds), **fields}
    return Entry(name=name, **values)  # type: ignore[arg-type]


class ListStore:
    """A store whose entries the test changes; it keeps the contract, and fails when told."""

    poll_seconds: ClassVar[float] = 2.0

    def __init__(self, *entries: Entry) -> None:
        self.now: list[Entry] = list(entries)
        self.runs: list[Run] = []
        self.error: Exception | None = None
        self.is_closed = False
        self._told: list[Entry] = []

    def entries(self) -> Iterable[Entry]:
        self._told = list(self.now)
        return self._told

    def has_changed(self) -> bool:
        if self.error is not None:
            raise self.error
        return self.now != self._told

    def record(self, runs: Sequence[Run]) -> None:
        self.runs += runs

    def close(self) -> None:
        self.is_closed = True


class Bench:
    """One broker, one loop, one clock; as many beats as wanted."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self._start = self.clock()
        self.broker = MemoryBroker(clock=self.clock)
        self.addresses = [MemoryAddress(broker=self.broker)]
        self.loop = PlainLoop(self.clock)
        self.app = AmqTask("tasks", broker="memory://", set_as_current=False)

        @self.app.task(name="tasks.tick")
        def tick(word: str = "") -> str:
            return word

        self.app.finalize()

    @property
    def now(self) -> datetime:
        return START + timedelta(seconds=self.clock() - self._start)

    def beat(self, store: ScheduleStore, **options: object) -> Beat:
        shared = LoopConnection(self.addresses, self.loop, heartbeat=0, connect_timeout=4.0, name="beat")
        publisher = PikaLoopPublisher(shared, resends=False, nack_patience=0.0)

        def lead(listener: LeaderListener, seed: Callable[[], bytes]) -> Leadership:
            return Leadership(
                leader_queue(QUEUE, queue_type="quorum"),
                loop=self.loop,
                make_consumer=lambda owner: PikaConsumer(shared, owner),
                publisher=publisher,
                listener=listener,
                seed=seed,
            )

        return Beat(
            loop=self.loop,
            clerk=Clerk(lambda: store, self.loop),
            scheduler=Scheduler(timezone.utc),
            sender=AppSender(self.app, QUEUE),
            publisher=publisher,
            make_leadership=lead,
            clock=lambda: self.now,
            **options,  # type: ignore[arg-type]
        )

    def turn(self, condition: Callable[[], bool], what: str = "") -> None:
        """Turn the loop until it is so; the clock stands, but for the threads of stores."""
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, what or "it never became so"
            self.loop.run_once(0.001)

    def passing(self, condition: Callable[[], bool], what: str = "") -> None:
        """The same while time passes."""

        def is_so() -> bool:
            self.clock.advance(0.05)
            return condition()

        self.turn(is_so, what)

    def leading(self, beat: Beat) -> None:
        """Until it leads and has stored its state."""
        self.passing(lambda: beat.is_leading and not beat.is_busy, "it does not lead")

    def until(self, seconds: float) -> None:
        """Let the time come at which so many seconds have passed since the start, in small steps."""
        while (self.now - START).total_seconds() < seconds:
            self.clock.advance(min(0.5, seconds - (self.now - START).total_seconds()))
            for _ in range(5):
                self.loop.run_once(0.0)

    @property
    def sent(self) -> list[tuple[str, str, float]]:
        """What the work queue holds: entry, task id, seconds from the start to the due time."""
        if "amqtask" not in self.broker.queue_names():
            return []
        found = []
        for properties, _ in self.broker.messages("amqtask"):
            headers = properties.headers
            due = datetime.fromisoformat(headers["periodic_task_due"])
            found.append((headers["periodic_task_name"], headers["id"], round((due - START).total_seconds(), 1)))
        return found

    @property
    def dues(self) -> list[float]:
        """Due times of what the work queue holds, from when the first beat led, in order of sending."""
        return [due for _, _, due in self.sent]

    def arguments(self, number: int) -> tuple[object, object]:
        """Arguments of one message."""
        properties, body = self.broker.messages("amqtask")[number]
        args, kwargs, _ = decode_body(
            body, properties.content_type, properties.content_encoding, properties.headers,
            frozenset({"application/json"}),
        )  # fmt: skip
        return args, kwargs
