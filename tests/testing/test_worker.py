"""An app and its worker in this process, on `memory://`: what users' own tests do."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

import pytest

from amqtask import AmqTask, Broadcast, Queue, chain, chord, group
from amqtask.exceptions import ConfigurationError, Reject, TaskRevokedError, Unroutable
from amqtask.testing.worker import start_worker
from integration.waiting import eventually


class Shop:
    """An app with tasks that behave in the ways that the tests ask for."""

    def __init__(self) -> None:
        self.app = AmqTask(
            "shop", broker="memory://", backend="cache+memory://", task_default_queue="work", set_as_current=False
        )
        self.runs: list[Any] = []
        app, runs = self.app, self.runs

        @app.task(name="shop.add")
        def add(x: int, y: int) -> int:
            return x + y

        @app.task(name="shop.note", ignore_result=True)
        def note(what: Any) -> None:
            runs.append(what)

        @app.task(name="shop.twice", bind=True, max_retries=3, default_retry_delay=0)
        def twice(self: Any) -> int:
            if self.request.retries < 1:
                raise self.retry()
            return int(self.request.retries)

        @app.task(name="shop.refuse", acks_late=True)
        def refuse() -> None:
            runs.append("refuse")
            raise Reject("not today", requeue=True)

        self.add, self.note, self.twice, self.refuse = add, note, twice, refuse

    def dead(self, queue: str = "work.dead") -> list[tuple[Any, bytes]]:
        broker = self.app.memory_broker
        assert broker is not None
        return broker.messages(queue) if queue in broker.queue_names() else []

    def count(self, queue: str) -> int:
        broker = self.app.memory_broker
        assert broker is not None
        return broker.count(queue)


@pytest.fixture
def shop() -> Iterator[Shop]:
    made = Shop()
    yield made
    made.app.close()


@pytest.mark.parametrize("pool", ["solo", "threads", "asyncio"])
def test_a_result_comes_back(shop: Shop, pool: str) -> None:
    with start_worker(shop.app, pool=pool, concurrency=2):
        assert shop.add.delay(2, 3).get(timeout=60) == 5


def test_a_retry_goes_through_the_broker(shop: Shop) -> None:
    with start_worker(shop.app):
        assert shop.twice.delay().get(timeout=60) == 1


def test_a_countdown_is_waited_for(shop: Shop) -> None:
    with start_worker(shop.app):
        called_at = time.monotonic()
        late = shop.add.apply_async((1, 1), countdown=0.3)
        assert shop.add.delay(2, 2).get(timeout=60) == 4
        is_early = late.ready()
        assert not is_early or time.monotonic() - called_at >= 0.3  # the machine stood still
        assert late.get(timeout=60) == 2


def test_only_its_queues_are_consumed(shop: Shop) -> None:
    other = shop.note.apply_async(("other",), queue="other")
    with start_worker(shop.app, queues=["work"]):
        assert shop.add.delay(2, 3).get(timeout=60) == 5
    assert shop.runs == []
    assert shop.count("other") == 1
    assert other.id


def test_a_chain_and_a_group_run(shop: Shop) -> None:
    with start_worker(shop.app, pool="threads", concurrency=2):
        assert chain(shop.add.s(1, 2), shop.add.s(10)).apply_async().get(timeout=60) == 13
        assert group(shop.add.s(n, n) for n in range(5)).apply_async().get(timeout=60) == [0, 2, 4, 6, 8]


def test_many_calls_in_a_pipeline_run_in_their_order(shop: Shop) -> None:
    with start_worker(shop.app):
        with shop.app.pipeline():
            for number in range(20):
                shop.note.delay(number)
        assert shop.add.delay(0, 0).get(timeout=60) == 0
    assert shop.runs == list(range(20))


def test_an_unknown_task_is_kept_with_the_reason(shop: Shop) -> None:
    with start_worker(shop.app):
        shop.app.send_task("shop.unknown", queue="work")
        assert shop.add.delay(0, 0).get(timeout=60) == 0
    ((properties, _),) = shop.dead()
    assert "shop.unknown" in str(properties.headers)


def test_a_message_that_is_refused_each_time_ends_in_the_dead_letter_queue(shop: Shop) -> None:
    shop.refuse.delay()
    with start_worker(shop.app):
        while not shop.dead():
            assert shop.add.delay(0, 0).get(timeout=60) == 0
    assert 1 < len(shop.runs) <= 6


def test_a_revoked_task_does_not_run(shop: Shop) -> None:
    with start_worker(shop.app, queues=["work"]) as worker:
        worker.loop.call_soon_threadsafe(lambda: worker.revoked.add(["unwanted"], time.time()))
        result = shop.add.apply_async((1, 1), countdown=0.2, task_id="unwanted")
        with pytest.raises(TaskRevokedError):
            result.get(timeout=60)


def test_an_unroutable_call_is_an_error_of_that_call(shop: Shop) -> None:
    with pytest.raises(Unroutable):
        shop.app.send_task("shop.add", exchange="amq.direct", routing_key="nowhere")


def test_what_ends_the_worker_is_raised_in_the_test(shop: Shop) -> None:
    shop.app.task(name="shop.limited", soft_time_limit=1)(lambda: None)
    with pytest.raises(ConfigurationError, match=r"shop\.limited"), start_worker(shop.app, pool="threads"):
        pytest.fail("the worker must not start")


@pytest.mark.parametrize("pool", ["prefork", "eventlet", "gevent"])
def test_a_pool_that_needs_a_process_is_refused(shop: Shop, pool: str) -> None:
    with pytest.raises(ConfigurationError, match="solo, threads or asyncio"), start_worker(shop.app, pool=pool):
        pytest.fail("the worker must not start")


def test_a_real_broker_is_refused() -> None:
    app = AmqTask("real", broker="amqp://localhost//", set_as_current=False)
    with pytest.raises(ConfigurationError, match="memory://"), start_worker(app):
        pytest.fail("the worker must not start")


@pytest.fixture
def over_rpc() -> Iterator[AmqTask]:
    with AmqTask("rpc", broker="memory://", backend="rpc://", set_as_current=False) as app:
        app.task(name="double")(lambda number: 2 * number)
        app.task(name="total")(sum)
        yield app


def test_results_over_rpc_come_through_a_queue_of_the_in_memory_broker(over_rpc: AmqTask) -> None:
    assert over_rpc.memory_broker is not None
    with start_worker(over_rpc):
        result = over_rpc.send_task("double", (2,))
        assert result.get(timeout=60) == 4
        assert over_rpc.memory_broker.count(result.id) == 0
        reply_queues = [name for name in over_rpc.memory_broker.queue_names() if len(name) == len(result.id)]
        assert len(reply_queues) == 1


def test_a_chord_over_rpc_is_joined_in_the_in_memory_broker(over_rpc: AmqTask) -> None:
    tasks = over_rpc.tasks
    with start_worker(over_rpc):
        joined = chord([tasks["double"].s(number) for number in range(4)], tasks["total"].s()).apply_async()
        assert joined.get(timeout=60) == 12


def test_a_worker_is_asked_over_the_in_memory_broker(over_rpc: AmqTask) -> None:
    with start_worker(over_rpc) as worker:
        node = worker.setup.hostname
        assert over_rpc.control.inspect().ping() == {node: {"ok": "pong"}}
        queues = over_rpc.control.inspect().active_queues() or {}
        assert [queue["name"] for queue in queues[node]] == ["amqtask"]
        over_rpc.control.add_consumer("more", destination=[node], reply=True)
        assert over_rpc.send_task("double", (4,), queue="more").get(timeout=60) == 8


def test_the_consumer_of_a_broadcast_is_known_by_its_name() -> None:
    app = AmqTask("all", broker="memory://", task_queues=[Broadcast("news"), Queue("work")], set_as_current=False)
    heard: list[int] = []
    app.task(name="hear")(heard.append)

    def tell(number: int) -> None:
        app.send_task("hear", (number,), queue="news")
        app.send_task("hear", (-number,), queue="work")

    with app, start_worker(app) as worker:
        to_it: Any = {"destination": [worker.setup.hostname], "reply": True}
        app.control.add_consumer("news", **to_it)
        tell(1)
        eventually(lambda: sorted(heard) == [-1, 1], what=lambda: str(heard))

        ((_, said),) = app.control.cancel_consumer("news", **to_it)[0].items()
        assert said == {"ok": "no longer consuming from news"}
        tell(2)
        eventually(lambda: -2 in heard)
        assert 2 not in heard

        app.control.add_consumer("news", **to_it)
        eventually(lambda: heard.count(2) == 1)
        tell(3)
        eventually(lambda: {3, -3} <= set(heard))
        assert sorted(heard) == [-3, -2, -1, 1, 2, 3]


def test_what_waits_in_the_in_memory_broker_is_purged(over_rpc: AmqTask) -> None:
    for number in range(3):
        over_rpc.send_task("double", (number,), ignore_result=True)

    assert over_rpc.control.purge() == 3


def test_a_worker_that_starts_learns_from_its_neighbour_over_the_in_memory_broker(over_rpc: AmqTask) -> None:
    with start_worker(over_rpc, queues=["old"], hostname="old@here"):
        over_rpc.control.revoke("called-off", reply=True, destination=["old@here"])
        with start_worker(over_rpc, queues=["new"], hostname="new@here"):
            # It waits for answers for a moment before it runs anything; later ones are taken, too.
            eventually(
                lambda: over_rpc.control.inspect(["new@here"]).revoked() == {"new@here": ["called-off"]},
                what="it has not learned",
            )


class BrokenHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise RuntimeError(f"cannot send {record.levelname}")


@pytest.mark.parametrize("pool", ["solo", "threads"])
def test_a_log_handler_that_raises_ends_neither_worker_nor_task(
    shop: Shop, pool: str, capfd: pytest.CaptureFixture[str]
) -> None:
    logger, handler = logging.getLogger("amqtask"), BrokenHandler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with start_worker(shop.app, pool=pool):
            assert shop.app.send_task("shop.add", (2, 2)).get(timeout=30) == 4
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)

    assert "RuntimeError: cannot send INFO" in capfd.readouterr().err
