"""When a worker is live, and when it is ready."""

from __future__ import annotations

import pytest

from amqtask.protocol.entities import Queue
from amqtask.protocol.message import Message, Properties
from amqtask.services.monitoring import Health
from amqtask.services.watchdog import Watchdog
from tests.worker.bench import Bench


class Patient:
    """A worker, its watchdog and its health."""

    def __init__(self) -> None:
        self.bench = Bench(slots=1)
        self.watchdog = Watchdog(self.bench.worker, clock=lambda: self.bench.loop.now)
        self.watchdog.start()
        self.health = Health(self.bench.worker, self.watchdog.stuck_for, self.watchdog.unconfirmed_for)

    def live(self) -> tuple[int, str]:
        reply = self.health.live({})
        return reply.status, reply.body.decode().strip()

    def ready(self) -> tuple[int, str]:
        reply = self.health.ready({})
        return reply.status, reply.body.decode().strip()


def test_a_worker_that_consumes_is_live_and_ready() -> None:
    patient = Patient()

    assert patient.live() == (200, "live")
    assert patient.ready() == (200, "ready: consuming q")


def test_a_queue_that_was_cancelled_is_not_told_as_consumed() -> None:
    patient = Patient()
    patient.bench.worker.lifecycle.consume(Queue("more"), None)
    assert patient.ready() == (200, "ready: consuming more, q")

    patient.bench.operations.cancel("q")
    assert patient.ready() == (200, "ready: consuming more")
    patient.bench.operations.cancel("more")
    assert patient.ready() == (200, "ready: consuming nothing: all queues were cancelled (cancel_consumer)")


def test_a_worker_without_its_broker_is_live_and_not_ready() -> None:
    patient = Patient()
    patient.bench.consumer.is_consuming = False

    assert patient.live() == (200, "live")
    assert patient.ready() == (503, "reconnecting to the broker")


def test_a_worker_that_shuts_down_is_live_until_its_tasks_have_ended() -> None:
    patient = Patient()
    patient.bench.deliver("a")
    patient.bench.worker.lifecycle.shutdown.warm("TERM")

    assert patient.live() == (200, "live")
    assert patient.ready() == (503, "shutting down: 1 task still runs")


def test_a_busy_worker_is_live_however_long_its_task_takes() -> None:
    patient = Patient()
    patient.bench.deliver("a", "b")
    patient.bench.loop.advance(3600)

    assert patient.live() == (200, "live")


def test_a_worker_that_could_work_and_does_not_is_not_live() -> None:
    patient = Patient()
    bench = patient.bench
    bench.deliver("a", "b")
    bench.pool.slots = 3  # and nobody tells the dispatcher
    bench.loop.advance(10)
    assert patient.live()[0] == 200

    bench.loop.advance(34)

    status, reason = patient.live()
    assert status == 503
    assert reason.startswith("stuck: 1 task waiting, slots are free, and nothing has moved for ")


def test_a_worker_whose_results_are_not_confirmed_is_told(caplog: pytest.LogCaptureFixture) -> None:
    patient = Patient()
    bench = patient.bench
    bench.worker.publisher.publish(Message(b"", Properties(), "", "nobody-confirms"), lambda error: None)
    bench.loop.advance(6)
    assert (patient.ready()[0], patient.live()[0]) == (200, 200)

    bench.loop.advance(20)
    assert (patient.ready()[0], patient.live()[0]) == (503, 200)

    bench.loop.advance(50)
    assert patient.live()[0] == 503
    assert "publishing is stuck: 1 message waiting" in patient.live()[1]
    told = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(told) == 1
    assert "'nobody-confirms'" in told[0]

    bench.publisher.confirm_all()
    assert (patient.ready()[0], patient.live()[0]) == (200, 200)
