"""Run tasks of history again, however many: dead letters from their queue, the others from the messages that history kept.

With a rate each next one is delayed a little more, in the broker: nothing of it is in the memory of whoever asked.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from amqtask.exceptions import AmqTaskError, MessageError, QueueNotFound
from amqtask.flow.deadline import HEADER as DEADLINE
from amqtask.flow.keys import OF_ONE_RUN
from amqtask.protocol.event import RERUN_OF
from amqtask.protocol.message import Message, Properties, strip_transit_headers
from amqtask.protocol.serialization import content_types, loads
from amqtask.services.dead_letters import back_to_work, work_queue_of
from amqtask.topology.declarations import base_of, may_hold_tasks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from amqtask.app import AmqTask
    from amqtask.client.runtime import Roof
    from amqtask.history.client import KeptMessage, PastTask
    from amqtask.protocol.message import Delivery

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


# -- One task: as it was, under its own id, or with other arguments, as a new task that points to the old one.

# What the arguments of a call without any look like.
_NONE_SHOWN = {"args": ("()", "[]"), "kwargs": ("{}",)}


class NotKept(AmqTaskError):
    """Not enough of the task is known to run it."""


def prepared(app: Roof, task: PastTask, *, queue: str | None = None) -> Message:
    """The task's message once more, to the queue it was in or to this one: as it was, with all of its retries to come, and
    neither `eta` nor `expires`. Raises: NotKept."""
    if task.message is None:
        raise NotKept(
            f"the message of task {task.id} is not kept (task_history_arguments keeps messages), so it cannot run as it was: "
            "give it its arguments"
        )
    where = queue or task.queue
    if not where:
        raise NotKept(f"no event has told the queue of task {task.id}: name one")
    if not queue and not may_hold_tasks(where):
        raise NotKept(f"task {task.id} was in {where!r}, as an event told it, which is no queue of tasks: name one")
    try:
        message = message_again(task.message, where)
    except ValueError as error:  # any user of the broker may have told of it
        raise NotKept(f"the message of task {task.id}, as an event told it, cannot be read: {error}") from error
    message.declare = app.queues.declarations(app.queues[where])
    return message


def message_again(kept: KeptMessage, queue: str) -> Message:
    """The message as it was, for the queue."""
    headers = {**strip_transit_headers(kept.headers), "retries": 0, "eta": None, "expires": None}
    for name in (DEADLINE, *OF_ONE_RUN):
        headers.pop(name, None)
    properties = Properties(
        content_type=kept.content_type,
        content_encoding=kept.content_encoding,
        headers=headers,
        priority=kept.priority,
        correlation_id=kept.correlation_id,
        reply_to=kept.reply_to,
    )
    return Message(b64decode(kept.body), properties, "", queue)


def run_edited(
    app: Any,
    task: PastTask,
    args: Sequence[object] | None,
    kwargs: Mapping[str, object] | None,
    *,
    queue: str | None = None,
) -> str:
    """Call the task with these arguments; those that are None are as they were. The new id. Raises: NotKept, PublishError."""
    if not task.name:
        raise NotKept(f"no event has told the name of task {task.id}")
    if args is None:
        args = _as_it_was(app, task, "args")
    if kwargs is None:
        kwargs = _as_it_was(app, task, "kwargs")
    result = app.send_task(task.name, args, kwargs, queue=queue or task.queue, headers={RERUN_OF: task.id})
    return str(result.id)


def _as_it_was(app: Any, task: PastTask, which: str) -> Any:
    shown = task.args if which == "args" else task.kwargs
    if shown in _NONE_SHOWN[which]:
        return () if which == "args" else {}
    kept = task.message
    if kept is None:
        raise NotKept(f"the {which} of task {task.id} are only known as they are shown ({shown}): give them, too")
    accept = content_types(app.conf.accept_content)
    try:
        body = loads(b64decode(kept.body), kept.content_type, kept.content_encoding, accept)
        return body[0] if which == "args" else body[1]
    except (MessageError, LookupError, TypeError, ValueError) as error:
        raise NotKept(f"the {which} of task {task.id} cannot be read: {error}") from error
