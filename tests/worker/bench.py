"""A worker with everything around it in the test's hands."""

from __future__ import annotations

from typing import Any

from amqtask import states
from amqtask.exceptions import WorkerLostError
from amqtask.execution.chain_steps import Stops
from amqtask.execution.request import Answer, Outcome, Request
from amqtask.protocol.entities import Queue
from amqtask.protocol.message import Delivery, Message, Properties
from amqtask.topology.delays import DelayPlan
from amqtask.worker.operations import Operations
from amqtask.worker.options import WorkerSetup, WorkQueue
from amqtask.worker.report import Report
from amqtask.worker.worker import Worker
from tests.worker.fakes import HandLoop, HandPool, HandPublisher, ToldConsumer

QUEUE, DEAD = Queue("q"), Queue("q.dead")


class FakeTask:
    """The options of a task that a worker reads."""

    send_events = True

    def __init__(self, **options: Any) -> None:
        self.acks_late = options.get("acks_late", True)
        self.deadline: float | None = options.get("deadline")
        self.flow_plan = None
        self.batch = None
        self.time_limit = options.get("time_limit")
        self.soft_time_limit = options.get("soft_time_limit")


class Endings:
    """Outcomes of requests that no slot ran."""

    def refused(self, request: Request, error: Exception) -> Outcome:
        return Outcome(
            request.number,
            states.FAILURE,
            Answer.DEAD_LETTER,
            type(error).__name__,
            summary=str(error),
            result=result(),
        )

    def lost_finally(self, request: Request, error: WorkerLostError) -> Outcome:
        return self.refused(request, error)

    def revoked(self, request: Request, reason: str) -> Outcome:
        return Outcome(request.number, states.REVOKED, reason=reason)

    def expired(self, request: Request) -> Outcome:
        return Outcome(request.number, states.REVOKED, reason="expired")


def result() -> Message:
    return Message(b"{}", Properties(), routing_key="reply-queue")


def follow_up(task_id: str = "next") -> Message:
    headers = {"task": "t", "id": task_id}
    return Message(b"[[], {}, {}]", Properties("application/json", "utf-8", headers), routing_key="q")


class Bench:
    """A worker with everything around it in the test's hands."""

    def __init__(
        self,
        *,
        slots: int = 2,
        dead_letter: Queue | None = DEAD,
        endings: Any = None,
        queue: Queue = QUEUE,
        pool: Any = None,
        **setup: Any,
    ) -> None:
        self.loop, self.pool, self.publisher, self.consumer = (
            HandLoop(),
            pool or HandPool(slots),
            HandPublisher(),
            ToldConsumer(),
        )
        tasks: Any = {"t": FakeTask(), "early": FakeTask(acks_late=False)}
        no_runs: Any = endings or Endings()
        self.worker = Worker(
            WorkerSetup(
                hostname="w@h",
                queues=(WorkQueue(queue, dead_letter),),
                tasks=tasks,
                delays=DelayPlan(),
                stops=Stops(),
                install_signals=False,
                **setup,
            ),
            loop=self.loop,
            publisher=self.publisher,
            endings=no_runs,
            report=Report(),
            make_pool=self.take_pool,
            make_consumer=lambda listener: self.consumer,
            clock=lambda: self.loop.now,
        )
        self.operations = Operations(self.worker)
        self.worker.lifecycle.consume(queue, dead_letter)
        self.epoch = 1
        self.tag = 0
        self.worker.on_consuming(1)

    def take_pool(self, on_outcomes: Any) -> Any:
        self.pool.on_outcomes = on_outcomes
        return self.pool

    def deliver(
        self,
        *ids: str,
        task: str | None = "t",
        redelivered: bool = False,
        body: bytes = b"[[], {}, {}]",
        queue: str = "q",
        **headers: Any,
    ) -> None:
        for task_id in ids:
            self.tag += 1
            own = {"task": task, "id": task_id, **headers} if task is not None else headers
            properties = Properties(content_type="application/json", content_encoding="utf-8", headers=own)
            self.worker.on_delivery(Delivery(body, properties, "", queue, redelivered, queue, self.tag, self.epoch))
        self.loop.turn()

    def end(self, task_id: str, **fields: Any) -> None:
        number = next(number for number, request in self.pool.running.items() if request.id == task_id)
        self.pool.end(number, **fields)

    def pass_time(self, seconds: float) -> None:
        self.loop.advance(seconds)
        self.worker.lifecycle.look_at_long_tasks()
        self.worker.wake()
        self.loop.turn()

    def lose_connection(self, error: Exception | None = None) -> None:
        self.consumer.epoch += 1
        self.worker.on_connection_lost(error or ConnectionError("cut"))
        self.reconnect()

    def reconnect(self) -> None:
        self.consumer.epoch += 1
        self.epoch = self.consumer.epoch
        self.tag = 0
        self.consumer.frames.clear()
        self.worker.on_consuming(self.epoch)

    @property
    def frames(self) -> list[tuple[Any, ...]]:
        self.loop.turn()
        return self.consumer.frames

    @property
    def started(self) -> list[str]:
        return [request.id for request in self.pool.started]
