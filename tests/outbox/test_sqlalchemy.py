"""A call in a SQLAlchemy transaction is a row of it: committed it is sent, rolled back it is not."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event, func, select
from sqlalchemy.exc import OperationalError, PendingRollbackError
from sqlalchemy.ext.asyncio import async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from amqtask import chain, chord, group, signals
from amqtask.contrib.sqlalchemy import SqlAlchemyOutbox
from amqtask.exceptions import ConfigurationError

if TYPE_CHECKING:
    from tests.outbox.conftest import Shop
else:
    Shop = Any


class AsTold(Exception):
    """What goes wrong in a transaction."""


def fail() -> None:
    raise AsTold


def failing() -> contextlib.AbstractContextManager[None]:
    return contextlib.suppress(AsTold)


# -- one session


def test_a_committed_call_is_sent_by_the_relay_and_not_before(shop: Shop) -> None:
    with shop.sessions.begin() as session:
        shop.order(session)
        result = shop.ship("apple")
        assert shop.sent() == []
    assert shop.sent() == []
    assert shop.rows == 1

    shop.relayed()
    assert shop.sent() == [result.id]


def test_a_call_that_is_rolled_back_is_never_sent(shop: Shop) -> None:
    with shop.sessions() as session:
        shop.order(session)
        shop.ship("apple")
        session.rollback()
    with failing(), shop.sessions.begin():
        shop.ship("apple")
        fail()

    assert shop.rows == 0
    assert shop.relayed().rows == 0


def test_outside_of_a_transaction_a_call_is_published_at_once(shop: Shop) -> None:
    first = shop.ship()
    with shop.sessions() as session:
        second = shop.ship()  # nothing was asked of the session yet
        shop.order(session)
        session.commit()
        third = shop.ship()

    assert shop.sent() == [first.id, second.id, third.id]
    assert shop.rows == 0


def test_only_the_calls_of_a_savepoint_are_rolled_back_with_it(shop: Shop) -> None:
    event.listen(shop.engine, "connect", lambda connection, _: setattr(connection, "isolation_level", None))
    event.listen(shop.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    with shop.sessions.begin() as session:
        kept = shop.ship()
        with session.begin_nested() as savepoint:
            shop.ship()
            savepoint.rollback()
        with session.begin_nested():
            also = shop.ship()
        last = shop.ship()

    shop.relayed()
    assert shop.sent() == [kept.id, also.id, last.id]


def test_what_a_listener_calls_after_the_commit_is_published_at_once(shop: Shop) -> None:
    event.listen(shop.sessions, "after_commit", lambda session: shop.ship("after"))
    with shop.sessions.begin() as session:
        shop.order(session)

    assert len(shop.sent()) == 1
    assert shop.rows == 0


def test_a_session_whose_flush_failed_takes_no_call(shop: Shop) -> None:
    with shop.sessions() as session:
        shop.order(session)
        with pytest.raises(Exception, match="UNIQUE"):
            session.execute(shop.orders.insert(), [{"id": 1}, {"id": 1}])
        session.add_all([shop.Order(), shop.Order()])
        for order in session.new:
            order.id = 9
        with pytest.raises(Exception, match="UNIQUE"):
            session.flush()
        with pytest.raises(PendingRollbackError):
            shop.ship()

    assert shop.sent() == []


def test_closing_a_session_without_a_commit_is_said(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "amqtask.outbox"):
        with shop.sessions() as session:
            session.execute(select(shop.orders))
            shop.ship()
        with failing(), shop.sessions() as session:
            session.execute(select(shop.orders))
            shop.ship()
            fail()

    assert [record.getMessage() for record in caplog.records] == [
        "not sent: 1 of the calls that were made, as their session was closed without commit()"
    ]


def test_a_missing_table_is_an_error_of_the_call(shop: Shop) -> None:
    shop.table.drop(shop.engine)
    failed: list[Any] = []
    signals.task_publish_failed.connect(lambda exception, **_: failed.append(exception), weak=False, dispatch_uid="t")
    try:
        with shop.sessions() as session:
            shop.order(session)
            with pytest.raises(OperationalError, match="amqtask_outbox"):
                shop.ship()
    finally:
        signals.task_publish_failed.disconnect(dispatch_uid="t")
    assert len(failed) == 1


# -- which session


def test_another_threads_transaction_is_none_of_ours(shop: Shop) -> None:
    with shop.sessions.begin() as session:
        shop.order(session)
        thread = threading.Thread(target=shop.ship)
        thread.start()
        thread.join()

    assert len(shop.sent()) == 1


def test_a_session_that_was_begun_elsewhere_is_noticed_at_its_commit(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    with shop.sessions.begin() as session:
        shop.order(session)
    with shop.sessions() as session:
        (found,) = contextvars.copy_context().run(lambda: session.query(shop.Order).all())
        found.what = "pear"
        shop.ship()
        with caplog.at_level(logging.WARNING, "amqtask.outbox"):
            session.commit()

    assert len(shop.sent()) == 1
    (record,) = caplog.records
    assert "Put `with outbox.using(session):` around such calls" in record.getMessage()

    caplog.clear()
    with shop.sessions() as session:
        contextvars.copy_context().run(lambda: session.query(shop.Order).all())
        session.commit()
    assert caplog.records == []


def test_using_names_the_session_wherever_it_was_begun(shop: Shop) -> None:
    with shop.sessions() as session:
        shop.order(session)

        def elsewhere() -> None:
            with shop.outbox.using(session):
                shop.ship()

        shop.engine.dispose()
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        session.commit()

    assert shop.sent() == []
    assert shop.rows == 1


def test_using_begins_the_transaction_that_commit_ends(shop: Shop) -> None:
    SqlAlchemyOutbox(shop.app, shop.table, engine=shop.engine)
    with shop.sessions() as session:
        shop.order(session)
        outside = shop.ship()
        session.commit()
        outbox: Any = shop.app.outbox
        with outbox.using(session):
            inside = shop.ship()
        session.commit()

    assert shop.sent() == [outside.id]
    shop.relayed()
    assert shop.sent() == [outside.id, inside.id]


def test_using_takes_a_connection_too(shop: Shop) -> None:
    with shop.engine.connect() as connection, shop.outbox.using(connection):
        shop.ship()
        connection.rollback()
        kept = shop.ship()
        connection.commit()

    shop.relayed()
    assert shop.sent() == [kept.id]
    with pytest.raises(TypeError, match="takes a session or a connection"), shop.outbox.using(7):  # type: ignore[arg-type]
        shop.ship()


def test_of_two_sessions_the_last_used_counts(shop: Shop) -> None:
    with shop.sessions() as first, shop.sessions() as second:
        first.execute(select(shop.orders))
        second.execute(select(shop.orders))
        shop.ship()
        second.rollback()
        kept = shop.ship()
        first.commit()

    shop.relayed()
    assert shop.sent() == [kept.id]


def test_the_current_session_of_a_registry_is_asked_for(shop: Shop) -> None:
    sessions = scoped_session(sessionmaker(shop.engine))
    SqlAlchemyOutbox(shop.app, shop.table, sessions=sessions)
    at_once = shop.ship()
    sessions.add(shop.Order())
    shop.ship()
    sessions.rollback()
    sessions.add(shop.Order())
    kept = shop.ship()
    sessions.commit()
    sessions.remove()

    assert shop.sent() == [at_once.id]
    shop.relayed()
    assert shop.sent() == [at_once.id, kept.id]


def test_where_a_registry_has_no_scope_calls_are_published_at_once(shop: Shop) -> None:
    def scope() -> int:
        raise RuntimeError("Working outside of application context.")

    SqlAlchemyOutbox(shop.app, shop.table, sessions=scoped_session(sessionmaker(shop.engine), scope))
    shop.ship()

    assert len(shop.sent()) == 1


def test_a_subclass_of_session_counts_too(shop: Shop) -> None:
    class Mine(Session):
        pass

    sessions = sessionmaker(shop.engine, class_=Mine)
    SqlAlchemyOutbox(shop.app, shop.table, sessions=sessions)
    with sessions.begin():
        shop.ship()

    assert (shop.sent(), shop.rows) == ([], 1)


# -- all ways to call


def test_every_way_to_call_is_written(shop: Shop) -> None:
    ship = shop.app.tasks["ship"]
    with shop.sessions.begin():
        ship.delay(1)
        shop.app.send_task("elsewhere", (2,), queue="other")
        chain(ship.si(3), ship.si(4))()
        group(ship.si(n) for n in range(3))()
        chord([ship.si(n) for n in range(2)], ship.si(9))()
        shop.app.publish_many([ship.s(n) for n in range(4)])
        with shop.app.pipeline():
            ship.delay(10)
    assert shop.sent() == []
    assert shop.rows == 1 + 1 + 1 + 3 + 2 + 4 + 1

    shop.relayed()
    assert len(shop.sent()) == 12
    assert len(shop.sent("other")) == 1


def test_calls_of_a_pipeline_before_the_transaction_are_not_its(shop: Shop) -> None:
    with shop.app.pipeline():
        before = shop.ship()
        with failing(), shop.sessions.begin():
            shop.app.publish_many([shop.app.tasks["ship"].s()])
            fail()

    assert shop.sent() == [before.id]


def test_a_chords_queue_is_declared_by_whichever_row_is_first(shop: Shop) -> None:
    ship = shop.app.tasks["ship"]
    shop.app.conf.broker_url = "amqp://127.0.0.1:1/"
    shop.app.conf.result_backend = None
    with shop.sessions.begin():
        chord([ship.si(n) for n in range(3)], ship.si(9))()
    with shop.engine.connect() as connection:
        rows = connection.execute(select(shop.table.c.message)).scalars().all()

    assert len(rows) == 3
    assert all("amqtask.chord." in row for row in rows)


def test_a_member_that_is_added_to_a_chord_is_told_in_the_transaction(shop: Shop) -> None:
    shop.app.conf.broker_url = "amqp://127.0.0.1:1/"
    shop.app.conf.result_backend = None
    member = shop.app.tasks["ship"].si()
    member.freeze("added")
    with shop.sessions.begin():
        shop.app.add_to_chord("group", member)
    with shop.engine.connect() as connection:
        (row,) = connection.execute(select(shop.table.c.task_id, shop.table.c.message))

    assert row.task_id == "added"
    assert "amqtask.chord.group" in row.message


def test_the_callers_options_are_checked_and_its_result_is_there(shop: Shop) -> None:
    with shop.sessions.begin():
        result = shop.ship(task_id="mine", countdown=60)
        with pytest.raises(TypeError, match="no option 'colour'"):
            shop.ship(colour="red")

    assert (result.id, result.state) == ("mine", "PENDING")


def test_an_eager_call_runs_at_once(shop: Shop) -> None:
    shop.app.conf.task_always_eager = True
    with shop.sessions.begin():
        assert shop.ship().state == "SUCCESS"
    assert shop.rows == 0


def test_nothing_is_written_once_no_outbox_is_installed(shop: Shop) -> None:
    shop.app.install_outbox(None)
    with shop.sessions.begin():
        shop.ship()
    assert len(shop.sent()) == 1


# -- asyncio


def test_async_sessions_are_followed(shop: Shop, tmp_path: Path) -> None:
    async def run() -> list[str]:
        engine = create_async_engine(f"sqlite+aiosqlite:///{shop.path}")
        sessions = async_sessionmaker(engine)
        SqlAlchemyOutbox(shop.app, shop.table, sessions=sessions, engine=shop.engine)
        ship = shop.app.tasks["ship"]
        async with sessions.begin() as session:
            session.add(shop.Order())
            kept = [await ship.adelay(1), *(await shop.app.apublish_many([ship.s(2)]))]
            kept += [await shop.app.asend_task("ship"), *(await group(ship.si(3)).adelay()).results]
            with pytest.raises(RuntimeError, match=r"await task\.adelay"):
                ship.delay(4)
        async with sessions() as session:
            await session.execute(select(func.count()).select_from(shop.orders))
            await ship.adelay(5)
            await session.rollback()
        at_once = await ship.adelay(6)
        assert shop.sent() == [at_once.id]
        await engine.dispose()
        return [at_once.id, *(result.id for result in kept)]

    ids = asyncio.run(run())
    shop.relayed()
    assert shop.sent() == ids


def test_tasks_of_one_loop_have_transactions_of_their_own(shop: Shop) -> None:
    async def run() -> None:
        engine = create_async_engine(f"sqlite+aiosqlite:///{shop.path}")
        sessions = async_sessionmaker(engine)
        SqlAlchemyOutbox(shop.app, shop.table, sessions=sessions, engine=shop.engine)
        begun, called = asyncio.Event(), asyncio.Event()

        async def keeps() -> None:
            async with sessions.begin() as session:
                await session.execute(select(shop.orders))
                begun.set()
                await called.wait()

        async def calls() -> None:
            await begun.wait()
            await shop.app.tasks["ship"].adelay()
            called.set()

        await asyncio.gather(keeps(), calls())
        await engine.dispose()

    asyncio.run(run())
    assert (len(shop.sent()), shop.rows) == (1, 0)


def test_using_takes_async_sessions(shop: Shop) -> None:
    async def run() -> None:
        engine = create_async_engine(f"sqlite+aiosqlite:///{shop.path}")
        current = async_scoped_session(async_sessionmaker(engine), asyncio.current_task)
        outbox = SqlAlchemyOutbox(shop.app, shop.table, engine=lambda: shop.engine)
        async with current() as session:
            with outbox.using(session):
                await shop.app.tasks["ship"].adelay()
            await session.commit()
            with outbox.using(current):
                await shop.app.tasks["ship"].adelay()
            await current.commit()
        await current.remove()
        async with engine.begin() as connection:
            with outbox.using(connection):
                await shop.app.tasks["ship"].adelay()
        await engine.dispose()

    asyncio.run(run())
    assert shop.relayed().sent == 3


def test_what_sqlalchemy_runs_for_a_coroutine_may_use_delay(shop: Shop) -> None:
    async def run() -> None:
        engine = create_async_engine(f"sqlite+aiosqlite:///{shop.path}")
        sessions = async_sessionmaker(engine)
        SqlAlchemyOutbox(shop.app, shop.table, sessions=sessions, engine=shop.engine)
        async with sessions.begin() as session:
            await session.run_sync(lambda _: shop.ship())
        await engine.dispose()

    asyncio.run(run())
    assert (shop.sent(), shop.rows) == ([], 1)


def test_nobody_needs_greenlet_without_async_sessions() -> None:
    code = """if True:
        import sys
        sys.modules["greenlet"] = None
        from sqlalchemy import MetaData, create_engine
        from sqlalchemy.orm import sessionmaker
        from amqtask import AmqTask
        from amqtask.contrib.sqlalchemy import SqlAlchemyOutbox, outbox_table

        metadata = MetaData()
        engine = create_engine("sqlite://")
        app = AmqTask("t", broker="memory://")
        outbox = SqlAlchemyOutbox(app, outbox_table(metadata), sessions=sessionmaker(engine))
        metadata.create_all(engine)
        with outbox._sessions.begin():
            app.send_task("x")
        print(outbox.store().waiting().rows)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)

    assert (done.stdout, done.stderr) == ("1\n", "")


def test_a_relay_wants_an_ordinary_engine(shop: Shop) -> None:
    sessions = async_sessionmaker(create_async_engine("sqlite+aiosqlite://"))
    with pytest.raises(ConfigurationError, match="a relay needs an ordinary one"):
        SqlAlchemyOutbox(shop.app, shop.table, sessions=sessions).store()
    with pytest.raises(ConfigurationError, match="knows no engine"):
        SqlAlchemyOutbox(shop.app, shop.table).store()
    store = SqlAlchemyOutbox(shop.app, shop.table, engine=f"sqlite:///{shop.path}").store()
    assert store.waiting().rows == 0
    store.close()
