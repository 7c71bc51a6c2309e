"""The outbox on PostgreSQL and RabbitMQ: relays side by side, a worker's relay, async sessions, delays, chords."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import datetime, timezone
from typing import Any
from urllib.parse import urlsplit

import pytest
from sqlalchemy import Column, Engine, Integer, MetaData, Table, create_engine, func, insert, update
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from amqtask import AmqTask, chord
from amqtask.assembly import build_relay
from amqtask.contrib.sqlalchemy import SqlAlchemyOutbox, outbox_table
from amqtask.outbox.contract import OutboxUnreachable, StoredRow, Verdict
from integration.conftest import Broker
from integration.faults import Forwarder
from integration.machine import free_port
from integration.waiting import PATIENT
from integration.workers import ROOT, WorkerProcess, eventually, run_cli


class Shop:
    """An outbox on PostgreSQL."""

    def __init__(self, database: str, broker: str, queue: str) -> None:
        self.url = database.replace("postgresql:", "postgresql+psycopg:", 1)
        self.engine: Engine = create_engine(self.url)
        self.metadata = MetaData()
        self.orders = Table("orders", self.metadata, Column("id", Integer, primary_key=True))
        self.table = outbox_table(self.metadata)
        self.metadata.create_all(self.engine)
        self.sessions = sessionmaker(self.engine)
        self.queue = queue
        self.app = AmqTask("shop", broker=broker, **PATIENT, task_default_queue=queue, set_as_current=False)
        self.outbox = SqlAlchemyOutbox(self.app, self.table, sessions=self.sessions)

    def call(self, *args: Any, **options: Any) -> str:
        return str(self.app.send_task("sample.add", args, **options).id)

    def close(self) -> None:
        self.app.close()
        self.engine.dispose()


@pytest.fixture
def shop(postgres: str, broker_url: str, rabbit: Broker) -> Iterator[Shop]:
    with closing(Shop(postgres, broker_url, rabbit.queue("outbox"))) as made:
        yield made


def ids(rabbit: Broker, queue: str) -> list[str]:
    found = []
    while (taken := rabbit.take(queue)) is not None:
        found.append(taken[0].headers["id"])
    return found


def test_a_relay_publishes_what_is_committed_in_its_order(shop: Shop, rabbit: Broker) -> None:
    with shop.sessions.begin():
        kept = [shop.call(number) for number in range(1200)]
    with shop.sessions() as session:
        session.execute(insert(shop.orders))
        shop.call("never")
        session.rollback()

    step = build_relay(shop.app).drain()

    assert (step.sent, step.failed) == (1200, 0)
    assert ids(rabbit, shop.queue) == kept


def test_what_one_relay_holds_another_passes_over(shop: Shop) -> None:
    with shop.sessions.begin():
        for number in range(4):
            shop.call(number)
    first, second = shop.outbox.store(), shop.outbox.store()
    seen: list[list[int]] = []
    now = datetime.now(timezone.utc)

    def send(rows: Sequence[StoredRow]) -> Verdict:
        seen.append([row.id for row in rows])
        return Verdict([row.id for row in rows])

    def send_first(rows: Sequence[StoredRow]) -> Verdict:
        second.relay(10, now, send)
        return send(rows)

    assert first.relay(3, now, send_first) == 3
    assert [len(rows) for rows in seen] == [1, 3]
    assert not set(seen[0]) & set(seen[1])
    assert first.waiting().rows == 0
    first.close()
    second.close()


def test_rows_of_a_relay_that_dies_come_back(shop: Shop, postgres: str) -> None:
    with shop.sessions.begin():
        shop.call(1)
    store, other = shop.outbox.store(), shop.outbox.store()
    now = datetime.now(timezone.utc)

    def die(rows: Sequence[StoredRow]) -> Verdict:
        with shop.engine.connect() as connection:
            connection.exec_driver_sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
                "AND pid <> pg_backend_pid() AND state = 'idle in transaction'"
            )
        return Verdict([row.id for row in rows])

    with pytest.raises(OutboxUnreachable):
        store.relay(10, now, die)
    assert other.relay(10, now, lambda rows: Verdict([row.id for row in rows])) == 1
    assert store.waiting().rows == 0
    store.close()
    other.close()


def test_a_message_for_an_exchange_that_is_not_there_stays_and_says_so(shop: Shop, rabbit: Broker) -> None:
    with shop.sessions.begin():
        lost = shop.call(1, exchange="nowhere-to-be-found", routing_key="x")
        good = shop.call(2)
    relay = build_relay(shop.app)

    assert relay.drain().failed == 1
    assert ids(rabbit, shop.queue) == [good]
    (failing,) = relay.store.failing(1)
    assert failing.task_id == lost
    assert "nowhere-to-be-found" in failing.error
    relay.store.close()


def test_a_row_whose_headers_fit_no_frame_stays_alone(shop: Shop, rabbit: Broker) -> None:
    with shop.sessions.begin():
        good = [shop.call(1)]
        large = shop.call(2, headers={"large": "to be"})
        good.append(shop.call(3))
    with shop.engine.begin() as connection:
        text = func.replace(shop.table.c.message, "to be", "x" * 200_000)
        connection.execute(update(shop.table).where(shop.table.c.task_id == large).values(message=text))
    relay = build_relay(shop.app)

    step = relay.drain()

    assert (step.sent, step.failed) == (2, 1)
    assert ids(rabbit, shop.queue) == good
    (failing,) = relay.store.failing(1)
    assert failing.task_id == large
    assert "frame_max" in failing.error
    relay.store.close()


def test_a_delay_counts_from_the_call(shop: Shop, rabbit: Broker) -> None:
    eta = time.time() + 2.5
    with shop.sessions.begin():
        late = shop.call(1, countdown=0.5)
        soon = shop.call(2, countdown=2.5)
    time.sleep(0.6)
    build_relay(shop.app).drain()
    arrived: list[str] = []

    def are_there() -> bool:
        arrived.extend(ids(rabbit, shop.queue))
        assert soon not in arrived or time.time() >= eta - 0.1
        return len(arrived) == 2

    eventually(are_there)
    assert arrived == [late, soon]


def test_async_sessions_write_and_the_relay_publishes(shop: Shop, rabbit: Broker) -> None:
    async def run() -> list[str]:
        engine = create_async_engine(shop.url)
        sessions = async_sessionmaker(engine)
        SqlAlchemyOutbox(shop.app, shop.table, sessions=sessions, engine=shop.url)
        async with sessions.begin() as session:
            await session.execute(insert(shop.orders))
            kept = [(await shop.app.asend_task("sample.add", (number,))).id for number in range(3)]
        async with sessions() as session:
            await session.execute(insert(shop.orders))
            await shop.app.asend_task("sample.add", ("never",))
            await session.rollback()
        await engine.dispose()
        return kept

    kept = asyncio.run(run())
    build_relay(shop.app).drain()
    assert ids(rabbit, shop.queue) == kept


# -- processes

APP = "integration.apps.outbox_sqlalchemy"
SHOW = "import integration.apps.outbox_sqlalchemy as shop; shop.prepare(); shop.order({!r}, {!r}, 0)"


@pytest.fixture
def environment(postgres: str, broker_url: str, rabbit: Broker) -> dict[str, str]:
    return {"SHOP_DATABASE": postgres, "AMQTASK_BROKER_URL": broker_url, "SHOP_QUEUE": rabbit.queue("outbox")}


def order(environment: dict[str, str], task_id: str, end: str) -> None:
    command = [sys.executable, "-c", SHOW.format(task_id, end)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=True, timeout=120)


@pytest.mark.parametrize("words", [("relay",), ("beat", "-S", "memory", "--relay", "-l", "INFO")])
def test_a_relay_process_publishes_until_it_is_told_to_end(
    environment: dict[str, str], rabbit: Broker, words: tuple[str, ...]
) -> None:
    order(environment, "kept", "commit")
    order(environment, "dropped", "rollback")
    command = [sys.executable, "-m", "amqtask", "-A", APP, *words]
    relay = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True)
    try:
        eventually(lambda: rabbit.count(environment["SHOP_QUEUE"]) == 1)
        relay.send_signal(signal.SIGTERM)
        assert relay.wait(90) == 0
    finally:
        relay.kill()
        said = relay.communicate()[1]

    assert "relaying amqtask_outbox of postgresql+psycopg://postgres@" in said
    assert ids(rabbit, environment["SHOP_QUEUE"]) == ["kept"]
    code, told = run_cli("-A", APP, "relay", "--status", "--json", environment=environment)
    assert (code, json.loads(told)["waiting"]) == (0, 0)


@pytest.mark.parametrize("pool", ["prefork", "asyncio"])
def test_a_worker_relays_and_runs(environment: dict[str, str], pool: str) -> None:
    worker = WorkerProcess(APP, "-P", pool, "-c", "2", "--relay", environment=environment)
    order(environment, "kept", "commit")
    with worker.start():
        worker.await_log("shop.ship[kept] succeeded")
        order(environment, "again", "commit")
        worker.await_log("shop.ship[again] succeeded")
        assert worker.stop() == 0


def test_a_green_worker_says_that_it_cannot_relay(environment: dict[str, str]) -> None:
    code, told = run_cli("-A", APP, "worker", "-P", "gevent", "--relay", environment=environment)

    assert code == 1
    assert "Run `amqtask relay` beside it" in told


def test_a_chord_runs_whichever_member_is_published_first(shop: Shop, broker_url: str) -> None:
    app = shop.app
    app.conf.result_backend = "rpc://"
    told = {"AMQTASK_BROKER_URL": broker_url, "FLOWS_QUEUE": shop.queue}
    worker = WorkerProcess("integration.apps.flows", "-P", "threads", "-c", "2", environment=told)
    member, body = app.signature("add"), app.signature("total")
    with shop.sessions.begin():
        result = chord([member.clone((number, number)) for number in range(4)], body)()
    relay = build_relay(app)
    holding = shop.outbox.store()

    def publish_the_others(rows: Sequence[StoredRow]) -> Verdict:
        assert relay.drain().sent == 2
        return Verdict()

    with worker.start():
        holding.relay(2, datetime.now(timezone.utc), publish_the_others)
        holding.close()
        relay.drain()
        assert result.get(timeout=90) == 12
        worker.stop()
    relay.store.close()


class Away:
    """A broker that cannot be reached at first."""

    def __init__(self, url: str) -> None:
        self.url = f"amqp://guest:guest@127.0.0.1:{free_port()}/"
        self._target = url

    def come_back(self) -> Forwarder:
        return Forwarder(self._target, port=urlsplit(self.url).port or 0)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_call_in_a_transaction_needs_no_broker_and_its_result_comes(
    shop: Shop, broker_url: str, is_async: bool
) -> None:
    away = Away(broker_url)
    app = shop.app
    app.conf.update(broker_url=away.url, result_backend="rpc://", broker_connection_timeout=90.0)
    told = {"AMQTASK_BROKER_URL": broker_url, "FLOWS_QUEUE": shop.queue}
    worker = WorkerProcess("integration.apps.flows", "-P", "threads", "-c", "2", environment=told)

    async def call() -> Any:
        with shop.sessions.begin():
            return await app.asend_task("add", (20, 22))

    started = time.monotonic()
    if is_async:
        result = asyncio.run(call())
    else:
        with shop.sessions.begin():
            result = app.send_task("add", (20, 22))
    assert time.monotonic() - started < 60
    with closing(shop.outbox.store()) as store:
        assert store.waiting().rows == 1

    with away.come_back(), worker.start():
        assert build_relay(app).drain().sent == 1
        worker.await_log("] succeeded in ")
        assert result.get(timeout=90) == 42
        app.close()
        worker.stop()
