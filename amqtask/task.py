"""Task: a function with a name, options, hooks, and the ways to call it; typed by its function's parameters."""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeGuard, TypeVar

from amqtask.calls.signature import Signature
from amqtask.canvas import ACCUMULATE, chain, chord, chunks, group, xmap, xstarmap
from amqtask.exceptions import (
    ConfigurationError,
    MaxRetriesExceededError,
    OperationalError,
    Replaced,
    Retry,
    WrongValue,
)
from amqtask.execution.batches import check_batch
from amqtask.execution.context import Context, current_context
from amqtask.flow.keys import fair_plan_of, plan_of
from amqtask.ground.current import current_app
from amqtask.ground.plugins import WithOthersNames, plugins
from amqtask.protocol import option_types
from amqtask.protocol.option_types import CALL_NAMES, TASK, of_call, of_task
from amqtask.protocol.result import ResultMessage
from amqtask.protocol.serialization import is_private

if TYPE_CHECKING:
    from amqtask.calls.application import Application
    from amqtask.flow.keys import FairPlan, FlowPlan
    from amqtask.ground.shapes import Arguments, CoroutineOf, KeywordDict, Keywords, Options
    from amqtask.result import AsyncResult, EagerResult

# Arguments of `Task.retry` beside the options of a call.
_OF_RETRY = frozenset({"args", "kwargs", "exc", "throw", "eta", "countdown", "max_retries"})
P = ParamSpec("P")
R = TypeVar("R")

HOOKS = ("before_start", "on_success", "on_failure", "on_retry", "after_return", "__call__")
# Options that fall back to a setting: attribute → setting.
FROM_SETTINGS = {
    "acks_late": "task_acks_late",
    "ignore_result": "task_ignore_result",
    "store_errors_even_if_ignored": "task_store_errors_even_if_ignored",
    "store_eager_result": "task_store_eager_result",
    "track_started": "task_track_started",
    "reject_on_worker_lost": "task_reject_on_worker_lost",
    "rate_limit": "task_default_rate_limit",
    "time_limit": "task_time_limit",
    "soft_time_limit": "task_soft_time_limit",
    "serializer": "task_serializer",
    "compression": "task_compression",
    "priority": "task_default_priority",
}


class Task(WithOthersNames, Generic[P, R]):
    """A registered task. Subclass it (`base=`) for hooks; class-based tasks define `run` and a `name`.

    Options are class attributes; None means that the app's setting decides. Times are seconds.
    """

    abstract = True
    name: str = ""
    typing: bool | None = None
    max_retries: int | None = 3
    default_retry_delay: float = 180.0
    autoretry_for: tuple[type[BaseException], ...] = ()
    dont_autoretry_for: tuple[type[BaseException], ...] = ()
    retry_kwargs: KeywordDict = {}  # noqa: RUF012 - an option like the others; replaced, never changed
    retry_backoff: float = 0
    retry_backoff_max: float = 600
    retry_jitter: bool = True
    rate_limit: str | float | None = None
    time_limit: Any = None
    soft_time_limit: Any = None
    ignore_result: Any = None
    store_errors_even_if_ignored: Any = None
    store_eager_result: bool | None = None
    track_started: Any = None
    acks_late: Any = None
    acks_on_failure_or_timeout: Any = None
    acks_on_failure: Any = None
    acks_on_timeout: Any = None
    reject_on_worker_lost: Any = None
    throws: tuple[type[BaseException], ...] = ()
    expires: Any = None
    deadline: Any = None
    unique: Any = None
    limits: Any = ()
    fair_by: Any = None
    inbox: bool = False
    batch: Any = None
    breaker: Any = None
    priority: int | None = None
    serializer: str | None = None
    compression: str | None = None
    queue: Any = None
    exchange: Any = None
    routing_key: str | None = None
    delivery_mode: Any = None
    send_events: bool = True
    trail: bool = True
    resultrepr_maxsize: int = 1024
    is_async: bool = False
    overridden_hooks: frozenset[str] = frozenset()

    # For `except self.MaxRetriesExceededError`.
    MaxRetriesExceededError = MaxRetriesExceededError
    OperationalError = OperationalError

    app: Application
    flow_plan: FlowPlan | None = None
    fair_plan: FairPlan | None = None
    # Of the function, or of a class of one's own.
    __name__: str
    _check: Callable[..., object] | None = None
    # Of a task with pydantic=True: the arguments of a call as what a serializer writes.
    as_data: Callable[..., tuple[Any, Any]] | None = None

    # -- what the function or subclass is

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What the task does."""
        raise NotImplementedError(f"task {self.name} has no run()")

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function here, as a function."""
        result: R = self.run(*args, **kwargs)
        return result

    # -- hooks

    def before_start(self, task_id: str, args: Any, kwargs: KeywordDict) -> None:
        """Before each run."""

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: KeywordDict) -> None:
        """After a run that returned."""

    def on_failure(self, exc: BaseException, task_id: str, args: Any, kwargs: KeywordDict, einfo: Any) -> None:
        """After a run that failed for good."""

    def on_retry(self, exc: BaseException, task_id: str, args: Any, kwargs: KeywordDict, einfo: Any) -> None:
        """After a run that will be retried."""

    def after_return(self, status: str, retval: Any, task_id: str, args: Any, kwargs: KeywordDict, einfo: Any) -> None:
        """After every run."""

    def shadow_name(self, args: Any, kwargs: KeywordDict, options: Any) -> str | None:
        """Another name for logs and monitors."""
        return None

    # -- calling

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[R]:
        """Publish a call; returns when the broker has confirmed it.

        Raises: TypeError for wrong arguments, before anything is published; PublishError.
        """
        return self.apply_async(args, kwargs)

    async def adelay(self, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[R]:
        """`delay` without blocking the event loop."""
        return await self.aapply_async(args, kwargs)

    def apply_async(
        self, args: Iterable[object] | None = None, kwargs: Keywords | None = None, **options: object
    ) -> AsyncResult[R]:
        """Publish a call with options: task_id, countdown, eta, expires, deadline, queue, exchange, routing_key, priority,
        serializer, compression, headers, link, link_error, time_limit, soft_time_limit, ignore_result, shadow, timeout …

        Raises: TypeError (wrong arguments, unknown option), ValueError (soft limit above the hard one), PublishError.
        """
        arguments, keywords = self._checked(args, kwargs)
        return self.app.publish_call(self.name, arguments, keywords, options, task=self)

    async def aapply_async(
        self, args: Iterable[object] | None = None, kwargs: Keywords | None = None, **options: object
    ) -> AsyncResult[R]:
        """`apply_async` without blocking the event loop."""
        arguments, keywords = self._checked(args, kwargs)
        return await self.app.apublish_call(self.name, arguments, keywords, options, task=self)

    # -- calling when Django's transaction is committed (celery/contrib/django/task.py)

    def delay_on_commit(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """`delay` when the present transaction of Django's is committed: now if there is none, never if it is rolled back.

        Raises: TypeError for wrong arguments, now.
        """
        self.apply_async_on_commit(args, kwargs)

    def apply_async_on_commit(
        self, args: Iterable[object] | None = None, kwargs: Keywords | None = None, **options: object
    ) -> None:
        """`apply_async` when the present transaction of Django's is committed."""
        call = self._call_later(args, kwargs, options)
        plugins().after_commit(call, self.app.outbox)

    async def adelay_on_commit(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """`delay_on_commit` without blocking the event loop."""
        await self.aapply_async_on_commit(args, kwargs)

    async def aapply_async_on_commit(
        self, args: Iterable[object] | None = None, kwargs: Keywords | None = None, **options: object
    ) -> None:
        """`apply_async_on_commit` without blocking the event loop."""
        call = self._call_later(args, kwargs, options)
        await plugins().aafter_commit(call, self.app.outbox)

    def _call_later(
        self, args: Iterable[object] | None, kwargs: Keywords | None, options: Options
    ) -> Callable[[], object]:
        arguments, keywords = self._checked(args, kwargs)
        return lambda: self.apply_async(arguments, keywords, **options)

    def apply(
        self, args: Iterable[object] | None = None, kwargs: Keywords | None = None, **options: object
    ) -> EagerResult[R]:
        """Run it here, as a worker would, and return what came of it."""
        return self.app.run_inline(self, *option_types.arguments(self.name, args, kwargs), options)

    def _checked(self, args: Iterable[object] | None, kwargs: Keywords | None) -> tuple[Arguments, KeywordDict]:
        if type(args) is not tuple or type(kwargs) is not dict:
            args, kwargs = option_types.arguments(self.name, args, kwargs)
        self.check_arguments(args, kwargs)
        return args, kwargs

    def check_arguments(self, args: Arguments, kwargs: KeywordDict) -> None:
        """Raises: TypeError for arguments that the function does not take."""
        if not self.app.is_finalized:
            self.app.finalize()
        check = self._check
        if check is not None:
            try:
                check(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"task {self.name} cannot be called like that: {error}") from None

    # -- signatures

    def s(self, *args: object, **kwargs: object) -> Signature:
        """A signature of this task."""
        return Signature(self.name, args, kwargs, app=self.app)

    def si(self, *args: object, **kwargs: object) -> Signature:
        """An immutable signature: a parent's result is not put in front of its arguments."""
        return Signature(self.name, args, kwargs, immutable=True, app=self.app)

    def signature(self, args: Iterable[Any] | None = None, kwargs: Keywords | None = None, **options: Any) -> Signature:
        """A signature with options. Raises: WrongValue for one that cannot have its value."""
        return Signature(self.name, args, kwargs, of_call(self.name, options), app=self.app)

    subtask = signature

    def chunks(self, it: Iterable[object], n: int) -> Signature:
        """Calls with each tuple of `it` as arguments, `n` of them to a task."""
        return chunks(self.s(), it, n, app=self.app)

    def map(self, it: Iterable[object]) -> Signature:
        """One task that calls this with each item of `it`."""
        return xmap(self.s(), it, app=self.app)

    def starmap(self, it: Iterable[object]) -> Signature:
        """One task that calls this with each tuple of `it` as arguments."""
        return xstarmap(self.s(), it, app=self.app)

    # -- inside a run

    @property
    def request(self) -> Context:
        """The context of the call that runs; an empty one (`called_directly`) when the function was called directly."""
        context = current_context()
        return context if context is not None and context.task == self.name else Context()

    def retry(
        self,
        args: Iterable[object] | None = None,
        kwargs: Keywords | None = None,
        exc: BaseException | type[BaseException] | str | None = None,
        throw: bool = True,
        eta: datetime | None = None,
        countdown: float | None = None,
        max_retries: int | None = None,
        **options: Any,
    ) -> Any:
        """Ask for another run, which the worker publishes when this one has ended: raises Retry (returns it with `throw=False`,
        and this run goes on).

        `countdown` (seconds) or `eta` says when, else `default_retry_delay`. Past `max_retries`, and for a time after the task's
        deadline, the cause `exc` is raised, else MaxRetriesExceededError. Called directly, it raises the cause. `args` and
        `kwargs` take the place of those of this run, also where an argument was given by name and is given by position now, or
        the other way round. `options` are those of `apply_async`. Raises: TypeError, WrongValue for what is none of them.
        """
        request = self.request
        cause = exc if isinstance(exc, BaseException) or _is_exception(exc) else None
        told = None if exc is None or cause is not None else str(exc)
        if request.called_directly:
            raise cause or Retry(told or "Task can be retried", None)
        if options:
            check_names(f"task {self.name}: retry()", options, self)
            options = dict(of_call(self.name, options))
        times = of_call(self.name, {"eta": eta, "countdown": countdown})
        max_retries = of_task(self.name, {"max_retries": max_retries})["max_retries"]
        limit = self.max_retries if max_retries is None else max_retries
        if limit is not None and request.retries >= limit:
            raise cause or MaxRetriesExceededError(
                told or f"Can't retry {self.name}[{request.id}] args:{request.args} kwargs:{request.kwargs}",
                task_args=request.args,
                task_kwargs=request.kwargs,
            )
        countdown = self.default_retry_delay if countdown is None else times["countdown"]
        when: datetime | float = times["eta"] or countdown
        positional, keywords = option_types.arguments(self.name, args, kwargs)
        args, kwargs = positional if args is not None else None, keywords if kwargs is not None else None
        if (args is None) != (kwargs is None):
            args, kwargs = _in_their_place(self.run, request, args, kwargs)
        if request.is_over_at(when):
            raise cause or MaxRetriesExceededError(
                told or f"Can't retry {self.name}[{request.id}]: its deadline is at {request.deadline}"
            )
        changes = {"args": args, "kwargs": kwargs, "options": options}
        verdict = Retry(exc=exc, when=when, is_eager=request.is_eager, sig=changes)
        if throw:
            try:
                raise verdict from cause
            finally:
                del verdict  # or this frame, in its own traceback, keeps all that the task has until a full collection
        if request.is_eager:
            call = request.args if args is None else args, request.kwargs if kwargs is None else kwargs
            self.apply(*call, **{"task_id": request.id, "retries": request.retries + 1, **options})
        else:
            request.ask_for_retry(verdict)
        return verdict

    def is_cancelled(self) -> bool:
        """Whether the run was cancelled (`result.cancel()`), and should end; False outside of a run. It ends as it likes then;
        `raise Terminated` (amqtask.exceptions) has it end as REVOKED. It costs about a microsecond, in every pool."""
        return self.request.is_cancelled()

    def replace(self, sig: Signature) -> Any:
        """Have `sig` go on in place of this task, under its id: `return self.replace(add.s(2, 2))`.

        What waits for this task, and what follows it (callbacks, the rest of its chain, its chord), gets the result of `sig`;
        a group's result is the list of its members'. Raises: Replaced, always, but for a task that runs inline (which gets the
        value); ConfigurationError for a signature that belongs to a chord already.
        """
        if not isinstance(sig, Signature):
            raise ConfigurationError(f"task {self.name} is replaced by a signature, not by {option_types.shown(sig)}")
        if "chord" in sig.options:
            raise ConfigurationError(
                f"task {self.name} cannot be replaced by a signature that belongs to a chord: {sig!r}"
            )
        if isinstance(sig, chain) and not len(sig):
            raise ConfigurationError(f"task {self.name}: Cannot replace with an empty chain")
        if self.request.is_eager:
            if isinstance(sig, group):
                sig = chord(sig, Signature(ACCUMULATE, (), {"index": 0}, app=self.app))
            return sig.apply().get()
        if self.request.called_directly:
            raise ConfigurationError(f"task {self.name} was called as a function, so there is nothing to replace")
        raise Replaced(sig)

    def add_to_chord(self, sig: Signature, lazy: bool = False) -> Any:
        """One more member for the chord that this task is a member of; with `lazy` it is returned instead of published.

        A composition is one member, however many tasks it has: a group's part is the list of its results.
        Raises: ValueError when this task is no member of a chord; PublishError.
        """
        request = self.request
        if not request.chord:
            raise ValueError(f"task {self.name}[{request.id}] is not a member of a chord")
        # The same run again, after a crash, adds the same member: one more that never runs would hold the chord for ever.
        number = request.__dict__["added_to_chord"] = request.__dict__.get("added_to_chord", 0) + 1
        task_id = str(uuid.uuid5(uuid.NAMESPACE_OID, f"{request.id} {request.retries} {number}"))
        membership = {"group_id": request.group, "group_index": request.group_index, "chord": request.chord}
        member = self.app.workflows.as_member(sig, {"task_id": task_id, "root_id": request.root_id, **membership})
        self.app.add_to_chord(request.group, member, task_id=task_id, chord=request.chord)
        return member if lazy else member.apply_async()

    def add_trail(self, result: Any) -> Any:
        """Note a result as a child of this task."""
        if self.trail:
            self.request.children.append(result.as_tuple())
        return result

    def update_state(
        self, task_id: str | None = None, state: str | None = None, meta: object = None, **_: object
    ) -> None:
        """Store a state of the task's own, such as PROGRESS with a dictionary. Raises: BackendNotConfigured."""
        request = self.request
        updated_id = task_id or request.id
        if updated_id is None:
            raise ValueError("update_state() needs a task_id when no task runs")
        self.app.store_state(ResultMessage(updated_id, state or "PENDING", meta), request)

    def send_event(self, type_: str, retry: bool = True, retry_policy: object = None, **fields: Any) -> None:
        """Publish an event of the task's own, such as "task-progress", for monitors. Raises: PublishError.

        `retry` and `retry_policy` are accepted for Celery's sake: the publish has its deadline and retries within it.
        """
        request = self.request
        with self.app.events.default_dispatcher(hostname=request.hostname) as dispatcher:
            dispatcher.send(type_, **{"uuid": request.id, **fields})

    def AsyncResult(self, task_id: str, **kwargs: object) -> AsyncResult[R]:
        """The result of an earlier call."""
        return self.app.AsyncResult(task_id, task_name=self.name)

    @property
    def backend(self) -> Any:
        """The app's result backend."""
        return self.app.backend

    # -- made by the app

    def check_options(self) -> None:
        """Convert the options of the class to the form that is used. Raises: WrongValue."""
        task_class = type(self)
        options = {
            name: getattr(task_class, name) for name in TASK if getattr(task_class, name) is not getattr(Task, name)
        }
        plain = {name: value for name, value in options.items() if not hasattr(type(value), "__get__")}
        for name, value in of_task(self.name, plain).items():
            if value is not plain[name]:
                setattr(task_class, name, value)
        retry_options = {name: None for name in self.retry_kwargs or () if name not in _OF_RETRY}
        try:
            check_names(f"task {self.name}: retry_kwargs", retry_options, self)
        except TypeError as error:
            raise WrongValue(str(error)) from None

    def bind(self, app: Application) -> None:
        """Bind the task to an app: take its settings where an option is None, note which hooks are overridden."""
        self.app = app
        conf = app.conf
        annotations = of_task(self.name, _annotations(conf.task_annotations, self.name))
        for attribute in annotations.keys() - FROM_SETTINGS.keys():
            setattr(self, attribute, annotations[attribute])
        for attribute, setting in FROM_SETTINGS.items():
            # The class has the option as it was written; an earlier binding left its value on the instance.
            value = annotations.get(attribute, getattr(type(self), attribute))
            if value is None:
                value = conf[setting]
            setattr(self, attribute, value)
        on_both = self.acks_on_failure_or_timeout
        for attribute in ("acks_on_failure", "acks_on_timeout"):
            values = (
                getattr(type(self), attribute),
                conf[f"task_{attribute}"],
                on_both,
                conf.task_acks_on_failure_or_timeout,
            )
            setattr(self, attribute, bool(next((value for value in values if value is not None), False)))
        self.retry_backoff = 1.0 if self.retry_backoff is True else float(self.retry_backoff or 0)
        check_batch(self)
        is_told = not is_private(self.serializer)
        self.flow_plan = plan_of(self.name, self.run, self.unique, self.limits, self.breaker, tells_keys=is_told)
        # A function, which is an attribute of the class here, would be bound to the task.
        self.fair_plan = fair_plan_of(self.name, self.run, getattr(self.fair_by, "__func__", self.fair_by))
        self.is_async = inspect.iscoroutinefunction(self.run)
        task_class = type(self)
        base_classes = (Task, AsyncTask)
        self.overridden_hooks = frozenset(
            name for name in HOOKS if all(getattr(task_class, name) is not getattr(base, name) for base in base_classes)
        )
        typed = app.strict_typing if self.typing is None else self.typing
        # The function of a batch task takes a list of calls, whatever their arguments are.
        self._check = argument_check(self.run) if typed and self.batch is None else None

    def __repr__(self) -> str:
        return f"<@task: {self.name}>"

    def __reduce__(self) -> tuple[object, ...]:
        return _by_name, (self.name,)


class AsyncTask(Task[P, R]):
    """A task whose function is `async def`: calling it gives a coroutine, its result is what that returns."""

    abstract = True

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> CoroutineOf[R]:  # type: ignore[override]
        """The coroutine, for `await`."""
        coroutine: CoroutineOf[R] = self.run(*args, **kwargs)
        return coroutine


def check_names(subject: str, options: Options, task: object) -> None:
    """Stamps are keyword arguments of their own, and a task's own options may be said otherwise for a call (libraries read them
    before); everything else unknown is a mistake. Raises: TypeError."""
    stamps = frozenset(options.get("stamped_headers") or ())
    unknown = sorted(
        option for option in options.keys() - CALL_NAMES - stamps if hasattr(Task, option) or not hasattr(task, option)
    )
    if unknown:
        raise TypeError(f"{subject} has no option {', '.join(map(repr, unknown))}")


def _is_exception(value: object) -> TypeGuard[type[BaseException]]:
    return isinstance(value, type) and issubclass(value, BaseException)


def _in_their_place(
    function: Callable[..., object], request: Context, args: Iterable[object] | None, kwargs: Keywords | None
) -> tuple[Iterable[object], Mapping[str, object]]:
    """New positional arguments with the old keyword arguments that they do not replace, or the reverse."""
    try:
        parameters = [*inspect.signature(function).parameters.values()]
    except (TypeError, ValueError):
        parameters = []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [each.name if each.kind is kinds[1] else None for each in parameters if each.kind in kinds]
    if args is not None:
        positional = tuple(args)
        replaced = names[: len(positional)]
        return positional, {name: value for name, value in (request.kwargs or {}).items() if name not in replaced}
    keywords, values = dict(kwargs or {}), list(request.args or ())
    for position, name in enumerate(names[: len(values)]):
        if name is not None and name in keywords:
            values[position] = keywords.pop(name)
    return tuple(values), keywords


def argument_check(function: Callable[..., object]) -> Callable[..., Any] | None:
    """Raises TypeError for arguments that `function` does not take; None where that cannot be known."""
    try:
        return inspect.signature(function).bind
    except (TypeError, ValueError):
        return None


def _annotations(annotations: object, name: str) -> dict[str, Any]:
    """The setting task_annotations for one task: what stands under `*`, then what stands under its name."""
    tables = annotations if isinstance(annotations, (list, tuple)) else [annotations]
    merged: dict[str, object] = {}
    for table in tables:
        if isinstance(table, Mapping):
            merged.update(table.get("*") or {})
            merged.update(table.get(name) or {})
    return merged


class CurrentTask:
    """The task that runs here: `current_task.request.id`, `current_task.update_state(…)`; false where none runs."""

    def __bool__(self) -> bool:
        return current_context() is not None

    def __getattr__(self, name: str) -> Any:
        context = current_context()
        if context is None or context.task is None or name.startswith("__"):
            raise AttributeError(f"no task runs here, so current_task has no {name!r}")
        return getattr(current_app().tasks[context.task], name)

    def __repr__(self) -> str:
        context = current_context()
        return f"<current_task: {context.task if context is not None else None}>"


current_task = CurrentTask()


def _by_name(name: str) -> object:
    return current_app().tasks[name]


if TYPE_CHECKING:
    # A task as the application's table has it, whatever it takes and returns.
    RegisteredTask = Task[..., Any]
