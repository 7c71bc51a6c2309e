"""The delayed tasks for some queues, counted or deleted: what waits in the delay queues, and what workers hold until its time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from amqtask.cli.move_messages import delay_queues
from amqtask.topology.delays import Address, address_of, addresses
from amqtask.transport.contract import Admin

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.protocol.entities import Queue
    from amqtask.protocol.message import Delivery

# Above so many, in all delay queues together, they are not looked at only to be counted: whoever looks holds them, and what is
# due meanwhile is late.
MOST_COUNTED = 20_000
# How long workers may take to answer (seconds).
ANSWER_SECONDS = 1.0


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
        found = dict.fromkeys(self._names, 0)
        self._ask_workers(found, delete=False)
        self._look(waiting, found, delete=False)
        return found

    def delete(self) -> dict[str, int]:
        """Delete them; how many there were, by queue. Workers are asked twice: some came to them while the queues were
        looked at."""
        found = dict.fromkeys(self._names, 0)
        self._ask_workers(found, delete=True)
        self._look(delay_queues(self._app, self._admin), found, delete=True)
        self._ask_workers(found, delete=True)
        return found

    def _look(self, waiting: Sequence[tuple[int, str]], found: dict[str, int], *, delete: bool) -> None:
        def is_meant(delivery: Delivery) -> bool:
            queue = self._queue_of.get(address_of(delivery))
            if queue is not None:
                found[queue] += 1
            return queue is not None

        for _, name in waiting:
            self._admin.sift(name, is_meant, delete=delete)

    def _ask_workers(self, found: dict[str, int], *, delete: bool) -> None:
        pairs = list(self._queue_of)
        answers = self._app.control.ask("purge_delayed", {"addresses": pairs, "delete": delete}, timeout=ANSWER_SECONDS)
        for answer in answers.values():
            for address, number in zip(pairs, _counts(answer), strict=False):
                found[self._queue_of[address]] += number


def _counts(answer: object) -> Sequence[int]:
    """What a worker that knows the command answers; Celery's, and older ones, have nothing to tell."""
    counts = answer.get("counts") if isinstance(answer, dict) else None
    return [number for number in counts if isinstance(number, int)] if isinstance(counts, list) else []
