"""Results as their caller holds them: AsyncResult and EagerResult; each takes a backend, not an app."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
from collections.abc import AsyncIterator, Callable, Generator
from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from amqtask import states
from amqtask.exceptions import BackendNotConfigured, ChordError, TaskRevokedError, TimeoutError
from amqtask.execution.context import current
from amqtask.ground.current import find_current_app
from amqtask.ground.deadlines import cancel_all
from amqtask.ground.graph import before, tuple_of
from amqtask.ground.plugins import WithOthersNames, others_names
from amqtask.ground.printable import bounded_logger
from amqtask.pipeline import flush_open, opened
from amqtask.protocol.result import ResultMessage, exception_from_dict, parts_of, time_of
from amqtask.results import Cancellable, WithDescendants, as_task_id, check_not_in_task, each_end, forget_tree
from amqtask.results import GroupResult as GroupResult
from amqtask.results import ResultSet as ResultSet
from amqtask.results import allow_join_result as allow_join_result

if TYPE_CHECKING:
    from amqtask.backends.contract import ResultBackend
    from amqtask.ground.shapes import Headers, JsonObject

logger = bounded_logger("amqtask.backends")
R = TypeVar("R")
Revoke = Callable[..., None]
# No backend was given, which is not the same as None: an application that keeps no results.
_FROM_APP: Any = object()


def _application(app: Any) -> Any:
    """The application that is meant by `app=`: it, that of a task, or the current one (None: there is none)."""
    if app is None:
        return find_current_app()
    application = getattr(app, "app", app)
    if not hasattr(application, "revoke_call"):
        raise TypeError(f"AsyncResult(app=…) is an application or a task of one, not {app!r}")
    return application


class AsyncResult(WithDescendants, Cancellable, WithOthersNames, Generic[R]):
    """The result of a published task; Celery's surface.

    By an id from elsewhere: `AsyncResult(id, app=app)` (or a task of that app); without `app` the current one is asked.
    Raises: BackendNotConfigured from everything that asks for the result when the app keeps none; TypeError.
    """

    def __init__(
        self,
        id: str,
        backend: ResultBackend | None = _FROM_APP,
        *,
        app: Any = None,
        parent: UntypedResult | GroupResult | None = None,
        revoke: Revoke | None = None,
        task_name: str | None = None,
        ignored: bool = False,
    ) -> None:
        if backend is _FROM_APP:
            backend, application = None, _application(app)
            if application is not None:
                backend, revoke = application.backend, application.revoke_call
        if id.__class__ is not str:
            id = as_task_id(id)
        self.id = self.task_id = id
        self.parent = parent
        self._backend = backend
        # Tells all workers not to run one task, or several; None for a result that belongs to no application.
        self.revoke_call = revoke
        self._task_name = task_name
        # How the task ended, once that was read.
        self.final_meta: ResultMessage | None = None
        # Whether the call was made with ignore_result: nothing will ever be stored, so nothing waits for it.
        self.ignored = ignored
        if backend is not None and not ignored:
            backend.hold(id, self)

    # -- waiting

    def get(
        self,
        timeout: float | None = None,
        propagate: bool = True,
        interval: float = 0.5,
        no_ack: bool = True,
        follow_parents: bool = True,
        callback: Callable[[str, Any], object] | None = None,
        on_message: Callable[[JsonObject], object] | None = None,
        on_interval: Callable[[], None] | None = None,
        disable_sync_subtasks: bool = True,
    ) -> R:
        """Wait for the result, `timeout` seconds at most, and return it.

        A failed task's exception is raised (with the worker's traceback as its cause) unless `propagate` is False, when it
        is returned. Of a chord whose header failed the member's own exception is raised, where that is known, and the ChordError
        that names the member is returned. `on_message` is called with the meta of each state that is seen, the final one last; of
        a chain with those of earlier steps, too. `on_interval` is called each `interval` seconds; what it raises ends the wait.
        Without them nothing polls. A call with ignore_result has no result: None, at once. `no_ack` is only accepted.
        Raises: TimeoutError, TaskRevokedError, BackendUnreachable, BackendNotConfigured; RuntimeError within a task.
        """
        if self.ignored:
            return cast("R", None)
        if current.get() is not None:
            check_not_in_task(disable_sync_subtasks)
        try:
            final = self.final_meta
            if final is None:
                ancestors = self._ancestors() if follow_parents and propagate else {}
                if ancestors or on_message is not None or on_interval is not None:
                    final = self.final_meta = self._first_end(ancestors, timeout, interval, on_message, on_interval)
                else:
                    final = self.final_meta = self.result_store.wait(self.id, timeout=timeout)
            value = self._value(final, propagate)
        except ChordError as error:
            raise (self.error_in_header() if follow_parents else None) or error from None
        if callback is not None:
            callback(self.id, value)
        return value

    wait = get

    async def aget(
        self,
        timeout: float | None = None,
        propagate: bool = True,
        *,
        follow_parents: bool = True,
        disable_sync_subtasks: bool = True,
    ) -> R:
        """`await` the result; the same as `get`."""
        if self.ignored:
            return cast("R", None)
        if current.get() is not None:
            check_not_in_task(disable_sync_subtasks)
        try:
            final = self.final_meta
            if final is None:
                ancestors = self._ancestors() if follow_parents and propagate else {}
                if ancestors:
                    final = self.final_meta = await self._afirst_end(ancestors, timeout)
                else:
                    final = self.final_meta = await self.result_store.await_result(self.id, timeout=timeout)
            return self._value(final, propagate)
        except ChordError as error:
            cause = await asyncio.to_thread(self.error_in_header) if follow_parents else None
            raise cause or error from None

    def __await__(self) -> Generator[Any, None, R]:
        return self.aget().__await__()

    async def astates(self, timeout: float | None = None, *, interval: float = 0.5) -> AsyncIterator[tuple[str, Any]]:
        """Each state that is seen as `(state, info)`, the final one last: `async for state, info in result.astates(): …`.

        `info` is what `result.info` is: the meta of `update_state`, the value or the exception, which is not raised. The store is
        looked at each `interval` seconds, so of two changes within one only the later is seen; the final state comes when it is
        stored. Raises: TimeoutError after `timeout` seconds, BackendUnreachable, BackendNotConfigured.
        """
        if self.final_meta is not None:
            yield self.final_meta.status, self._info(self.final_meta)
            return
        reported: ResultMessage | None = None
        end = asyncio.ensure_future(self.result_store.await_result(self.id, timeout=timeout))
        try:
            while not end.done():
                stored = await asyncio.to_thread(self.latest_meta)
                if stored.is_ready:
                    break
                if stored != reported:
                    reported = stored
                    yield stored.status, self._info(stored)
                await asyncio.wait([end], timeout=interval)
            final = self.final_meta = await end
            yield final.status, self._info(final)
        finally:
            await cancel_all((end,))

    def _ancestors(self) -> dict[str, UntypedResult]:
        """The steps before this one that may still fail: then this one never runs, and their error is its own. (A group among
        them is a chord's header, whose body hears of a failure.)"""
        ancestors: dict[str, UntypedResult] = {}
        for node in before(self) if self.parent is not None else ():
            if isinstance(node, AsyncResult):
                if node.final_meta is None:
                    ancestors[node.id] = node
                elif node.final_meta.status in states.PROPAGATE_STATES:
                    raise node.error_of(node.final_meta)
        return ancestors

    def _first_end(
        self,
        ancestors: dict[str, UntypedResult],
        timeout: float | None,
        interval: float,
        on_message: Callable[[JsonObject], object] | None,
        on_interval: Callable[[], object] | None,
    ) -> ResultMessage:
        """This result, or the error of the ancestor that failed before it; tells of what is seen on the way."""
        reported: ResultMessage | None = None

        def look() -> None:
            nonlocal reported
            stored = None if on_message is None else self.result_store.find(self.id)
            if on_message is not None and stored is not None and not stored.is_ready and stored != reported:
                reported = stored
                on_message(stored.as_meta())
            if on_interval is not None:
                on_interval()

        looks = None if on_message is None and on_interval is None else look
        arriving = each_end(self.result_store, [self.id, *ancestors], timeout, interval=interval, look=looks)
        with contextlib.closing(arriving):  # it may hold a connection
            while True:
                try:
                    task_id, final = next(arriving)
                except TimeoutError as late:
                    raise self._too_late(ancestors, timeout) from late
                if on_message is not None:
                    on_message(final.as_meta())
                if self._is_end(ancestors, task_id, final):
                    return final

    async def _afirst_end(self, ancestors: dict[str, UntypedResult], timeout: float | None) -> ResultMessage:
        waiting = {
            asyncio.ensure_future(self.result_store.await_result(task_id, timeout=timeout)): task_id
            for task_id in (self.id, *ancestors)
        }
        try:
            while True:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for future in done:
                    task_id = waiting.pop(future)
                    try:
                        final = future.result()
                    except TimeoutError as late:
                        raise self._too_late(ancestors, timeout) from late
                    if self._is_end(ancestors, task_id, final):
                        return final
        finally:
            await cancel_all(waiting)

    def _is_end(self, ancestors: dict[str, UntypedResult], task_id: str, final: ResultMessage) -> bool:
        """Whether that is this result; else it is an ancestor's, whose error is raised."""
        if task_id == self.id:
            return True
        ancestors[task_id].final_meta = final
        if final.status in states.PROPAGATE_STATES:
            raise ancestors[task_id].error_of(final)
        return False

    def _too_late(self, ancestors: dict[str, UntypedResult], timeout: float | None) -> TimeoutError:
        unfinished = [task_id for task_id, ancestor in ancestors.items() if ancestor.final_meta is None]
        at = f"; its chain is still at task {unfinished[-1]}" if unfinished else ""
        return TimeoutError(f"no result of task {self.id} within {timeout or 0:g} s{at}")

    def _value(self, final: ResultMessage, propagate: bool) -> R:
        if final.status in states.PROPAGATE_STATES:
            error = self.error_of(final)
            if propagate:
                raise error
            return cast("R", error)
        return cast("R", final.result)

    def error_in_header(self) -> BaseException | None:
        """Why the chord before this one failed, if it is known: the error of its header's first member that did."""
        for node in before(self):
            error: BaseException | None = None if isinstance(node, AsyncResult) else node.first_error()
            if error is not None:
                return error
        return None

    def error_of(self, final: ResultMessage) -> BaseException:
        """The exception of a task that ended so: with an error, or revoked."""
        if final.status == states.REVOKED and not isinstance(final.result, dict):
            return TaskRevokedError(str(final.result or "revoked"))
        return exception_from_dict(final.result, final.traceback)

    # -- looking

    @property
    def backend(self) -> ResultBackend | None:
        """The result store; None where results are not kept."""
        return self._backend

    @property
    def result_store(self) -> ResultBackend:
        """The result store. Raises: BackendNotConfigured where results are not kept."""
        if opened.get() is not None:
            flush_open()  # or the result of a call that still waits in a pipeline would never come
        if self._backend is None:
            raise BackendNotConfigured(
                f"the application keeps no results, so that of task {self.id} cannot be read: set result_backend "
                '("rpc://" or "redis://…")'
            )
        return self._backend

    def latest_meta(self) -> ResultMessage:
        """What the store knows now; PENDING where that is nothing. Raises: BackendUnreachable, BackendNotConfigured."""
        if self.final_meta is not None:
            return self.final_meta
        stored = self.result_store.find(self.id)
        if stored is None:
            return ResultMessage(self.id)
        if stored.is_ready:
            self.final_meta = stored
        return stored

    @property
    def state(self) -> str:
        """PENDING, STARTED, RETRY, SUCCESS, FAILURE, REVOKED, or a task's own."""
        return self.latest_meta().status

    status = state

    @property
    def result(self) -> Any:
        """The return value; the exception of a failed task; the meta of a custom state; None while nothing is known."""
        return self._info(self.latest_meta())

    info = result

    def _info(self, meta: ResultMessage) -> Any:
        return self.error_of(meta) if meta.status in states.EXCEPTION_STATES else meta.result

    @property
    def traceback(self) -> str | None:
        """The worker's traceback of a failed task."""
        return self.latest_meta().traceback

    @property
    def date_done(self) -> datetime | None:
        """When the task ended."""
        return time_of(self.latest_meta().date_done)

    @property
    def children(self) -> list[Any] | None:
        """The results of what the task published itself."""
        children = []
        for child in self.latest_meta().child_tuples:
            with contextlib.suppress(ValueError, RecursionError):  # others may write to the store, and what they like
                children.append(result_from_tuple(child, self._backend, self.revoke_call))
        return children or None

    @property
    def name(self) -> str | None:
        """The task's name (when known here, or with result_extended)."""
        return self._task_name or self.latest_meta().extra.get("name")

    @property
    def args(self) -> Any:
        """The task's arguments (with result_extended)."""
        return self.latest_meta().extra.get("args")

    @property
    def kwargs(self) -> Any:
        """The task's keyword arguments (with result_extended)."""
        return self.latest_meta().extra.get("kwargs")

    @property
    def worker(self) -> str | None:
        """The node that ran the task (with result_extended)."""
        return self.latest_meta().extra.get("worker")

    @property
    def retries(self) -> int | None:
        """How often the task was retried (with result_extended)."""
        return self.latest_meta().extra.get("retries")

    @property
    def queue(self) -> str | None:
        """The queue that the task came through (with result_extended)."""
        return self.latest_meta().extra.get("queue")

    def ready(self) -> bool:
        """Whether the task ended, well or not."""
        return self.latest_meta().is_ready

    def successful(self) -> bool:
        """Whether the task succeeded."""
        return self.state == states.SUCCESS

    def failed(self) -> bool:
        """Whether the task failed."""
        return self.state == states.FAILURE

    def maybe_throw(self, propagate: bool = True, callback: Callable[[str, Any], object] | None = None) -> Any:
        """Raise the error of a task that failed, else return what is known."""
        meta = self.latest_meta()
        try:
            value = self._value(meta, propagate) if meta.is_ready else meta.result
        except ChordError as error:
            raise self.error_in_header() or error from None
        if callback is not None:
            callback(self.id, value)
        return value

    maybe_reraise = maybe_throw

    # -- acting

    def then(
        self, callback: Callable[[AsyncResult[R]], object], on_error: Callable[[AsyncResult[R]], object] | None = None
    ) -> AsyncResult[R]:
        """Call `callback(self)` when it ended (`on_error(self)` when it failed, if given), from a background thread."""

        def arrived(final: ResultMessage) -> None:
            self.final_meta = final
            failed = final.status in states.PROPAGATE_STATES
            try:
                # It may be the thread of the task that has ended (a store in this process): the callback is no part of that.
                contextvars.Context().run(on_error if failed and on_error is not None else callback, self)
            except Exception:
                logger.exception("a callback for the result of task %s failed", self.id)

        if self.final_meta is not None:
            arrived(self.final_meta)
        else:
            self.result_store.add_callback(self.id, arrived)
        return self

    def forget(self) -> None:
        """Drop the result, and those of the steps before it, here and in the store."""
        forget_tree(self)

    def drop(self) -> None:
        """Drop this one."""
        self.final_meta = None
        self.result_store.forget(self.id)

    def revoke(
        self,
        connection: object = None,
        terminate: bool = False,
        signal: str | None = None,
        wait: bool = False,
        timeout: float | None = None,
    ) -> None:
        """Tell all workers not to run it; with `terminate` to end it if it runs.

        With `wait` their answers are waited for, `timeout` seconds (default: 1).
        """
        self._revoker(self.id, terminate=terminate, signal=signal, wait=wait, timeout=timeout)

    def revoke_by_stamped_headers(
        self,
        headers: Headers,
        connection: object = None,
        terminate: bool = False,
        signal: str | None = None,
        wait: bool = False,
        timeout: float | None = None,
    ) -> None:
        """The same for all tasks, not only this one, that carry these stamps: {stamp: value or list of values}."""
        self._revoker(self.id, terminate=terminate, signal=signal, wait=wait, timeout=timeout, headers=headers)

    def ids_by_revoker(self) -> dict[Revoke, list[str]]:
        """See Cancellable."""
        return {self._revoker: [self.id]}

    @property
    def _revoker(self) -> Revoke:
        if self.revoke_call is None:
            raise BackendNotConfigured("this result belongs to no application, so nobody can be told to revoke it")
        return self.revoke_call

    # -- as data

    def as_tuple(self) -> Any:
        """`((id, parent), None)`, as Celery writes it."""
        return tuple_of(self)

    # A task that returns a result, or takes one as an argument: the JSON serializer asks for it (kombu's protocol).
    __json__ = as_tuple

    def as_list(self) -> list[str]:
        """The ids of this result and of its parents."""
        return [self.id, *(node.id for node in before(self))]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, AsyncResult):
            return self.id == other.id
        return self.id == other if isinstance(other, str) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.id)

    def __reduce__(self) -> tuple[object, ...]:
        """Pickled without its store: where it is read the current application's is asked."""
        return _unpickled, (type(self), self.id, self.parent, self._task_name, self.final_meta, self.ignored)

    def __copy__(self) -> AsyncResult[R]:
        return self._copied(self.parent)

    def __deepcopy__(self, memo: dict[int, object]) -> AsyncResult[R]:
        copied = memo[id(self)] = self._copied(None)
        copied.parent = copy.deepcopy(self.parent, memo)
        return copied

    def _copied(self, parent: object) -> AsyncResult[R]:
        """A copy of this result, of the same store, with another parent."""
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__, parent=parent)
        return copied

    def __str__(self) -> str:
        return self.id

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.id}>"


class EagerResult(AsyncResult[R]):
    """The result of a task that ran in the caller."""

    def __init__(
        self, id: str, value: object, state: str, traceback: str | None = None, name: str | None = None
    ) -> None:
        super().__init__(id, None, task_name=name)
        self._eager_value = value
        self.final_meta = ResultMessage(id, state, value, traceback)

    def get(self, timeout: float | None = None, propagate: bool = True, *args: Any, **kwargs: Any) -> R:
        """The value; nothing waits, so a task may ask too."""
        kwargs["disable_sync_subtasks"] = False
        return super().get(timeout, propagate, *args, **kwargs)

    wait = get

    def __reduce__(self) -> tuple[object, ...]:
        final = self.final_meta
        assert final is not None
        return EagerResult, (self.id, self._eager_value, final.status, final.traceback, self._task_name)

    def error_of(self, final: ResultMessage) -> BaseException:
        """The exception itself."""
        value = self._eager_value
        return value if isinstance(value, BaseException) else super().error_of(final)

    def drop(self) -> None:
        """Do nothing: the result is not stored."""

    def revoke(self, *args: object, **kwargs: object) -> None:
        """The task has run already; as in Celery the result is TaskRevokedError from now on."""
        self._eager_value = TaskRevokedError("revoked")
        self.final_meta = ResultMessage(self.id, states.REVOKED)

    @property
    def _revoker(self) -> Revoke:
        return self.revoke


def _unpickled(
    result_class: type[UntypedResult],
    id: str,
    parent: Any,
    name: str | None,
    final: ResultMessage | None,
    ignored: bool,
) -> UntypedResult:
    result = result_class.__new__(result_class)
    AsyncResult.__init__(result, id, parent=parent, task_name=name, ignored=ignored)
    result.final_meta = final
    return result


def result_from_tuple(
    encoded: Any, backend: ResultBackend | None = _FROM_APP, revoke: Revoke | None = None, *, app: Any = None
) -> Any:
    """The result that `as_tuple` described (lists from JSON too), in `backend`, else that of `app`, else of the current app."""
    if isinstance(encoded, (AsyncResult, ResultSet)):
        return encoded
    if backend is _FROM_APP:
        application = _application(app)
        backend, revoke = (None, None) if application is None else (application.backend, application.revoke_call)
    if isinstance(encoded, str):
        return AsyncResult(encoded, backend, revoke=revoke)
    task_id, parent, children = parts_of(encoded)
    parent_result = result_from_tuple(parent, backend, revoke) if parent else None
    if children is not None:
        members = [result_from_tuple(child, backend, revoke) for child in children]
        return GroupResult(task_id, members, backend, parent_result)
    return AsyncResult(task_id, backend, parent=parent_result, revoke=revoke)


GroupResult.rebuilt = staticmethod(result_from_tuple)

__getattr__ = others_names(__name__)


if TYPE_CHECKING:
    # The result of a call whose type is not known: of a task by its name, of a signature.
    UntypedResult = AsyncResult[Any]
    UntypedEagerResult = EagerResult[Any]
