"""A task with inbox=True: that it has run is committed with what it did, and a second run of the call does nothing again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Column, Integer, MetaData, String, Table, create_engine, func, select, update
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import scoped_session, sessionmaker
from sqlalchemy.pool import NullPool

from amqtask import AmqTask, chain, chord, group, states
from amqtask.beat.settings_store import entries_of
from amqtask.contrib.sqlalchemy import SqlAlchemyInbox, SqlAlchemyOutbox, inbox_table, outbox_table
from amqtask.exceptions import ConfigurationError
from amqtask.protocol.message import Message, Properties
from amqtask.testing.worker import start_worker


class Bank:
    """An application whose tasks book amounts, in an SQLite file."""

    def __init__(self, path: Path) -> None:
        metadata = MetaData()
        self.path = path
        self.bookings = Table("bookings", metadata, Column("id", Integer, primary_key=True), Column("what", String(40)))
        self.table, self.outbox_table = inbox_table(metadata), outbox_table(metadata)
        self.engine = create_engine(f"sqlite:///{path}")
        metadata.create_all(self.engine)
        self.app = AmqTask("bank", broker="memory://", backend="cache+memory://", set_as_current=False)
        self.sessions: Any = sessionmaker(self.engine)
        self.inbox = SqlAlchemyInbox(self.app, self.table, sessions=self.sessions)

    def book(self, what: str) -> None:
        self.inbox.session.execute(self.bookings.insert(), {"what": what})

    def task(self, **options: Any) -> Callable[[Callable[..., Any]], Any]:
        return self.app.task(inbox=True, **options)

    @property
    def booked(self) -> list[str]:
        with self.engine.connect() as connection:
            return [what for (what,) in connection.execute(select(self.bookings.c.what).order_by(self.bookings.c.id))]

    @property
    def rows(self) -> int:
        with self.engine.connect() as connection:
            return int(connection.execute(select(func.count()).select_from(self.table)).scalar_one())

    def worked(self, *results: Any, pool: str = "solo") -> list[Any]:
        """What becomes of calls in a worker that works off all that is there, and all that follows."""
        broker = self.app.memory_broker
        assert broker is not None
        with start_worker(self.app, pool=pool, concurrency=4) as worker:
            # Also what is on its way to the worker: the next step of a chain is here before the step is acknowledged.
            queue = broker.queue("amqtask")

            def is_over() -> bool:
                with broker.lock:
                    return not len(queue) and not sum(subscriber.unacked for subscriber in queue.subscribers)

            while not is_over() or worker.ended < len(results):
                threading.Event().wait(0.005)
            return [result.get(timeout=60, propagate=False) for result in results]


@pytest.fixture
def bank(tmp_path: Path) -> Iterator[Bank]:
    made = Bank(tmp_path / "bank.db")
    yield made
    made.app.close()
    made.engine.dispose()


@pytest.mark.parametrize("pool", ["solo", "threads"])
def test_a_second_run_of_a_call_does_nothing_and_has_the_firsts_result(bank: Bank, pool: str) -> None:
    @bank.task(name="pay")
    def pay(amount: int) -> dict[str, int]:
        bank.book(f"paid {amount}")
        return {"paid": amount, "run": len(bank.booked)}

    once, again = pay.apply_async((5,), task_id="one"), pay.apply_async((5,), task_id="one")
    other = pay.delay(6)

    assert bank.worked(once, again, other, pool=pool)[:2] == [{"paid": 5, "run": 0}] * 2
    assert sorted(bank.booked) == ["paid 5", "paid 6"]
    assert bank.rows == 2


def test_what_a_run_that_raises_did_is_rolled_back_and_the_next_attempt_runs(bank: Bank) -> None:
    attempts: list[int] = []

    @bank.task(name="pay", bind=True)
    def pay(self: Any) -> int:
        attempts.append(self.request.retries)
        bank.book(f"attempt {self.request.retries}")
        if self.request.retries < 2:
            raise self.retry(countdown=0)
        return int(self.request.retries)

    first = pay.apply_async(task_id="one")
    assert bank.worked(first) == [2]
    assert (attempts, bank.booked, bank.rows) == ([0, 1, 2], ["attempt 2"], 1)

    # The first attempt's message, delivered again: the call has been committed by another attempt.
    assert bank.worked(pay.apply_async(task_id="one")) == [2]
    assert (attempts, bank.booked) == ([0, 1, 2], ["attempt 2"])


def test_a_failed_call_may_run_again(bank: Bank) -> None:
    is_ready: list[bool] = []

    @bank.task(name="pay")
    def pay() -> str:
        bank.book("paid")
        if not is_ready:
            raise ValueError("no money")
        return "paid"

    failed = bank.worked(pay.apply_async(task_id="one"))
    assert (repr(failed), bank.booked, bank.rows) == ("[ValueError('no money')]", [], 0)
    is_ready.append(True)
    assert bank.worked(pay.apply_async(task_id="one")) == ["paid"]
    assert bank.booked == ["paid"]


def test_what_follows_is_published_again_by_the_second_run_and_runs_once(bank: Bank) -> None:
    runs: list[str] = []

    @bank.task(name="pay")
    def pay(amount: int) -> int:
        bank.book(f"paid {amount}")
        return amount

    @bank.task(name="thank")
    def thank(amount: int) -> str:
        bank.book(f"thanked for {amount}")
        return "thanked"

    @bank.app.task(name="look")
    def look(said: str) -> str:
        runs.append(said)
        return said

    workflow = chain(pay.s(3), thank.s(), look.s())
    workflow.freeze()
    result = workflow.apply_async()
    assert bank.worked(result) == ["thanked"]
    ids = [result.parent.parent.id, result.parent.id, result.id]
    # The worker was killed before the first step's ack, and before it had published the second.
    again = chain(pay.s(3).set(task_id=ids[0]), thank.s().set(task_id=ids[1]), look.s().set(task_id=ids[2]))
    assert bank.worked(again.apply_async()) == ["thanked"]

    assert bank.booked == ["paid 3", "thanked for 3"]
    assert runs == ["thanked", "thanked"]


def test_callbacks_have_the_same_ids_from_each_run_of_the_call(bank: Bank) -> None:
    tell = bank.task(name="tell", ignore_result=True)(lambda value, what="": bank.book(f"told{what}"))
    joined = bank.task(name="joined")(lambda values: bank.book("joined"))
    pay = bank.task(name="pay")(lambda: bank.book("paid"))
    links = [tell.s(), tell.s(" too"), group(tell.s(" a"), tell.s(" b")), chord([joined.s()], joined.s())]

    # As a message that comes again: callbacks have no ids in it.
    bank.worked(*(pay.apply_async(task_id="one", link=links) for _ in range(3)))
    assert sorted(bank.booked) == ["joined", "joined", "paid", "told", "told a", "told b", "told too"]

    bank.worked(pay.apply_async(task_id="two", link=links))
    assert len(bank.booked) == 14


def test_what_is_called_within_another_task_has_its_transaction_too(bank: Bank) -> None:
    @bank.task(name="note")
    def note(request: Any, error: Exception, trace: str) -> None:
        bank.book(f"{request.id} failed: {error}")

    @bank.task(name="pay")
    def pay(amount: int) -> int:
        bank.book(f"paid {amount}")
        if amount > 8:
            raise ValueError("too much")
        return amount

    bank.worked(pay.apply_async((9,), task_id="nine", link_error=note.s()))
    assert bank.booked == ["nine failed: too much"]

    calls = [pay.map([1, 2]).apply_async(task_id="two") for _ in range(2)]
    assert bank.worked(*calls) == [[1, 2], [1, 2]]
    assert bank.booked[1:] == ["paid 1", "paid 2"]
    assert isinstance(bank.worked(pay.starmap([(3,), (9,)]).delay())[0], ValueError)
    assert bank.booked[3:] == ["paid 3"]


def test_calls_that_it_makes_are_rows_of_its_transaction_where_there_is_an_outbox(bank: Bank) -> None:
    outbox = SqlAlchemyOutbox(bank.app, bank.outbox_table, sessions=bank.sessions)
    ship = bank.app.task(name="ship")(lambda: None)

    @bank.task(name="pay", bind=True)
    def pay(self: Any) -> None:
        bank.book("paid")
        ship.delay()
        if not self.request.retries:
            raise self.retry(countdown=0)

    bank.worked(pay.apply_async(task_id="one"), pay.apply_async(task_id="one"))
    with bank.engine.connect() as connection:
        assert connection.execute(select(outbox.table.c.task)).all() == [("ship",)]
    assert bank.booked == ["paid"]


# -- what cannot be


def test_a_retry_that_goes_on_would_be_committed_and_is_refused(bank: Bank) -> None:
    @bank.task(name="pay", bind=True)
    def pay(self: Any) -> None:
        bank.book("paid")
        self.retry(countdown=0, throw=False)

    (error,) = bank.worked(pay.delay())
    assert "throw=False" in str(error)
    assert bank.booked == []


def test_a_value_that_cannot_be_kept_fails_the_task_before_the_commit(bank: Bank) -> None:
    @bank.task(name="pay")
    def pay() -> object:
        bank.book("paid")
        return object()

    result = pay.delay()
    bank.worked(result)
    assert (result.state, bank.booked) == (states.FAILURE, [])


def test_a_value_that_nobody_wants_is_not_kept(bank: Bank) -> None:
    @bank.task(name="pay", ignore_result=True)
    def pay() -> object:
        bank.book("paid")
        return object()

    done = bank.app.task(name="done")(lambda: None)
    pay.delay()
    bank.worked(done.delay())
    assert bank.booked == ["paid"]


def test_a_task_that_commits_by_itself_fails_and_says_why(bank: Bank) -> None:
    @bank.task(name="pay")
    def pay() -> None:
        bank.book("paid")
        bank.inbox.session.commit()

    (error,) = bank.worked(pay.delay())
    assert "leave the commit to the inbox" in str(error)


def test_a_coroutine_of_a_task_that_is_none_is_refused(bank: Bank) -> None:
    async def paid() -> None: ...

    pay = bank.task(name="pay")(lambda: paid())
    (error,) = bank.worked(pay.delay())
    assert "async def" in str(error)


def test_without_an_inbox_the_worker_does_not_start_and_nothing_runs_inline() -> None:
    app = AmqTask("none", broker="memory://", set_as_current=False)
    pay = app.task(name="pay", inbox=True)(lambda: None)

    with pytest.raises(ConfigurationError, match="task pay has inbox=True, and the application has no inbox"):
        start_worker(app).__enter__()
    with pytest.raises(ConfigurationError, match="SqlAlchemyInbox"):
        pay.apply()


# -- sessions


def test_coroutines_have_async_sessions(bank: Bank) -> None:
    engine = create_async_engine(f"sqlite+aiosqlite:///{bank.path}", poolclass=NullPool)
    bank.inbox = SqlAlchemyInbox(bank.app, bank.table, sessions=async_sessionmaker(engine))

    @bank.task(name="pay", bind=True)
    async def pay(self: Any) -> int:
        await bank.inbox.session.execute(bank.bookings.insert(), {"what": "paid"})
        if not self.request.retries:
            raise self.retry(countdown=0)
        return 7

    calls = [pay.apply_async(task_id="one"), pay.apply_async(task_id="one")]
    assert bank.worked(*calls, pool="asyncio") == [7, 7]
    assert bank.booked == ["paid"]


def test_async_sessions_are_for_coroutines_only(bank: Bank) -> None:
    engine = create_async_engine(f"sqlite+aiosqlite:///{bank.path}", poolclass=NullPool)
    SqlAlchemyInbox(bank.app, bank.table, sessions=async_sessionmaker(engine))
    bank.task(name="pay")(lambda: None)

    with pytest.raises(ConfigurationError, match="async sessions"):
        start_worker(bank.app).__enter__()


def test_a_coroutine_may_use_an_ordinary_session(bank: Bank) -> None:
    @bank.task(name="pay")
    async def pay() -> int:
        bank.book("paid")
        return 7

    calls = [pay.apply_async(task_id="one"), pay.apply_async(task_id="one")]
    assert bank.worked(*calls, pool="asyncio") == [7, 7]
    assert bank.booked == ["paid"]


def test_a_scoped_session_is_the_current_one_in_the_task(bank: Bank) -> None:
    scoped = scoped_session(bank.sessions)
    bank.inbox = SqlAlchemyInbox(bank.app, bank.table, sessions=scoped)

    @bank.task(name="pay")
    def pay() -> bool:
        scoped.execute(bank.bookings.insert(), {"what": "paid"})
        return scoped() is bank.inbox.session

    assert bank.worked(pay.apply_async(task_id="one"), pay.apply_async(task_id="one")) == [True, True]
    assert bank.booked == ["paid"]


def test_a_scoped_session_that_is_in_a_transaction_is_left_alone(bank: Bank) -> None:
    scoped = scoped_session(bank.sessions)
    bank.inbox = SqlAlchemyInbox(bank.app, bank.table, sessions=scoped)
    pay = bank.task(name="pay")(lambda: bank.book("paid"))

    scoped.execute(bank.bookings.insert(), {"what": "before"})
    session = scoped()
    assert "in a transaction" in str(pay.apply().result)
    assert (scoped() is session, session.in_transaction()) == (True, True)
    scoped.commit()
    assert bank.booked == ["before"]


def test_inline_a_task_has_its_transaction_too(bank: Bank) -> None:
    @bank.task(name="pay")
    def pay(amount: int) -> int:
        bank.book(f"paid {amount}")
        if amount < 0:
            raise ValueError(amount)
        return amount

    assert pay.apply((-1,)).state == states.FAILURE
    assert [pay.apply((4,), task_id="one").get(), pay.apply((4,), task_id="one").get()] == [4, 4]
    assert bank.booked == ["paid 4"]
    with pytest.raises(RuntimeError, match=r"task\.apply"):
        _ = bank.inbox.session


# -- old rows


def test_the_nightly_task_deletes_what_ran_long_ago(bank: Bank) -> None:
    pay = bank.task(name="pay")(lambda: bank.book("paid"))
    pay.apply(task_id="old")
    with bank.engine.begin() as connection:
        connection.execute(update(bank.table).values(created_at=datetime.now(timezone.utc) - timedelta(days=8)))
    pay.apply(task_id="new")

    bank.app.tasks["celery.backend_cleanup"]()
    assert bank.rows == 1
    pay.apply(task_id="new")
    assert bank.booked == ["paid", "paid"]


def test_beat_sends_it_where_a_task_needs_it(bank: Bank) -> None:
    assert [entry.name for entry in entries_of(bank.app)] == []
    bank.task(name="pay")(lambda: None)
    assert [entry.name for entry in entries_of(bank.app)] == ["celery.backend_cleanup"]
    bank.app.conf.inbox_expires = None
    assert [entry.name for entry in entries_of(bank.app)] == []


def test_messages_without_an_id_are_refused_not_taken_for_each_other(bank: Bank) -> None:
    @bank.task(name="pay")
    def pay(amount: int) -> None:
        bank.book(f"paid {amount}")

    app = bank.app
    declare = app.queues.declarations(app.queues["amqtask"])
    for amount in range(2):
        properties = Properties(content_type="application/json", headers={"task": "pay"})
        app.publisher.publish(Message(b"[[%d], {}, {}]" % amount, properties, "", "amqtask", declare))
    bank.worked(pay.delay(7))

    assert app.memory_broker is not None
    reasons = [properties.headers["x-amqtask-reason"] for properties, _ in app.memory_broker.messages("amqtask.dead")]
    assert bank.booked == ["paid 7"]
    assert ["no id" in reason for reason in reasons] == [True, True]
