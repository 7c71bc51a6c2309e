"""The delayed tasks of a virtual host: what waits in the broker and what workers hold until its time; sent now, or revoked.

AMQP has no way to read a queue without taking from it: what is looked at is delivered, and goes back to its place when the look
is over. It then counts as delivered once more, and what is due meanwhile is late by so much. So of many only the first of each
queue are looked at; what a queue holds is only counted. Redis has them by their due time and loses nothing by a look.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from amqtask.protocol.task import timestamp
from amqtask.topology.declarations import base_of
from amqtask.topology.delays import address_of, seconds_left
from amqtask.transport.contract import Admin

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.ground.shapes import Headers
    from amqtask.protocol.message import Delivery, Message
    from amqtask.transport.inventory import ManagementApi

# Above so many, in all delay queues together, they are not looked at only to be counted: whoever looks holds them, and what is
# due meanwhile is late.
MOST_COUNTED = 20_000
# How long workers may take to answer (seconds).
ANSWER_SECONDS = 1.0
# Of each queue that is not looked at whole.
MOST_OF_A_QUEUE = 100


@dataclass(frozen=True, slots=True)
class DelayedTask:
    """One of them. `queue` is where it goes, "exchange/key" unless that is the default exchange; `held_by` is a worker, or None
    for what waits in the broker."""

    due: datetime
    task: str | None
    id: str | None
    queue: str | None
    held_by: str | None


class Waiting(NamedTuple):
    """The tasks that were looked at, the soonest first. `total` are in the broker; `is_part`: only some were looked at."""

    tasks: list[DelayedTask]
    total: int
    is_part: bool


class Which(NamedTuple):
    """Which delayed tasks are meant: all for which all of this holds."""

    id: str | None = None
    task: str | None = None
    queue: str | None = None

    def has(self, task: DelayedTask) -> bool:
        """Whether it is one of them; what goes to a shard goes to its queue."""
        queues = () if task.queue is None else (task.queue, base_of(task.queue))
        return (
            self.id in (None, task.id)
            and self.task in (None, task.task)
            and (self.queue is None or self.queue in queues)
        )


def look(app: AmqTask, which: Which) -> Waiting:
    """The delayed tasks that are meant. Where more than MOST_COUNTED wait on RabbitMQ, the first of each queue are looked at."""
    rows: list[DelayedTask] = []
    with app.broker.admin() as admin:
        queues = delay_queues(app, admin)
        total = sum(admin.count(name) for _, name in queues)
        # Redis has them all in one place, by their time, and gives them without taking any away.
        is_part = total > MOST_COUNTED
        for level, name in queues:
            if not is_part:
                admin.sift(name, lambda delivery, level=level: _note(rows, delivery, level), delete=False)  # type: ignore[misc]
                continue
            most = MOST_COUNTED if admin.delay_queues is not None else MOST_OF_A_QUEUE
            for delivery in admin.browse(name, most):
                _note(rows, delivery, level)
    answers = app.control.ask("scheduled", {}, timeout=ANSWER_SECONDS)
    rows += [row for node, answer in answers.items() if isinstance(answer, list) for row in _held(node, answer)]
    return Waiting(sorted((row for row in rows if which.has(row)), key=lambda row: row.due), total, is_part)


def release(app: AmqTask, which: Which, *, revoked: bool = False) -> int:
    """Send what is meant to its queue now; `revoked`: as expired, so that whoever gets it drops it, tells its REVOKED event and
    stores that result. How many that were. A message leaves the delays after the broker has confirmed it in its queue.

    Workers are asked before and after the broker's queues are gone through: what they held, and what they took meanwhile.
    Raises: PublishError."""
    with app.broker.admin() as admin:
        released = _ask_workers(app, which, revoked=revoked)
        for level, name in delay_queues(app, admin):
            # Messages that this puts back meanwhile are none of those that were ready before.
            done = admin.move(name, app.publisher, partial(_released, app, which, level, revoked))
            released += done.moved
            if done.failure is not None:
                raise done.failure
        return released + _ask_workers(app, which, revoked=revoked)


def _ask_workers(app: AmqTask, which: Which, *, revoked: bool) -> int:
    """Have workers release what they hold; Celery's, and older ones, have nothing to tell."""
    order = {"id": which.id, "task": which.task, "queue": which.queue, "revoked": revoked}
    answers = app.control.ask("release_delayed", order, timeout=ANSWER_SECONDS)
    numbers = [answer.get("released") for answer in answers.values() if isinstance(answer, dict)]
    return sum(number for number in numbers if isinstance(number, int))


def _released(app: AmqTask, which: Which, level: int, revoked: bool, delivery: Delivery) -> Message | None:
    """What `move` publishes for a delivery of a delay queue; None: it stays."""
    if not which.has(as_task(delivery, level)):
        return None
    return replace(app.delays.released(delivery, revoked=revoked), exchange=address_of(delivery)[0])


def as_task(delivery: Delivery, level: int = 0) -> DelayedTask:
    """What a delayed message says of itself. Its headers may hold anything."""
    headers = delivery.properties.headers or {}
    exchange, key = address_of(delivery)
    seconds = max(-_LONGEST_SECONDS, min(seconds_until(headers, level), _LONGEST_SECONDS))
    due = datetime.now(timezone.utc) + timedelta(seconds=seconds)
    return DelayedTask(
        due, _text(headers.get("task")), _text(headers.get("id")), f"{exchange}/{key}" if exchange else key, None
    )


# A time that is further away is shown as a century from now, or ago.
_LONGEST_SECONDS = 100 * 365 * 86400.0


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _note(rows: list[DelayedTask], delivery: Delivery, level: int) -> bool:
    """Note a message that waits in the broker, which stays there."""
    rows.append(as_task(delivery, level))
    return False


def _held(node: str, answer: Sequence[object]) -> Iterator[DelayedTask]:
    """What a worker holds until its time."""
    for entry in answer:
        request = entry.get("request") if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or not isinstance(request, dict):
            continue
        try:
            due = datetime.fromisoformat(str(entry.get("eta"))).astimezone(timezone.utc)
        except (ValueError, OverflowError):
            continue
        where = request.get("delivery_info")
        key = _text(where.get("routing_key")) if isinstance(where, dict) else None
        exchange = _text(where.get("exchange")) if isinstance(where, dict) else None
        queue = f"{exchange}/{key}" if exchange else key
        yield DelayedTask(due, _text(request.get("name")), _text(request.get("id")), queue, node)


def delay_queues(app: AmqTask, admin: Admin, api: ManagementApi | None = None) -> list[tuple[int, str]]:
    """(level, queue) of those that hold messages."""
    delays = app.delays
    if admin.delay_queues is not None:
        return [(0, name) for name in admin.delay_queues if admin.count(name)]
    if api is not None:
        names = [str(queue["name"]) for queue in api.queues()]
        levels = [(level, name) for name in names if (level := delays.level_of(name)) is not None]
        return sorted(levels, reverse=True)
    places = list(delays.queue_names(_priorities(app)))
    exchanges = {name for name in {delays.exchange_of(queue) for _, queue in places} if admin.has_exchange(name)}
    states = admin.states([name for _, name in places if delays.exchange_of(name) in exchanges])
    return [(level, name) for level, name in places if name in states and states[name].ready]


def _priorities(app: AmqTask) -> set[int | None]:
    app.load_tasks()
    return {0, None, app.conf.task_default_priority, *(task.priority for task in app.tasks.values())}


def seconds_until(headers: Headers, level: int) -> float:
    """Seconds until a delayed message's `eta`, or until it would have left the delay levels."""
    eta = headers.get("eta")
    try:
        return timestamp(eta) - time.time() if eta else seconds_left(headers, level, time.time())
    except (TypeError, ValueError, AttributeError, ArithmeticError):  # no time that we can read
        return seconds_left(headers, level, time.time())
