"""A task's states and results for its result store: which of them are stored, in which form, and by whom.

A store with a server of its own (Redis) is written here, in the slot; a result that is sent over AMQP becomes a message
of the outcome, and the worker publishes it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeGuard

from amqtask import states
from amqtask.exceptions import BackendUnreachable, EncodeError
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.result import ResultMessage, exception_as_dict, now_iso, stamps_in_result
from amqtask.protocol.serialization import is_private
from amqtask.protocol.task import PERIODIC, RUN_HEADER, saferepr

if TYPE_CHECKING:
    from amqtask.execution.context import Context
    from amqtask.execution.contract import ChainStore, GatheringStore, ResultStore
    from amqtask.execution.request import Request
    from amqtask.execution.task_plan import TaskPlan
    from amqtask.ground.shapes import Options
    from amqtask.protocol.message import Message

logger = bounded_logger("amqtask.execution")
Store = Callable[["ResultMessage"], None]


class Results:
    """Stores results in one result store. `extended` adds the call's own fields to each result (`result_extended`)."""

    def __init__(self, store: ResultStore, *, hostname: str, extended: bool, serializer: str = "json") -> None:
        self._store = store
        self._store_briefly: Store = store.store_briefly
        self._hostname = hostname
        self._extended = extended
        # What was encrypted must not be written as it is.
        self._may_tell = is_private(serializer)
        self._keeps_runs = keeps_runs(store)
        self._gathering = store if stores_together(store) else None

    def success(self, request: Request, context: Context, value: object) -> Message | None:
        """Raises: EncodeError, BackendUnreachable."""
        result = self._result(request, states.SUCCESS, value, context)
        if context.gathered is not None and self._gathering is not None:
            context.gathered.append((request.id, self._gathering.packed(result)))
            return None
        return self._keep(request, result)

    def gather(self) -> list[tuple[str, bytes]] | None:
        """Where the results of a batch are gathered (`context.gathered`), for a store that takes them all at once."""
        return None if self._gathering is None else []

    def store_gathered(self, gathered: Sequence[tuple[str, bytes]]) -> None:
        """Store what was gathered. Raises: BackendUnreachable."""
        assert self._gathering is not None
        self._gathering.store_packed(gathered)

    def started(self, request: Request) -> None:
        """Store STARTED now or not at all: stores in AMQP would get it with the outcome, too late to matter."""
        meta = ResultMessage(request.id, states.STARTED, {"pid": os.getpid(), "hostname": self._hostname})
        try:
            self._keep(request, meta, self._store_briefly)
        except BackendUnreachable as error:
            logger.warning("STARTED of task %s[%s] was not stored: %s", request.task, request.id, error)

    def retry(self, request: Request, context: Context, cause: BaseException, trace: str) -> Message | None:
        """Store RETRY. The next run will store more: when the store is away there is only a warning."""
        meta = self._result(request, states.RETRY, exception_as_dict(cause), context, trace)
        try:
            return self._keep_or_shorten(request, meta, cause, self._store_briefly)
        except BackendUnreachable as error:
            logger.warning("RETRY of task %s[%s] was not stored: %s", request.task, request.id, error)
            return None

    def failure(self, request: Request, context: Context, error: BaseException, trace: str) -> Message | None:
        """Raises: BackendUnreachable."""
        meta = self._result(request, states.FAILURE, exception_as_dict(error), context, trace)
        return self._keep_or_shorten(request, meta, error)

    def ended(self, request: Request, state: str, error: Exception) -> Message | None:
        """The end of a request that no slot ran to its end. Raises: BackendUnreachable."""
        headers = request.headers
        meta = ResultMessage(request.id, state, exception_as_dict(error), date_done=now_iso())
        # The headers of a refused message may have any values.
        group, parent = headers.get("group"), headers.get("parent_id")
        meta.group_id = group if isinstance(group, str) else None
        meta.parent_id = parent if isinstance(parent, str) else None
        return self._keep(request, meta, self._store_briefly)

    def never_ran(self, result: ResultMessage, options: Options) -> Message | None:
        """The end of a signature that will not be published. Raises: BackendUnreachable."""
        result.date_done, result.parent_id = now_iso(), options.get("parent_id")
        result.group_id = options.get("group_id")
        message = self._store.message_for(result, options.get("reply_to"), result.task_id)
        if message is None:
            self._store_briefly(result)
        return message

    def _result(
        self, request: Request, state: str, value: object, context: Context, trace: str | None = None
    ) -> ResultMessage:
        headers = request.headers
        meta = ResultMessage(
            request.id,
            state,
            value,
            trace,
            list(context.__dict__.get("children", ())),
            now_iso() if state in states.READY_STATES else None,
            headers.get("group"),
            headers.get("parent_id"),
        )
        if self._extended:
            may_tell = self._may_tell or not is_private(request.content_type)
            meta.extra = {
                "name": request.task,
                "args": context.args if may_tell else None,
                "kwargs": context.kwargs if may_tell else None,
                "worker": self._hostname,
                "retries": context.retries,
                "queue": request.routing_key,
            }
            if PERIODIC in headers:
                meta.extra[PERIODIC] = headers[PERIODIC]
            if headers.get("stamped_headers"):
                meta.extra |= stamps_in_result(headers["stamped_headers"], headers.get("stamps"))
        if self._keeps_runs and RUN_HEADER in headers:
            meta.extra[RUN_HEADER] = headers[RUN_HEADER]
        return meta

    def _keep_or_shorten(
        self, request: Request, meta: ResultMessage, error: BaseException, store: Store | None = None
    ) -> Message | None:
        try:
            return self._keep(request, meta, store)
        except EncodeError:
            # The serializer refuses a value that JSON takes, or (result_extended) the arguments: the repr still shows it.
            meta.extra = {}
            meta.result = exception_as_dict(Exception(saferepr(error)))
            return self._keep(request, meta, store)

    def _keep(self, request: Request, result: ResultMessage, store: Store | None = None) -> Message | None:
        message = self._store.message_for(result, request.reply_to, request.correlation_id)
        if message is None:
            (store or self._store.store)(result)
        return message


def stores_together(store: ResultStore) -> TypeGuard[GatheringStore]:
    """Whether it takes several results at once."""
    return store.stores_together


def keeps_runs(store: ResultStore) -> TypeGuard[ChainStore]:
    """Whether a chain can be resumed from the store's results."""
    return store.keeps_runs


def is_wanted(plan: TaskPlan, request: Request) -> bool:
    """Whether this call's result is stored; the caller's `ignore_result` wins over the task's."""
    ignored = request.headers.get("ignore_result")  # None: the task's own setting decides
    return plan.wants_result if ignored is None else not ignored
