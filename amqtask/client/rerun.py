"""Run a task of history again: as it was, under its own id, or with other arguments, as a new task that points to the old one."""

from __future__ import annotations

from base64 import b64decode
from typing import TYPE_CHECKING, Any

from amqtask.exceptions import AmqTaskError, MessageError
from amqtask.flow.deadline import HEADER as DEADLINE
from amqtask.flow.keys import OF_ONE_RUN
from amqtask.protocol.event import RERUN_OF
from amqtask.protocol.message import Message, Properties, strip_transit_headers
from amqtask.protocol.serialization import content_types, loads
from amqtask.topology.declarations import may_hold_tasks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from amqtask.client.runtime import Roof
    from amqtask.history.client import KeptMessage, PastTask

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
