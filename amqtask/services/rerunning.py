"""Dead letters; and tasks of history that run again, however many: dead letters from their queue, the others from the messages
that history kept.

With a rate each next one is delayed a little more, in the broker: nothing of it is in the memory of whoever asked.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING, Any

from amqtask.exceptions import AlreadyQueued, AmqTaskError, MessageError, QueueNotFound
from amqtask.flow.deadline import HEADER as DEADLINE
from amqtask.flow.keys import OF_ONE_RUN
from amqtask.protocol.event import RERUN_OF
from amqtask.protocol.message import Delivery, Message, Properties, deaths_in, strip_transit_headers
from amqtask.protocol.serialization import content_types, loads
from amqtask.protocol.task import PUBLISHED_AT, saferepr, timestamp
from amqtask.topology.declarations import base_of, may_hold_tasks
from amqtask.worker.finisher import copied_properties

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from amqtask.app import AmqTask
    from amqtask.client.runtime import Roof
    from amqtask.ground.shapes import Headers, JsonObject
    from amqtask.history.client import KeptMessage, PastTask

# -- Dead letters: why a message died and where, and the message that goes back to work.

REASON = "x-amqtask-reason"
OURS = "x-amqtask-"


def reason(headers: Headers) -> str:
    """Why a message died: by our header, else by the broker's x-death entry."""
    if REASON in headers:
        return str(headers[REASON])
    for death in deaths_in(headers):
        return f"{death.get('reason')} in {death.get('queue')} ({death.get('count')}×)"
    return "unknown"


def header_text(value: object) -> str | None:
    """The text of a header, which may be something else."""
    return value if value is None or isinstance(value, str) else saferepr(value)


def work_queue_of(delivery: Delivery, suffix: str) -> str:
    """The queue that the message died in: as its headers say, where that can be true."""
    headers = delivery.properties.headers or {}
    queue = headers.get(f"{OURS}queue")
    if queue is None:
        queue = next((death.get("queue") for death in deaths_in(headers)), None)
    # The headers of what no worker of ours has moved there are its sender's.
    is_one = isinstance(queue, str) and may_hold_tasks(queue)
    return str(queue) if is_one else delivery.queue.removesuffix(suffix)


def back_to_work(delivery: Delivery, queue: str, *, without_expiry: bool = False) -> Message:
    """The message as it was published, to `queue`: no deaths, deliveries or attempts are counted on it any more."""
    properties = copied_properties(delivery.properties)
    headers = {
        key: value
        for key, value in properties.headers.items()
        if not key.startswith(OURS) and key != PUBLISHED_AT and key not in OF_ONE_RUN
    }
    if without_expiry and headers.get("expires"):
        headers["expires"] = None
        headers.pop(DEADLINE, None)
    properties.headers = headers
    return Message(body=delivery.body, properties=properties, exchange="", routing_key=queue)


def has_expired(headers: Headers, now: float) -> bool:
    """Whether a worker would drop the task at once, because its `expires` has passed."""
    expires = headers.get("expires")
    if not expires:
        return False
    try:
        return timestamp(expires) <= now
    except (TypeError, ValueError, AttributeError, ArithmeticError):
        return False  # a worker says so, with the message


def as_entry(delivery: Delivery) -> JsonObject:
    """What `dead list --json` says about a message."""
    headers = delivery.properties.headers or {}
    return {
        "id": header_text(headers.get("id")),
        "task": header_text(headers.get("task")),
        "queue": delivery.queue,
        "reason": reason(headers),
        "exception": headers.get(f"{OURS}exception"),
        "attempts": headers.get(f"{OURS}attempts"),
        "host": headers.get(f"{OURS}host"),
        "died_at": _died_at(headers),
    }


def _died_at(headers: Headers) -> str | None:
    """When a message died, in ISO 8601: by our header, else by the broker's x-death entry."""
    died_at = headers.get(f"{OURS}died-at")
    if died_at is not None:
        return header_text(died_at)
    times = (death.get("time") for death in deaths_in(headers))
    return next((when.isoformat() for when in times if isinstance(when, datetime)), None)


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

    def from_grave(delivery: Delivery) -> Message:
        message = back_to_work(delivery, queue or work_queue_of(delivery, suffix), without_expiry=True)
        check_key(app, message)
        return pace(message)

    moved, held = _from_dead_letters(app, meant, from_grave)
    done.done += moved
    done.failed += held.items()
    # Searches have the newest first.
    remaining = iter([task_id for task_id in reversed(meant) if task_id not in moved and task_id not in held])
    while task_ids := list(islice(remaining, AT_ONCE)):
        _publish(app, task_ids, queue, pace, done)
    return done


def check_key(app: AmqTask, message: Message) -> None:
    """Raises: AlreadyQueued for a unique call that is to run again while another one has its key: it would end REVOKED."""
    holder = app.caller.key_holder(message)
    if holder is not None:
        task_id = message.properties.headers["id"]
        raise AlreadyQueued(f"the unique key of task {task_id} is that of {holder}, which waits or runs", holder)


def _from_dead_letters(
    app: AmqTask, meant: dict[str, str | None], convert: Callable[[Delivery], Message]
) -> tuple[dict[str, None], dict[str, AlreadyQueued]]:
    """Move those that are dead letters; the ids of those that were, and of those that stay, as another call has their key."""
    suffix: str = app.conf.task_dead_letter_suffix
    moved: dict[str, None] = {}
    held: dict[str, AlreadyQueued] = {}

    def wanted(delivery: Delivery) -> Message | None:
        task_id = (delivery.properties.headers or {}).get("id")
        if not isinstance(task_id, str) or task_id not in meant:
            return None
        try:
            message = convert(delivery)
        except AlreadyQueued as error:
            held[task_id] = error
            return None
        moved[task_id] = None
        return message

    names = sorted({f"{base_of(queue)}{suffix}" for queue in meant.values() if queue})
    with app.broker.admin() as admin:
        for name in names:
            try:
                done = admin.move(name, app.publisher, wanted)
            except QueueNotFound:
                continue
            if done.failure is not None:
                raise done.failure
    return moved, held


def _publish(app: AmqTask, ids: list[str], queue: str | None, pace: Pace, done: Rerun) -> None:
    messages: list[tuple[str, Message]] = []
    for task in app.history.by_ids(ids):
        try:
            message = prepared(app, task, queue=queue)
            check_key(app, message)
            messages.append((task.id, message))
        except AmqTaskError as error:  # it is not kept, its queue is none, or another call has its key
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
    """Call the task with these arguments; those that are None are as they were. The new id.

    Raises: NotKept, AlreadyQueued, PublishError."""
    if not task.name:
        raise NotKept(f"no event has told the name of task {task.id}")
    if args is None:
        args = _as_it_was(app, task, "args")
    if kwargs is None:
        kwargs = _as_it_was(app, task, "kwargs")
    options = {"queue": queue or task.queue, "headers": {RERUN_OF: task.id}}
    result = app.caller.publish_call(task.name, tuple(args), dict(kwargs), options, refuses_held=True)
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
