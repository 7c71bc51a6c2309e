"""Tasks with `batch=Batch(…)`: the function is called once with many calls, and each call has an end of its own.

A worker gathers calls (amqtask.worker.lines), and its pool gets them as one request whose `decoded` is Calls. It gives back one
outcome with the outcome of each call in `calls`. So no pool knows of batches, and what is published and answered is each call's
own. A request of one call (inline, or one that has nearly reached the delivery limit) calls the function with a list of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from amqtask.exceptions import ConfigurationError, Retry
from amqtask.execution.context import Context, current
from amqtask.protocol.flow_options import Fair

if TYPE_CHECKING:
    from amqtask.execution.contract import TaskLike
    from amqtask.execution.task_plan import TaskPlan


class BatchCall:
    """One call of a batch: its `args`, `kwargs` and `request` (`id`, `retries`, `headers` …, as `self.request` of other tasks).

    What becomes of it is what was said last. Where nothing was said it succeeds when the function returns, with its item of the
    list that the function returns, or None; and fails when the function raises.
    """

    __slots__ = ("_end", "args", "kwargs", "request")

    def __init__(
        self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, request: Context | None = None
    ) -> None:
        self.args = args
        self.kwargs = kwargs or {}
        self.request = Context() if request is None else request
        self._end: Callable[[TaskLike], object] | None = None

    @property
    def id(self) -> str | None:
        """The task id of the call."""
        return self.request.id

    @property
    def name(self) -> str | None:
        """The task's name."""
        return self.request.task

    def succeed(self, value: object = None) -> None:
        """It has this result."""
        self._end = lambda task: value

    def fail(self, error: BaseException) -> None:
        """As if its own run had raised this, which `autoretry_for` counts for, too; Ignore and Reject mean what they mean then.

        Raises: TypeError for what is no exception."""
        if not isinstance(error, BaseException):
            raise TypeError(f"a call of a batch fails with an exception, not with {error!r}")
        # Raised for each call of a batch it would get longer each time.
        trace = error.__traceback__
        self._end = lambda task: _raise(error.with_traceback(trace))

    def retry(
        self,
        exc: BaseException | None = None,
        *,
        countdown: float | None = None,
        eta: datetime | None = None,
        max_retries: int | None = None,
    ) -> None:
        """Run it again, as Task.retry: in `countdown` seconds, at `eta`, or after the task's `default_retry_delay`; past
        `max_retries` it fails with `exc`. Does not raise: the batch goes on."""
        options = {"exc": exc, "countdown": countdown, "eta": eta, "max_retries": max_retries}
        given = {name: value for name, value in options.items() if value is not None}
        self._end = lambda task: task.retry(**given)

    @property
    def is_open(self) -> bool:
        """Whether nothing was said."""
        return self._end is None

    def end(self, task: TaskLike) -> object:
        """Its result. Raises: what it failed with, Retry, or what retry() raises instead."""
        return None if self._end is None else self._end(task)

    def __repr__(self) -> str:
        return f"<BatchCall {self.name}[{self.id}]>"


def _raise(error: BaseException) -> object:
    raise error


def settle(calls: Sequence[BatchCall], given: Sequence[BatchCall], value: object, error: BaseException | None) -> None:
    """Say of each call of which nothing was said what the function has returned or raised.

    `given` is the list that the function got: if it has sorted that, results are in that order. What it took out of it, or put
    into it, changes nothing."""
    if len(given) == len(calls) and set(map(id, given)) == set(map(id, calls)):
        calls = given
    if error is None and value is not None and not (isinstance(value, (list, tuple)) and len(value) == len(calls)):
        what = f"{len(value)} results" if isinstance(value, (list, tuple)) else f"{type(value).__name__}"
        error = TypeError(
            f"a task with batch=… returned {what} for {len(calls)} calls: it returns None, or a list with a result for each"
        )
    values: Any = value
    for index, call in enumerate(calls):
        if not call.is_open:
            continue
        if error is None:
            call.succeed(None if values is None else values[index])
        elif isinstance(error, Retry):  # of self.retry(): it is each call's own
            when = error.when
            call.retry(
                error.exc,
                eta=when if isinstance(when, datetime) else None,
                countdown=None if isinstance(when, datetime) else when,
            )
        else:
            call.fail(error)


def called_at_once(task: Any, arguments: Sequence[tuple[Sequence[Any], Mapping[str, Any]]]) -> object:
    """The results of calls within one task (map, starmap), in batches; of a coroutine function the coroutine of them.

    Raises: what the first that fails fails with."""
    calls = [BatchCall(args, kwargs, Context(task=task.name)) for args, kwargs in arguments]
    size = task.batch.size
    batches = [calls[start : start + size] for start in range(0, len(calls), size)]
    if task.is_async:

        async def results() -> list[object]:
            for batch in batches:
                given = list(batch)
                settle(batch, given, await task(given), None)
            return [call.end(task) for call in calls]

        return results()
    for batch in batches:
        given = list(batch)
        settle(batch, given, task(given), None)
    return [call.end(task) for call in calls]


def in_batches(plan: TaskPlan) -> TaskPlan:
    """The plan of a task with `batch`: `batch_call` takes a list of calls, `call` the arguments of one."""
    function = plan.batch_call = plan.call

    def alone(args: Sequence[object], kwargs: Mapping[str, object]) -> BatchCall:
        return BatchCall(args, kwargs, current.get())

    def ended(call: BatchCall, value: object, error: Exception | None) -> object:
        if call.is_open and error is not None:
            raise error
        settle([call], [call], value, error)
        return call.end(plan.task)

    async def call_async(*args: object, **kwargs: object) -> object:
        call, value, raised = alone(args, kwargs), None, None
        try:
            value = await function([call])
        except Exception as error:  # noqa: BLE001 - raised again, if nothing was said of the call
            raised = error
        return ended(call, value, raised)

    def call_here(*args: object, **kwargs: object) -> object:
        call, value, raised = alone(args, kwargs), None, None
        try:
            value = function([call])
        except Exception as error:  # noqa: BLE001 - as above
            raised = error
        return ended(call, value, raised)

    plan.call = call_async if plan.is_async else call_here
    return plan


def check_batch(task: Any) -> None:
    """Raises: ConfigurationError for a task with `batch` whose other options cannot be had in batches."""
    if task.batch is None:
        return
    names = [name for name in ("unique", "limits", "breaker", "inbox", "rate_limit") if getattr(task, name)]
    if names:
        raise ConfigurationError(
            f"task {task.name} has batch and {' and '.join(names)}: that is for tasks whose calls run one by one"
        )
    by = task.fair_by.by if isinstance(task.fair_by, Fair) else task.fair_by
    if by is not None and not callable(by):
        raise ConfigurationError(
            f"task {task.name} has batch and fair_by {', '.join(by)}: its function has none of a call's arguments, so fair_by "
            "wants a function of them, as in fair_by=lambda tenant: tenant"
        )
    if not task.acks_late:
        raise ConfigurationError(
            f"task {task.name} has batch and acks_late=False: what is gathered would be lost with its worker. "
            "A batch is acknowledged when it has ended"
        )
