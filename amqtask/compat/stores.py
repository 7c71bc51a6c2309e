"""What Celery's users ask a result store for: on ours (compat.attributes), and on those that derive from Celery's base
classes (compat.backends.base)."""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any

from amqtask import states
from amqtask.exceptions import TaskRevokedError, TimeoutError
from amqtask.execution.context import Context, current_context
from amqtask.execution.request import ErrorInfo
from amqtask.ground.current import current_app
from amqtask.protocol.result import ResultMessage, exception_as_dict, exception_from_dict, now_iso
from amqtask.result import AsyncResult

if TYPE_CHECKING:
    from amqtask.app import AmqTask

Meta = dict[str, Any]


class Asked:
    """Celery's questions and answers, for a store that has `store_result` and `get_task_meta`."""

    READY_STATES, UNREADY_STATES = states.READY_STATES, states.UNREADY_STATES
    EXCEPTION_STATES = states.EXCEPTION_STATES
    TimeoutError = TimeoutError
    subpolling_interval: float | None = None
    supports_native_join = False
    persistent = True
    is_async = False
    app: AmqTask

    if TYPE_CHECKING:

        def store_result(
            self, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None, **kwargs: object
        ) -> Any: ...

        def get_task_meta(self, task_id: str, cache: bool = True) -> Meta: ...

    # -- what is known

    def get_state(self, task_id: str) -> Any:
        """The task's state; PENDING where nothing is stored."""
        return self.get_task_meta(task_id)["status"]

    get_status = get_state

    def get_result(self, task_id: str) -> Any:
        """The value, the exception or the meta of a state."""
        return self.get_task_meta(task_id).get("result")

    def get_traceback(self, task_id: str) -> Any:
        """The traceback of a task that failed."""
        return self.get_task_meta(task_id).get("traceback")

    def get_children(self, task_id: str) -> Any:
        """What the task published."""
        return self.get_task_meta(task_id).get("children")

    def task_result_exists(self, task_id: str) -> bool:
        """Whether anything is stored."""
        return bool(self.get_task_meta(task_id)["status"] != states.PENDING)

    def wait_for(
        self,
        task_id: str,
        timeout: float | None = None,
        interval: float = 0.5,
        no_ack: bool = True,
        on_interval: Any = None,
    ) -> Meta:
        """Wait until the task has ended; returns the final meta. Raises: TimeoutError."""
        return next(self.get_many([task_id], timeout, interval, on_interval=on_interval))[1]

    def get_many(
        self,
        task_ids: Iterable[str],
        timeout: float | None = None,
        interval: float = 0.5,
        no_ack: bool = True,
        on_message: Any = None,
        on_interval: Any = None,
        **_: object,
    ) -> Iterator[tuple[str, Meta]]:
        """(id, meta) of each that has ended; looked for every `interval` seconds. Raises: TimeoutError."""
        missing = dict.fromkeys(task_ids)
        deadline = None if timeout is None else time.monotonic() + timeout
        while missing:
            for task_id in list(missing):
                meta = self.get_task_meta(task_id)
                if meta["status"] in states.READY_STATES:
                    del missing[task_id]
                    if on_message is not None:
                        on_message(meta)
                    yield task_id, meta
            if missing:
                remaining = interval if deadline is None else deadline - time.monotonic()
                if remaining <= 0:
                    raise TimeoutError(f"no result of {len(missing)} tasks within {timeout or 0:g} s")
                if on_interval is not None:
                    on_interval()
                time.sleep(min(interval, remaining))

    def iter_native(self, result: Any, timeout: float | None = None, interval: float = 0.5, **options: Any) -> Any:
        """(id, meta) of each member of a group that has ended."""
        return self.get_many([member.id for member in result.results], timeout, interval, **options)

    def wait_for_pending(
        self, result: Any, timeout: float | None = None, propagate: bool = True, callback: Any = None, **options: object
    ) -> Any:
        """The value of a result that is waited for."""
        return result.get(timeout=timeout, propagate=propagate, callback=callback)

    def add_pending_result(self, result: Any, weak: bool = False) -> Any:
        """The result: a store is told of those who wait by themselves."""
        return result

    remove_pending_result = add_pending_result

    # -- what became of a task

    def mark_as_started(self, task_id: str, **meta: object) -> Any:
        """Store STARTED with this meta."""
        return self.store_result(task_id, meta, states.STARTED)

    def mark_as_done(
        self, task_id: str, result: Any, request: Any = None, store_result: bool = True, state: str = states.SUCCESS
    ) -> None:
        """Store SUCCESS, and add a part to the task's chord."""
        if store_result and not (request is not None and request.ignore_result):
            self.store_result(task_id, result, state, request=request)
        if request is not None and request.chord:
            self.on_chord_part_return(request, state, result)

    def mark_as_failure(
        self,
        task_id: str,
        exc: BaseException,
        traceback: Any = None,
        request: Any = None,
        store_result: bool = True,
        call_errbacks: bool = True,
        state: str = states.FAILURE,
    ) -> None:
        """FAILURE, a part of the task's chord, and the end of all later steps of its chain; its errbacks are published."""
        if store_result:
            self.store_result(task_id, exc, state, traceback=traceback, request=request)
        if request is None:
            return
        if request.chord:
            self.on_chord_part_return(request, state, exc)
        for step in getattr(request, "chain", None) or ():
            step_id = step.get("options", {}).get("task_id")
            if store_result and step_id:
                self.store_result(step_id, exc, state, traceback=traceback)
        if call_errbacks:
            self._publish_errbacks(task_id, request.errbacks)

    def _publish_errbacks(self, task_id: str, errbacks: Iterable[Any] | None) -> None:
        for errback in errbacks or ():
            current_app().signature(errback).apply_async((task_id,), parent_id=task_id)

    def mark_as_retry(
        self,
        task_id: str,
        exc: BaseException,
        traceback: Any = None,
        request: Any = None,
        state: str = states.RETRY,
        **_: object,
    ) -> Any:
        """Store RETRY with the reason."""
        return self.store_result(task_id, exc, state, traceback=traceback, request=request)

    def mark_as_revoked(
        self,
        task_id: str,
        reason: str = "",
        request: Any = None,
        store_result: bool = True,
        state: str = states.REVOKED,
    ) -> None:
        """Store REVOKED, and add a part to the task's chord."""
        error = TaskRevokedError(reason)
        if store_result:
            self.store_result(task_id, error, state, request=request)
        if request is not None and request.chord:
            self.on_chord_part_return(request, state, error)

    def fail_from_current_stack(self, task_id: str, exc: BaseException | None = None) -> Any:
        """FAILURE, with what is being handled, or `exc`; its info."""
        error = sys.exc_info()[1] if exc is None else exc
        if error is None:
            raise ValueError("no exception is being handled, and none was given")
        info = ErrorInfo(error)
        self.mark_as_failure(task_id, error, info.traceback)
        return info

    def chord_error_from_stack(self, callback: Any, exc: BaseException | None = None) -> Any:
        """FAILURE for the body of a chord; its errbacks are published."""
        task_id = callback.options.setdefault("task_id", str(uuid.uuid4()))
        info = self.fail_from_current_stack(task_id, exc)
        self._publish_errbacks(task_id, callback.options.get("link_error"))
        return info

    # -- chords, which workers count in the broker, whatever such a store does

    def ensure_chords_allowed(self) -> None:
        """Do nothing: every store allows chords here."""

    def on_chord_part_return(self, request: Any, state: str, result: Any, **kwargs: object) -> None:
        """A member of a header has ended: for who calls `mark_as_done` by hand."""

    def set_chord_size(self, group_id: str, chord_size: int) -> None:
        """Do nothing: the members' messages carry the size."""

    # -- the rest

    def current_task_children(self, request: Any = None) -> list[Any] | None:
        """What the task has published, as tuples."""
        context = current_context() if request is None else request
        if context is None:
            return None
        return [as_tuple(child) for child in getattr(context, "children", None) or ()]

    def on_task_call(self, producer: Any, task_id: str) -> dict[str, Any]:
        """No further options for a call."""
        return {}

    def process_cleanup(self) -> None:
        """Do nothing when a worker's process ends."""

    def is_cached(self, task_id: str) -> bool:
        """Whether an answer would come from this process's memory."""
        return False


def as_tuple(child: Any) -> Any:
    """A child as data: a result, or what one has become."""
    return child.as_tuple() if hasattr(child, "as_tuple") else child


def meta_of(task_id: str, stored: ResultMessage | None) -> Meta:
    """A result as Celery's stores answer."""
    if stored is None:
        return {"status": states.PENDING, "result": None, "task_id": task_id}
    meta = stored.as_meta()
    if stored.status in states.EXCEPTION_STATES:
        meta["result"] = exception_from_dict(stored.result, stored.traceback)
    return meta


def message_of(task_id: str, result: Any, state: str, traceback: Any, request: Any, serializer: str) -> ResultMessage:
    """A result as ours take it."""
    if isinstance(result, BaseException):
        result = exception_as_dict(result, serializer)
    elif isinstance(result, AsyncResult):
        result = result.as_tuple()
    return ResultMessage(
        task_id,
        state,
        result,
        None if traceback is None else str(traceback),
        [as_tuple(child) for child in getattr(request, "children", None) or ()],
        now_iso() if state in states.READY_STATES else None,
        getattr(request, "group", None),
        getattr(request, "parent_id", None),
    )


def message_of_meta(task_id: str, meta: Meta) -> ResultMessage | None:
    """What a store of Celery's kind answered, as ours do; None where nothing is stored."""
    if meta["status"] == states.PENDING and meta.get("result") is None:
        return None
    done = meta.get("date_done")
    return ResultMessage.from_meta(
        {**meta, "task_id": task_id, "date_done": done.isoformat() if isinstance(done, datetime) else done}
    )


def request_of(result: ResultMessage) -> Context:
    """The request that a store of Celery's kind is told with a result."""
    extra = result.extra
    return Context(
        id=result.task_id,
        task=extra.get("name"),
        args=extra.get("args"),
        kwargs=extra.get("kwargs"),
        retries=extra.get("retries") or 0,
        hostname=extra.get("worker"),
        delivery_info={"routing_key": extra.get("queue")},
        children=result.children,
        group=result.group_id,
        parent_id=result.parent_id,
        stamped_headers=extra.get("stamped_headers"),
        stamps={name: extra.get(name) for name in extra.get("stamped_headers") or ()},
        **{name: extra[name] for name in ("periodic_task_name",) if name in extra},
    )
