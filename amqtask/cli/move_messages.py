"""What `amqtask migrate` publishes: messages as they were sent, and delayed ones with the time that is left to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from amqtask.cli.broker import known_queues
from amqtask.exceptions import QueueNotFound
from amqtask.protocol.message import Delivery, Message
from amqtask.services.delayed import ANSWER_SECONDS, MOST_COUNTED, delay_queues, seconds_until
from amqtask.topology.declarations import declarations, work_queue
from amqtask.topology.delays import TO_HEADER, Address, address_of, addresses, waiting_priority
from amqtask.transport.contract import Admin
from amqtask.transport.inventory import ManagementApi
from amqtask.worker.finisher import copied_properties

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.protocol.entities import Declaration, Queue

Convert = Callable[[Delivery], "Message | None"]


def as_sent(delivery: Delivery, queue: str, declare: tuple[Declaration, ...] = ()) -> Message:
    """The message for another queue: all as it is, but for what the broker wrote on its way here; and it survives a restart.

    Its own time to live (`expiration`) begins again.
    """
    properties = replace(copied_properties(delivery.properties), expiration=delivery.properties.expiration)
    return Message(delivery.body, properties, exchange="", routing_key=queue, declare=declare)


def is_wanted(delivery: Delivery, tasks: Sequence[str]) -> bool:
    """Whether its task is among those; all are when none are named."""
    return not tasks or (delivery.properties.headers or {}).get("task") in tasks


def declare_queue(app: AmqTask, name: str) -> tuple[Declaration, ...]:
    """As the application has the queue; one that it does not know, and may not create, as a missing queue is made."""
    try:
        return app.queues.declarations(app.queues[name])
    except QueueNotFound:
        return declarations(work_queue(name, app.queue_defaults), app.queue_defaults)


# -- what waits for its time


def delayed_transfers(
    app: AmqTask,
    admin: Admin,
    api: ManagementApi | None,
    renames: Mapping[str, str] | None,
    tasks: Sequence[str],
) -> Iterator[tuple[str, str, Convert]]:
    """Each delay queue that holds messages, the longest waits first: its name, "its time", and what its messages become.

    Over AMQP queues of the priorities that the application's settings and tasks name are looked for; the management
    plugin knows all. `renames` are the queues (old → new) whose messages are meant; None: all.
    """
    for level, name in delay_queues(app, admin, api):
        yield name, "the delay levels", _Delayed(app, level, renames, tasks)


class _Delayed:
    """Turns a delayed message into one that waits for the rest of its time at the destination."""

    def __init__(self, app: AmqTask, level: int, renames: Mapping[str, str] | None, tasks: Sequence[str]) -> None:
        self._app = app
        self._level = level
        self._renames = renames
        self._tasks = tasks
        self._declared: dict[tuple[str, str], tuple[Declaration, ...]] = {}

    def __call__(self, delivery: Delivery) -> Message | None:
        headers = delivery.properties.headers or {}
        to_exchange, key = headers.get(TO_HEADER), delivery.routing_key
        exchange = to_exchange if isinstance(to_exchange, str) else ""
        if self._renames is not None:
            if exchange or key not in self._renames:
                return None
            key = self._renames[key]
        if not is_wanted(delivery, self._tasks):
            return None
        properties = replace(copied_properties(delivery.properties), priority=waiting_priority(delivery.properties))
        message = Message(delivery.body, properties, exchange, key, self._declare(exchange, key))
        return self._app.delays.delayed(message, seconds_until(headers, self._level))

    def _declare(self, exchange: str, key: str) -> tuple[Declaration, ...]:
        """What the target needs: a queue's declarations, or those of the application's queues that are bound to an exchange."""
        address = (exchange, "" if exchange else key)
        if address not in self._declared:
            self._declared[address] = self._on(exchange) if exchange else declare_queue(self._app, key)
        return self._declared[address]

    def _on(self, exchange: str) -> tuple[Declaration, ...]:
        bound = [queue for queue in known_queues(self._app) if queue.exchange and queue.exchange.name == exchange]
        return tuple(declaration for queue in bound for declaration in self._app.queues.declarations(queue))


# -- The delayed tasks for some queues, counted or deleted: what waits in the delay queues, and what workers hold until its time.


class Delayed:
    """Delayed tasks that are addressed to these queues, for all applications of the virtual host."""

    def __init__(self, app: AmqTask, admin: Admin, queues: Sequence[Queue]) -> None:
        self._app = app
        self._admin = admin
        self._names = [queue.name for queue in queues]
        self._queue_of: dict[Address, str] = {address: queue.name for queue in queues for address in addresses(queue)}

    def count(self) -> dict[str, int] | None:
        """How many there are, by queue; None: too many wait to look at all."""
        waiting = delay_queues(self._app, self._admin)
        if sum(self._admin.count(name) for _, name in waiting) > MOST_COUNTED:
            return None
        counts = dict.fromkeys(self._names, 0)
        self._ask_workers(counts, delete=False)
        self._look(waiting, counts, delete=False)
        return counts

    def delete(self) -> dict[str, int]:
        """Delete them; how many there were, by queue. Workers are asked twice: some came to them while the queues were
        looked at."""
        counts = dict.fromkeys(self._names, 0)
        self._ask_workers(counts, delete=True)
        self._look(delay_queues(self._app, self._admin), counts, delete=True)
        self._ask_workers(counts, delete=True)
        return counts

    def _look(self, waiting: Sequence[tuple[int, str]], counts: dict[str, int], *, delete: bool) -> None:
        def is_meant(delivery: Delivery) -> bool:
            queue = self._queue_of.get(address_of(delivery))
            if queue is not None:
                counts[queue] += 1
            return queue is not None

        for _, name in waiting:
            self._admin.sift(name, is_meant, delete=delete)

    def _ask_workers(self, counts: dict[str, int], *, delete: bool) -> None:
        pairs = list(self._queue_of)
        answers = self._app.control.ask("purge_delayed", {"addresses": pairs, "delete": delete}, timeout=ANSWER_SECONDS)
        for answer in answers.values():
            for address, number in zip(pairs, _counts(answer), strict=False):
                counts[self._queue_of[address]] += number


def _counts(answer: object) -> Sequence[int]:
    """What a worker that knows the command answers; Celery's, and older ones, have nothing to tell."""
    counts = answer.get("counts") if isinstance(answer, dict) else None
    return [number for number in counts if isinstance(number, int)] if isinstance(counts, list) else []
