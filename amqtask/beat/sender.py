"""From a due entry to the message of its task: Celery's headers, and an id that follows from entry and due time.

An argument may be worked out when the task is sent (BeatLazyFunc, celery/beat.py).
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from amqtask.protocol.option_types import of_call
from amqtask.protocol.task import PERIODIC

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.beat.contract import Entry
    from amqtask.beat.scheduler import Due
    from amqtask.exceptions import PublishError
    from amqtask.ground.shapes import Keywords, OptionDict
    from amqtask.protocol.message import Message


class BeatLazyFunc:
    """`"kwargs": {"now": BeatLazyFunc(datetime.now)}`: the function is called each time the entry is sent."""

    def __init__(self, func: Callable[..., object], *args: object, **kwargs: object) -> None:
        self._function = func
        self._args = args
        self._kwargs = kwargs

    def __call__(self) -> object:
        """What the function says now."""
        return self._function(*self._args, **self._kwargs)

    delay = __call__


def evaluated(args: Iterable[object], kwargs: Keywords) -> tuple[tuple[object, ...], dict[str, object]]:
    """The arguments, with lazy ones worked out."""
    return (
        tuple(value() if isinstance(value, BeatLazyFunc) else value for value in args),
        {key: value() if isinstance(value, BeatLazyFunc) else value for key, value in kwargs.items()},
    )


# celery/beat.py (apply_async) and django_celery_beat/schedulers.py, by which readers of results know what published a task
# (django_celery_results/backends/database.py); the third is ours.
BEAT_HEADER = "celery_beat_task"
NAME_HEADER = PERIODIC
DUE_HEADER = "periodic_task_due"


class AppSender:
    """Composes with one application. `name` is that of the leaders' queue: beats that share it give the same ids."""

    def __init__(self, app: AmqTask, name: str) -> None:
        self._app = app
        self._space = uuid.uuid5(uuid.NAMESPACE_URL, f"amqtask-beat:{name}")
        self._tells = app.runtime.tells_sent

    def task_id(self, due: Due) -> str:
        """The task id in the entry's options, else a UUID of version 5 from entry and due time."""
        task_id = due.entry.options.get("task_id")
        return str(task_id) if task_id else str(uuid.uuid5(self._space, f"{due.entry.name}\n{due.due_at.isoformat()}"))

    def check(self, entry: Entry) -> None:
        """Look at an entry's options before it is due. Raises: TypeError (unknown option), WrongValue."""
        self._app.caller.check_periodic(entry.task, entry.options)

    def compose(self, due: Due) -> Message:
        """The message of a run. Raises: TypeError, ValueError, EncodeError, QueueNotFound; whatever a lazy argument raises."""
        entry = due.entry
        args, kwargs = evaluated(entry.args, entry.kwargs)
        options: OptionDict = {**entry.options, "task_id": self.task_id(due)}
        options["headers"] = {
            **(entry.options.get("headers") or {}),
            BEAT_HEADER: True,
            NAME_HEADER: entry.name,
            DUE_HEADER: due.due_at.isoformat(),
        }
        return self._app.compose_periodic(entry.task, args, kwargs, of_call(entry.task, options))

    def settled(self, message: Message, error: PublishError | None) -> None:
        """Tell receivers of signals that the broker has the message, or has not."""
        self._app.periodic_settled(message, error)

    def claim(self, message: Message) -> str | None:
        """Take the message's unique key; the id of the call that has it, if another one has. It may block."""
        return self._app.caller.claim_periodic(message)

    def claimed(self, message: Message, error: PublishError | None) -> None:
        """Tell the store of keys that the broker has the message, or has not. It may block."""
        self._app.caller.periodic_claimed(message, error)

    def published(self, messages: Sequence[Message]) -> None:
        """Send events about published messages (task_send_sent_event). It may block."""
        if self._tells and messages:
            self._app.sent_events.sent(messages)
