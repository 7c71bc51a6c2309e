"""The relay: what is committed leaves, in order, and stays until the broker has it; what the broker does not take stays with its
error and holds nothing up."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import select, update

from amqtask import AmqTask
from amqtask.assembly import build_relay, build_worker
from amqtask.exceptions import BrokerUnreachable, ConfigurationError, ConnectionBlocked, PublishError, PublishTimeout
from amqtask.outbox.contract import OutboxUnreachable, as_row
from amqtask.outbox.relay import Relay
from amqtask.protocol.chord import chord_queue, more_message
from amqtask.protocol.entities import Declaration
from amqtask.protocol.message import Message
from amqtask.testing.worker import start_worker
from amqtask.worker.options import WorkerOptions

if TYPE_CHECKING:
    from tests.outbox.conftest import Shop
else:
    Shop = Any

NOWHERE: dict[str, Any] = {"exchange": "", "routing_key": "nowhere"}


def write(shop: Shop, count: int = 1, **options: Any) -> list[str]:
    with shop.sessions.begin():
        return [shop.ship(number, **options).id for number in range(count)]


def test_rows_leave_in_their_order_and_are_gone(shop: Shop) -> None:
    ids = write(shop, 7)
    relay = shop.relay(batch=3)

    step = relay.drain()

    assert (step.rows, step.sent, step.failed) == (7, 7, 0)
    assert shop.sent() == ids
    assert shop.rows == 0


def test_a_full_batch_is_followed_by_the_next_at_once(shop: Shop) -> None:
    write(shop, 3)
    relay = shop.relay(batch=2, interval=9.0)

    assert [relay.step().pause for _ in range(2)] == [0.0, 9.0]


def test_a_broker_that_is_away_costs_no_row_an_attempt(shop: Shop) -> None:
    ids = write(shop, 2)
    shop.broker.stop()
    relay = shop.relay(interval=0.5, timeout=0.05)

    pauses = [relay.step().pause for _ in range(6)]
    assert pauses == [0.5, 1.0, 2.0, 4.0, 5.0, 5.0]
    assert relay.store.waiting().rows == 2
    assert relay.store.waiting().failing == 0

    shop.broker.start()
    assert shop.relay().step().sent == 2
    assert shop.sent() == ids


def test_one_relaying_says_that_the_broker_is_away(shop: Shop) -> None:
    write(shop)
    shop.broker.stop()
    with pytest.raises(BrokerUnreachable):
        shop.relay(timeout=1.0).drain()

    shop.broker.start()
    shop.broker.block("low on disk")
    with pytest.raises(ConnectionBlocked):
        shop.relay(timeout=1.0).drain()
    assert shop.rows == 1


class Silent:
    """A publisher whose broker confirms only some of the messages in time."""

    def __init__(self, confirmed: set[str]) -> None:
        self.confirmed = confirmed

    def publish(self, message: Message, *, timeout: float | None = None) -> None:
        (error,) = self.publish_many([message])
        if error is not None:
            raise error

    def publish_many(self, messages: Sequence[Message], *, timeout: float | None = None) -> list[PublishError | None]:
        names = [message.properties.headers["id"] for message in messages]
        return [None if name in self.confirmed else PublishTimeout("no confirm") for name in names]

    def declare(self, entities: Sequence[Declaration], *, timeout: float | None = None) -> None: ...

    def close(self) -> None: ...


def test_without_any_confirm_it_is_the_broker_twice_and_then_the_rows(shop: Shop) -> None:
    write(shop, 2)
    relay = Relay(shop.outbox.store(), Silent(set()), shop.app.delays, interval=0.5)

    assert [relay.step()[1:] for _ in range(3)] == [(0, 0, 0.5), (0, 0, 1.0), (0, 2, 0.5)]
    assert [row.error for row in relay.store.failing(5)] == ["PublishTimeout: no confirm"] * 2
    relay.store.close()


def test_where_others_are_confirmed_a_missing_confirm_is_the_rows_own(shop: Shop) -> None:
    lost, good = write(shop, 2)
    relay = Relay(shop.outbox.store(), Silent({good}), shop.app.delays)

    assert relay.step()[:3] == (2, 1, 1)
    assert [row.task_id for row in relay.store.failing(5)] == [lost]
    relay.store.close()


def test_what_is_unroutable_stays_with_its_error_and_holds_nothing_up(shop: Shop) -> None:
    with shop.sessions.begin():
        lost = shop.ship(**NOWHERE)
        good = shop.ship()
    relay = shop.relay()

    assert relay.drain().failed == 1
    assert shop.sent() == [good.id]
    (failing,) = relay.store.failing(10)
    assert (failing.task_id, failing.task, failing.attempts) == (lost.id, "ship", 1)
    assert failing.error.startswith("Unroutable: ")
    assert datetime.now(timezone.utc) - failing.created_at < timedelta(minutes=1)


def test_what_failed_is_tried_again_later_and_later(shop: Shop) -> None:
    write(shop, **NOWHERE)
    now = [1_900_000_000.0]
    relay = shop.relay(clock=lambda: now[0])
    waits = []
    for _ in range(8):
        assert relay.step().failed == 1
        with shop.engine.connect() as connection:
            retry_at = connection.execute(select(shop.table.c.retry_at)).scalar_one()
        waits.append(retry_at.replace(tzinfo=timezone.utc).timestamp() - now[0])
        assert relay.step().rows == 0
        now[0] += waits[-1]

    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]


def test_a_row_that_failed_leaves_when_its_cause_is_gone(shop: Shop) -> None:
    (task_id,) = write(shop, **NOWHERE)
    relay = shop.relay()
    relay.drain()
    shop.app.publisher.declare([shop.app.queues["nowhere"]])

    assert relay.step().rows == 0
    assert relay.store.retry_now() == 1
    assert relay.step().sent == 1
    assert shop.sent("nowhere") == [task_id]


def test_a_row_that_nobody_can_read_stays_with_its_error(shop: Shop) -> None:
    (spoilt, good) = write(shop, 2)
    with shop.engine.begin() as connection:
        connection.execute(update(shop.table).where(shop.table.c.task_id == spoilt).values(message='{"v": 7}'))
    relay = shop.relay()

    assert relay.drain().failed == 1
    assert shop.sent() == [good]
    assert "format 7" in relay.store.failing(10)[0].error


def test_monitors_hear_of_a_call_when_it_is_published(shop: Shop) -> None:
    shop.app.conf.task_send_sent_event = True
    told: list[str] = []
    shop.app.sent_events.sent = lambda messages: told.extend(m.properties.headers["id"] for m in messages)  # type: ignore[method-assign]
    ids = write(shop)
    assert told == []

    build_relay(shop.app).drain()
    assert told == ids


def test_what_a_chord_is_told_is_no_call_to_monitors(shop: Shop) -> None:
    shop.app.conf.task_send_sent_event = True
    with shop.sessions.begin():
        shop.ship()
        transaction = shop.outbox.transaction()
        assert transaction is not None
        transaction.write([as_row(more_message(chord_queue("group").name, "added"), shop.app.delays)])
    shop.app.publisher.declare([chord_queue("group")])

    assert build_relay(shop.app).drain().sent == 2


def test_a_relay_in_a_thread_ends_when_it_is_told_to(shop: Shop) -> None:
    relay = shop.relay(interval=60.0)
    thread = threading.Thread(target=relay.run)
    thread.start()
    relay.stop()
    thread.join(60)

    assert not thread.is_alive()


def test_a_database_that_is_away_is_waited_for(shop: Shop) -> None:
    (task_id,) = write(shop)
    relay = shop.relay(interval=0.5)
    hidden = shop.path.with_suffix(".hidden")
    shop.engine.dispose()
    shop.path.rename(hidden)
    shop.path.mkdir()

    assert [relay.step().pause for _ in range(2)] == [0.5, 1.0]
    with pytest.raises(OutboxUnreachable):
        relay.drain()

    shop.path.rmdir()
    hidden.rename(shop.path)
    assert relay.step().sent == 1
    assert shop.sent() == [task_id]


def test_a_worker_relays_when_it_is_told_to(shop: Shop) -> None:
    shop.app.conf.update(outbox_relay=True, outbox_interval=0.01)
    with start_worker(shop.app, pool="threads"):
        with shop.sessions.begin():
            result = shop.ship("now")
        assert result.get(timeout=60) is None
    assert shop.rows == 0


def test_a_worker_without_an_outbox_cannot_relay_one() -> None:
    app = AmqTask("none", broker="memory://", set_as_current=False)
    with pytest.raises(ConfigurationError, match="no outbox to relay"):
        build_worker(app, WorkerOptions(pool="solo", relay=True, install_signals=False))


def test_an_outbox_is_found_by_its_name(shop: Shop) -> None:
    app = AmqTask("named", broker="memory://", set_as_current=False, outbox="tests.outbox.nothing:there")
    with pytest.raises(ConfigurationError, match=r"outbox = 'tests\.outbox\.nothing:there'"):
        build_relay(app)
    app.conf.outbox = "amqtask.states:PENDING"
    with pytest.raises(ConfigurationError, match="names no outbox"):
        build_relay(app)
    app.conf.outbox = shop.outbox
    assert build_relay(app).store.name == f"amqtask_outbox of sqlite:///{shop.path}"
