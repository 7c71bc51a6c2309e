"""Run tasks of history again, however many: dead letters from their queue, the others from the messages that history kept.

With a rate each next one is delayed a little more, in the broker: nothing of it is in the memory of whoever asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from amqtask.client.rerun import prepared
from amqtask.exceptions import AmqTaskError, QueueNotFound
from amqtask.services.dead_letters import back_to_work, work_queue_of
from amqtask.topology.fair import base_of

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.history.client import PastTask
    from amqtask.protocol.message import Delivery, Message

# Messages that are published together; each may have 128 KiB.
AT_ONCE = 100


@dataclass(slots=True)
class Rerun:
    """What came of it: ids of tasks that run again, and of those that do not, with the reason."""

    done: list[str] = field(default_factory=list)
    failed: list[tuple[str, AmqTaskError]] = field(default_factory=list)


class Pace:
    """Delays messages so that `rate` of them arrive in a second, the first one at once; None: all at once."""

    def __init__(self, app: AmqTask, rate: float | None) -> None:
        self._app = app
        self._rate = rate
        self._count = 0

    def __call__(self, message: Message) -> Message:
        """The message, with its delay. One whose turn has not come waits in the broker."""
        if self._rate is None:
            return message
        delayed = self._app.delays.delayed(message, self._count / self._rate)
        self._count += 1
        return delayed


def run_all_again(
    app: AmqTask, tasks: Iterable[PastTask], *, queue: str | None = None, rate: float | None = None
) -> Rerun:
    """Run the tasks again as they were, to the queue each was in or to this one, all at once or `rate` a second.

    Raises: PublishError when the broker takes nothing; what was done until then is done."""
    done = Rerun()
    pace = Pace(app, rate)
    suffix: str = app.conf.task_dead_letter_suffix
    # Ids and queues only: tasks have their messages with them.
    meant = {task.id: task.queue for task in tasks}
    buried = _from_dead_letters(
        app,
        meant,
        lambda delivery: pace(back_to_work(delivery, queue or work_queue_of(delivery, suffix), without_expiry=True)),
    )
    done.done += buried
    # Searches have the newest first.
    remaining = iter([task_id for task_id in reversed(meant) if task_id not in buried])
    while task_ids := list(islice(remaining, AT_ONCE)):
        _publish(app, task_ids, queue, pace, done)
    return done


def _from_dead_letters(
    app: AmqTask, meant: dict[str, str | None], convert: Callable[[Delivery], Message]
) -> dict[str, None]:
    """Move those that are dead letters; their ids."""
    suffix: str = app.conf.task_dead_letter_suffix
    moved: dict[str, None] = {}

    def wanted(delivery: Delivery) -> Message | None:
        task_id = (delivery.properties.headers or {}).get("id")
        if not isinstance(task_id, str) or task_id not in meant:
            return None
        moved[task_id] = None
        return convert(delivery)

    names = sorted({f"{base_of(queue)}{suffix}" for queue in meant.values() if queue})
    with app.broker.admin() as admin:
        for name in names:
            try:
                done = admin.move(name, app.publisher, wanted)
            except QueueNotFound:
                continue
            if done.failure is not None:
                raise done.failure
    return moved


def _publish(app: AmqTask, ids: list[str], queue: str | None, pace: Pace, done: Rerun) -> None:
    messages: list[tuple[str, Message]] = []
    for task in app.history.by_ids(ids):
        try:
            messages.append((task.id, prepared(app, task, queue=queue)))
        except AmqTaskError as error:  # it is not kept, or its queue is none
            done.failed.append((task.id, error))
    if not messages:
        return
    errors = app.publisher.publish_many([pace(message) for _, message in messages])
    published = [
        message
        for (_, message), refusal in zip(messages, errors, strict=True)
        # A message of Celery's old protocol has both in its body: there is nothing to tell of it.
        if refusal is None and {"id", "task"} <= message.properties.headers.keys()
    ]
    if published and app.runtime.tells_sent:
        app.runtime.sent_events.sent(tuple(published))
    for (task_id, _), refusal in zip(messages, errors, strict=True):
        if refusal is None:
            done.done.append(task_id)
        else:
            done.failed.append((task_id, refusal))
