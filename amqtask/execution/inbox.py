"""Tasks with `inbox=True`: the run of a call, and that it has run, are committed in one transaction of the task's own database.

The row of a call keeps what the function returned. So a second run of the same call (a redelivery, a caller that published twice)
calls no function: it goes on with the kept value as if it had just been returned, stores the result and publishes the follow-ups,
to which the first run may not have come. Follow-ups that have no id yet (callbacks) get it from the call's, so the second ones
are second runs as well.

Each exception rolls back, also one that asks for something (Retry, Ignore, Reject, a replacement): then nothing has happened,
and the next attempt runs. So one row stands for all attempts of a call, and no two of them commit.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta, timezone
from itertools import count
from types import CoroutineType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from amqtask.exceptions import ConfigurationError, Reject
from amqtask.execution.context import current
from amqtask.execution.results import is_wanted
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.serialization import content_types, dumps, loads

if TYPE_CHECKING:
    from amqtask.execution.context import Context
    from amqtask.execution.contract import TaskLike
    from amqtask.execution.task_plan import TaskPlan

logger = bounded_logger("amqtask.execution")


class Kept(NamedTuple):
    """What a row keeps of a run: the encoded return value; without a content type it was None, or nobody waits for it."""

    content_type: str | None = None
    content_encoding: str | None = None
    body: bytes = b""


class Inbox(Protocol):
    """What `app.inbox` is."""

    def once(self, task_id: str, task: str, work: Callable[[], Kept]) -> Kept | None:
        """Do the work in a transaction together with this call's row, which keeps what the work returns; returns None.

        A call whose row has been committed does not work again: returns what its row keeps. While another run of the call is
        in its transaction, this waits for the end of that. Raises what the database and the work raise; then all is rolled back.
        """

    async def aonce(self, task_id: str, task: str, work: Callable[[], Awaitable[Kept]]) -> Kept | None:
        """`once` from a coroutine."""

    def check(self, task: str, *, is_async: bool) -> None:
        """Raises: ConfigurationError where such a task cannot have its transaction here."""

    def cleanup(self, before: datetime) -> int:
        """Delete the rows of calls that ran before then (aware); how many there were."""


class InboxRuns:
    """Puts the calls of tasks into the inbox; `serializer` writes what the rows keep."""

    def __init__(self, inbox: Inbox, serializer: str, accept: frozenset[str]) -> None:
        self._inbox = inbox
        self._serializer = serializer
        self._accept = accept | content_types([serializer])

    def around(self, plan: TaskPlan) -> Callable[..., Any]:
        """In place of `plan.call`. Raises: ConfigurationError."""
        task, call, once, aonce = plan.task, plan.call, self._inbox.once, self._inbox.aonce
        self._inbox.check(task.name, is_async=plan.is_async)

        async def run_async(*args: object, **kwargs: object) -> object:
            context, value = _context(), None

            async def work() -> Kept:
                nonlocal value
                value = await call(*args, **kwargs)
                return self._kept(plan, context, value)

            kept = await aonce(str(context.id), task.name, work)
            context.follow_up_id = _ids_from(context.id)
            return value if kept is None else self._again(context, kept)

        def run(*args: object, **kwargs: object) -> object:
            context, value = _context(), None

            def work() -> Kept:
                nonlocal value
                value = call(*args, **kwargs)
                return self._kept(plan, context, value)

            kept = once(str(context.id), task.name, work)
            context.follow_up_id = _ids_from(context.id)
            return value if kept is None else self._again(context, kept)

        return run_async if plan.is_async else run

    def cleanup(self, seconds: float | None) -> None:
        """Delete the rows of calls that ran longer ago than that; None: none of them."""
        if seconds is not None:
            deleted = self._inbox.cleanup(datetime.now(timezone.utc) - timedelta(seconds=seconds))
            logger.info("inbox: %d calls that ran long ago are forgotten", deleted)

    def _kept(self, plan: TaskPlan, context: Context, value: object) -> Kept:
        """Within the transaction. Raises: EncodeError, RuntimeError."""
        if value.__class__ is CoroutineType:
            value.close()
            raise RuntimeError(
                f"task {context.task} has inbox=True and returns a coroutine: make its function `async def`"
            )
        if context.asked_retries:
            context.asked_retries = ()
            raise RuntimeError(
                f"task {context.task} has inbox=True and asked for a retry with throw=False: its run would be committed, and "
                "a committed call does not run again. Let retry() raise, which rolls back"
            )
        request, embed = context.request, context.embed
        if value is None or request is None or not (is_wanted(plan, request) or any(embed.values())):
            return Kept()
        encoded = dumps(value, self._serializer)
        return Kept(encoded.content_type, encoded.content_encoding, bytes(encoded.body))

    def _again(self, context: Context, kept: Kept) -> object:
        logger.info("Task %s[%s] has run and been committed before: it is not run again", context.task, context.id)
        if kept.content_type is None:
            return None
        return loads(kept.body, kept.content_type, kept.content_encoding, self._accept)


def _ids_from(task_id: str | None) -> Callable[[], str]:
    """What makes the ids of a call's follow-ups: in each of its runs the same ones, in their order."""
    numbers = count()
    return lambda: str(uuid.uuid5(uuid.NAMESPACE_OID, f"amqtask-inbox:{task_id}:{next(numbers)}"))


def _context() -> Context:
    context = current.get()
    assert context is not None, "the executor has set it"
    if not context.id:
        raise Reject(f"its message has no id, by which the inbox would know that task {context.task} has run")
    return context


def runs_of(tasks: Sequence[TaskLike], inbox: Inbox | None, serializer: str, accept: frozenset[str]) -> InboxRuns:
    """What puts the calls of these tasks into the inbox. Raises: ConfigurationError (there is none, or not for such a task)."""
    if inbox is None:
        raise ConfigurationError(no_inbox(tasks[0].name))
    for task in tasks:
        inbox.check(task.name, is_async=task.is_async)
    return InboxRuns(inbox, serializer, accept)


def in_inbox(plan: TaskPlan, runs: InboxRuns | None) -> TaskPlan:
    """The plan of a task with `inbox=True`. Raises: ConfigurationError where there is no inbox."""
    if runs is None:
        raise ConfigurationError(no_inbox(plan.task.name))
    plan.call = runs.around(plan)
    return plan


def no_inbox(task: str) -> str:
    """Why the task cannot run, and what to do."""
    return (
        f"task {task} has inbox=True, and the application has no inbox: make a SqlAlchemyInbox (amqtask.contrib.sqlalchemy) in a "
        "module that workers import, or use it in a Django project with 'amqtask.contrib.django' in INSTALLED_APPS"
    )
