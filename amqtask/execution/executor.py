"""Runs one request and returns one Outcome: received → find task → decode → bind context → run → classify → encode.

The same code in every pool, inline (`task.apply`) and in tests. Its only I/O is storing results in stores that the slot writes
to (Redis). Messages to publish afterwards leave it in the Outcome.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Coroutine, Mapping
from contextvars import copy_context
from time import perf_counter
from types import CoroutineType
from typing import TYPE_CHECKING, Any

from amqtask import signals, states
from amqtask.exceptions import (
    BackendUnreachable,
    ChordError,
    Ignore,
    MessageError,
    Reject,
    Replaced,
    Retry,
    SoftTimeLimitExceeded,
    Terminated,
)
from amqtask.execution.batches import in_batches
from amqtask.execution.chain_steps import OFF, Resuming
from amqtask.execution.context import AT_END, Context, current
from amqtask.execution.coroutines import CoroutineRunner
from amqtask.execution.follow_ups import NOTHING, FollowUpComposer, FollowUps
from amqtask.execution.inbox import in_inbox
from amqtask.execution.no_run import DEFAULT, INTERRUPTED_SECONDS, Bounds, Endings, not_stored, requeued
from amqtask.execution.request import (
    HIDDEN,
    Abandoned,
    Answer,
    ErrorInfo,
    Outcome,
    frames_of,
    of_success,
    without_values,
)
from amqtask.execution.results import Results, is_wanted, keeps_runs
from amqtask.execution.task_plan import (
    TaskPlan,
    Wrapper,
    plan_for,
    tell,
    tell_failure,
    tell_postrun,
    tell_retry,
    tell_start,
    tell_success,
)
from amqtask.ground.loop import exponential_backoff
from amqtask.ground.printable import bounded_logger
from amqtask.ground.processes import FORKS, count_forks, end_forked
from amqtask.protocol.chord import CHORD_HEADER, read_mark
from amqtask.protocol.serialization import LARGEST_BODY, is_private
from amqtask.protocol.task import NO_FOLLOW_UPS, saferepr

if TYPE_CHECKING:
    from amqtask.execution.chain_steps import Flag, SlotSteps
    from amqtask.execution.contract import ChordStore, Composer, ResultStore, TaskLike
    from amqtask.execution.inbox import InboxRuns
    from amqtask.execution.request import Request


logger = bounded_logger("amqtask.execution")
RunCoroutine = Callable[[Coroutine[Any, Any, Any]], Any]
RunBlocking = Callable[..., Coroutine[Any, Any, Any]]


# -- automatic retries (Celery's autoretry_for and retry_backoff)


def wants_retry(task: TaskLike, error: BaseException) -> bool:
    """Whether the task's `autoretry_for` asks for another run after this error."""
    if not task.autoretry_for or isinstance(error, (Retry, Ignore, Reject)):
        return False
    return isinstance(error, task.autoretry_for) and not isinstance(error, task.dont_autoretry_for or ())


def retry_options(task: TaskLike, retries: int) -> dict[str, object]:
    """The keyword arguments for `task.retry`."""
    options: dict[str, object] = dict(task.retry_kwargs or {})
    if task.retry_backoff:
        options["countdown"] = exponential_backoff(
            retries, factor=float(task.retry_backoff), maximum=task.retry_backoff_max, full_jitter=task.retry_jitter
        )
    return options


# -- one request


class Executor(Endings):
    """Runs requests of registered tasks. One per process; threads, greenlets and coroutines share it.

    `run_coroutine` runs an `async def` task to its end for a slot without an event loop; a pool may set its own.
    """

    def __init__(
        self,
        tasks: Mapping[str, TaskLike],
        *,
        accept: frozenset[str],
        composer: Composer,
        store: ResultStore | None = None,
        hostname: str = "",
        chord_store: ChordStore | None = None,
        serializer: str = "json",
        verbose: Flag = OFF,
        extended: bool = False,
        wrapper: Wrapper | None = None,
        largest_body: int = LARGEST_BODY,
        bounds: Bounds = DEFAULT,
        inbox: InboxRuns | None = None,
    ) -> None:
        results = (
            Results(store, hostname=hostname, extended=extended, serializer=serializer) if store is not None else None
        )
        self.tasks = tasks
        self.hostname = hostname
        self.accept = accept
        self.follow_ups = FollowUpComposer(
            tasks, composer, results=results, chord_store=chord_store, serializer=serializer
        )
        self._results = results
        self._largest_body = largest_body
        self._bounds = bounds
        count_forks()
        self._chord_store = chord_store
        self._resuming = Resuming(store, composer) if store is not None and keeps_runs(store) else None
        self.run_coroutine: RunCoroutine = CoroutineRunner()
        # For slots that are processes; the worker's assembly sets it.
        self.steps: SlotSteps | None = None
        # Numbers of requests that are asked to end; the same sets it.
        self.stops: Container[int] = ()
        self._composer = composer
        # A store in AMQP, or in this process, does not block.
        self._store_blocks = store is not None and store.blocks
        # Whether outcomes have a repr of the return value; may be changed at any time.
        self._verbose = verbose
        self._wrapper = wrapper
        self._inbox = inbox
        self._plans: dict[str, TaskPlan] = {}

    @property
    def resumes_chains(self) -> bool:
        """Whether a lost worker's chain can be resumed from the result store, so that steps may run without the broker."""
        return self._resuming is not None

    def is_async(self, name: str) -> bool:
        """Whether requests of this task should be run with `aexecute`."""
        try:
            return (self._plans.get(name) or self._plan(name)).is_async
        except MessageError:
            return False

    # -- the pipeline

    def execute(self, request: Request) -> Outcome:
        """Run a request to its end. Never raises: every error becomes an outcome. Context variables that the task sets end with
        it."""
        try:
            return copy_context().run(self.execute_here, request)
        except BaseException as error:  # noqa: BLE001 - a limit that struck where nothing else takes it: the message stays
            logger.warning("task %s[%s] was interrupted before or after its run: %r", request.task, request.id, error)
            return self._interrupted(request, error)

    def _interrupted(self, request: Request, error: BaseException) -> Outcome:
        """The outcome of a request that was ended where its task did not run. Never raises."""
        if isinstance(error, Terminated) and not isinstance(error, Abandoned):
            return self.ended_by_pool(request, error, in_slot=True)
        reason = f"it was interrupted before it ran: {error!r}"
        return requeued(request, reason)._replace(pause=INTERRUPTED_SECONDS)

    def execute_here(self, request: Request) -> Outcome:
        """`execute` in the present context, where variables that the task sets stay."""
        started = perf_counter()
        try:
            plan = self._plans.get(request.task) or self._plan(request.task)
            args, kwargs, embed = request.decoded or self._decode(request, self._largest_body)
        except Exception as error:  # noqa: BLE001 - mostly a MessageError, but never the end of the slot
            return self.refused(request, error, in_slot=True)
        context = Context.of(request, args, kwargs, embed, self.hostname)
        context._stops = self.stops
        current.set(context)
        forks = FORKS[0]
        try:
            try:
                if request.redelivered and (resumed := self._resumed(request, context)) is not None:
                    return resumed
                if plan.track_started:
                    self._mark_started(plan, request)
                if plan.hooks or signals.task_prerun.connected:
                    tell_start(plan, request, context)
                value = plan.call(*args, **kwargs)
                if plan.is_async or value.__class__ is CoroutineType:
                    value = self.run_coroutine(value)
            except BaseException as error:  # noqa: BLE001 - the border to user code; every kind is classified
                if FORKS[0] != forks:
                    end_forked(error)
                return self._raised(plan, request, context, error, started)
            if FORKS[0] != forks:
                end_forked(None)
            return self._returned(plan, request, context, value, started)
        except BaseException as error:  # noqa: BLE001 - a limit that came late, or a bug of ours or of the store
            return self._late(plan, request, context, error, started)
        finally:
            for call in AT_END:
                call()

    def rest(self) -> None:
        """For a thread that calls `execute`: it has no request now, so it keeps nothing for the next one. A pool whose threads
        call this before each time that they wait has limits that cost less."""

    async def aexecute(self, request: Request, run_blocking: RunBlocking) -> Outcome:
        """Like `execute`, on an event loop, for tasks for which `is_async` is true.

        `run_blocking(function, *arguments)` calls a function in a thread: a result store that blocks must not hold up
        the loop.
        """
        started = perf_counter()
        try:
            plan = self._plans.get(request.task) or self._plan(request.task)
            args, kwargs, embed = request.decoded or self._decode(request, self._largest_body)
        except Exception as error:  # noqa: BLE001 - see execute
            return self.refused(request, error, in_slot=True)
        context = Context.of(request, args, kwargs, embed, self.hostname)
        context._stops = self.stops
        token = current.set(context)
        forks = FORKS[0]
        try:
            try:
                if request.redelivered and self._resuming is not None:
                    resumed: Outcome | None = await run_blocking(self._resumed, request, context)
                    if resumed is not None:
                        return resumed
                if plan.track_started:
                    if self._store_blocks:
                        await run_blocking(self._mark_started, plan, request)
                    else:
                        self._mark_started(plan, request)
                if plan.hooks or signals.task_prerun.connected:
                    tell_start(plan, request, context)
                value = plan.call(*args, **kwargs)
                if plan.is_async or value.__class__ is CoroutineType:
                    value = await value
            except BaseException as error:  # noqa: BLE001 - see execute
                if FORKS[0] != forks:
                    end_forked(error)
                if self._store_blocks:
                    return await self._elsewhere(run_blocking, self._raised, plan, request, context, error, started)
                return self._raised(plan, request, context, error, started)
            if FORKS[0] != forks:
                end_forked(None)
            if self._store_blocks and (is_wanted(plan, request) or any(embed.values())):
                return await self._elsewhere(run_blocking, self._returned, plan, request, context, value, started)
            return self._returned(plan, request, context, value, started)
        except BaseException as error:  # noqa: BLE001 - see execute
            return self._late(plan, request, context, error, started)
        finally:
            for call in AT_END:
                call()
            current.reset(token)

    async def _elsewhere(self, run_blocking: RunBlocking, *arguments: object) -> Outcome:
        outcome: Outcome = await run_blocking(self._settled, *arguments)
        return outcome

    def _settled(
        self,
        end: Callable[..., Outcome],
        plan: TaskPlan,
        request: Request,
        context: Context,
        result_or_error: object,
        started: float,
    ) -> Outcome:
        """`_returned` or `_raised` in another thread, which must get an outcome."""
        try:
            return end(plan, request, context, result_or_error, started)
        except BaseException as error:  # noqa: BLE001 - see execute
            return self._late(plan, request, context, error, started)

    def _plan(self, name: str) -> TaskPlan:
        plan = plan_for(self.tasks, name, has_store=self._results is not None, wrapper=self._wrapper)
        if plan.task.inbox:
            in_inbox(plan, self._inbox)
        elif plan.task.batch is not None:
            in_batches(plan)
        self._plans[name] = plan
        return plan

    def _resumed(self, request: Request, context: Context) -> Outcome | None:
        """The outcome of a redelivery whose task, and perhaps later steps, were run by a worker that was lost then."""
        if self._resuming is None:
            return None
        started = perf_counter()
        try:
            messages = self._resuming.messages(request, context)
        except BackendUnreachable as error:
            return not_stored(request, error, perf_counter() - started)
        if messages is None:
            return None
        if CHORD_HEADER in request.headers:
            self._end_chord(request)
        return Outcome(request.number, states.IGNORED, publish=messages, runtime=perf_counter() - started)

    def _mark_started(self, plan: TaskPlan, request: Request) -> None:
        if self._results is not None and is_wanted(plan, request):
            self._results.started(request)

    # -- ends of a run

    def _returned(self, plan: TaskPlan, request: Request, context: Context, value: object, started: float) -> Outcome:
        runtime = perf_counter() - started
        embed, result, after, is_step = context.embed, None, NOTHING, False
        try:
            if embed is not NO_FOLLOW_UPS and (embed.get("callbacks") or embed.get("chain") or embed.get("chord")):
                after = self.follow_ups.of_success(context, value)
            if context.asked_retries:
                after += self._asked_retries(request, context)
            if self._results is not None and is_wanted(plan, request):
                result = self._results.success(request, context, value)
                is_step = (
                    after is not NOTHING
                    and self._resuming is not None
                    and self._resuming.covers(request, context, after)
                )
        except BackendUnreachable as error:
            return not_stored(request, error, runtime)
        except Exception as error:  # noqa: BLE001 - the value or a follow-up cannot be encoded: the task failed
            return self._failed(plan, request, context, error, runtime)
        if CHORD_HEADER in request.headers:
            self._end_chord(request)
        if plan.hooks or signals.task_success.connected or signals.task_postrun.connected:
            tell(tell_success, plan, request, context, value, runtime)
        summary = "" if not self._verbose[0] else HIDDEN if is_private(request.content_type) else saferepr(value)
        if after is NOTHING:
            return of_success(request.number, runtime, summary, result=result)
        return of_success(
            request.number, runtime, summary, publish=after.publish, result=result, parts=after.parts, is_step=is_step
        )

    def _raised(
        self, plan: TaskPlan, request: Request, context: Context, error: BaseException, started: float
    ) -> Outcome:
        runtime = perf_counter() - started
        if isinstance(error, Exception) and wants_retry(plan.task, error):
            error = _ask_for_retry(plan.task, context, error)
        outcome = self._classify(plan, request, context, error, runtime)
        if signals.task_postrun and not isinstance(error, Abandoned):
            tell(tell_postrun, plan, request, context, outcome.state, error)
        return outcome

    def _classify(
        self, plan: TaskPlan, request: Request, context: Context, error: BaseException, runtime: float
    ) -> Outcome:
        match error:
            case Retry():
                return self._retried(plan, request, context, error, runtime)
            case Replaced():
                return self._replaced(plan, request, context, error, runtime)
            case Ignore() if context.chord:
                # Without a result the chord would wait for ever.
                failed = self._failed(plan, request, context, _no_result(request), runtime, hooks=False)
                return failed._replace(state=states.IGNORED, answer=Answer.ACK)
            case Ignore():
                return Outcome(request.number, states.IGNORED, runtime=runtime)
            case Reject(requeue=True):
                return requeued(request, _rejection(request, error), runtime)
            case Reject():
                reason = _rejection(request, error)
                failed = self._failed(plan, request, context, error, runtime, hooks=False)
                return failed._replace(answer=Answer.DEAD_LETTER, reason=reason, state=states.REJECTED)
            case Abandoned():
                return requeued(request, str(error), runtime)
            case Terminated():
                return self.ended_by_pool(request, error, in_slot=True)._replace(runtime=runtime)
            case _:
                return self._failed(plan, request, context, error, runtime)

    def _late(
        self, plan: TaskPlan, request: Request, context: Context, error: BaseException, started: float
    ) -> Outcome:
        """An error after the task itself had ended: a time limit or termination in the last moment, or a bug."""
        try:
            if isinstance(error, (SoftTimeLimitExceeded, Terminated)):
                return self._classify(plan, request, context, error, perf_counter() - started)
        except BaseException as second:  # noqa: BLE001 - this is the last catch; below it only data is put together
            error = second
        told = f"internal error: {type(error).__name__}"
        try:
            is_hidden = is_private(request.content_type)
            said, cause = (told, None) if is_hidden else (f"internal error: {saferepr(error, 500)}", error)
            logger.error(
                "internal error after task %s[%s]: %s", request.task, request.id, cause or told, exc_info=cause
            )
            if signals.task_internal_error:
                signals.task_internal_error.send(
                    sender=plan.task, task_id=request.id, args=context.args, kwargs=context.kwargs, request=context,
                    exception=error, traceback=error.__traceback__, einfo=ErrorInfo(error),
                )  # fmt: skip
            told = said
        except BaseException as third:  # noqa: BLE001 - an exception of the user's that breaks whoever looks at it
            logger.error("internal error after task %s[%s]: %s", request.task, request.id, type(third).__name__)
        return self.refused(request, RuntimeError(told), in_slot=True)

    def _retried(self, plan: TaskPlan, request: Request, context: Context, retry: Retry, runtime: float) -> Outcome:
        # Somebody may raise a Retry of his own.
        when = plan.task.default_retry_delay if retry.when is None else retry.when
        try:
            message = self._composer.compose_retry(request, context, when=when, sig=retry.sig)
        except Exception as error:  # noqa: BLE001 - the retry's own arguments cannot be encoded
            return self._failed(plan, request, context, error, runtime)
        cause = retry.exc or retry
        info = ErrorInfo(cause)
        result = None
        if self._results is not None and is_wanted(plan, request):
            result = self._results.retry(request, context, cause, info.traceback)
        tell(tell_retry, plan, request, context, retry, info)
        outcome = Outcome(
            request.number,
            states.RETRY,
            reason=saferepr(cause) if self._verbose[0] else "",
            publish=(message,),
            result=result,
            runtime=runtime,
            summary=str(retry),
            traceback=info.traceback if self._verbose[0] else "",
        )
        return _shown(request, outcome, cause)

    def _failed(
        self,
        plan: TaskPlan,
        request: Request,
        context: Context,
        error: BaseException,
        runtime: float,
        *,
        hooks: bool = True,
    ) -> Outcome:
        """FAILURE: store it, compose errbacks, call hooks. `hooks` is False when the task itself raised Reject."""
        task, info, result = plan.task, ErrorInfo(error), None
        try:
            if self._results is not None and (is_wanted(plan, request) or task.store_errors_even_if_ignored):
                result = self._results.failure(request, context, error, info.traceback)
            after = self.follow_ups.of_failure(context, error, info.traceback)
            if context.asked_retries:
                after += self._asked_retries(request, context)
        except BackendUnreachable as unreachable:
            return not_stored(request, unreachable, runtime)
        if CHORD_HEADER in request.headers:
            self._end_chord(request)
        if hooks:
            tell(tell_failure, plan, request, context, error, info)
        summary = saferepr(error, 500)
        is_acked = task.acks_on_failure or not task.acks_late
        outcome = Outcome(
            request.number,
            states.FAILURE,
            Answer.ACK if is_acked else Answer.DEAD_LETTER,
            "" if is_acked else f"the task failed: {summary}",
            after.publish,
            result,
            runtime,
            summary,
            info.traceback,
            isinstance(error, tuple(task.throws or ())),
            parts=after.parts,
        )
        return _shown(request, outcome, error)

    def _asked_retries(self, request: Request, context: Context) -> FollowUps:
        """The messages of `retry(throw=False)`; removed from the context, so that one that cannot be encoded fails the task
        once."""
        retries, context.asked_retries = context.asked_retries, ()
        return FollowUps(
            tuple(self._composer.compose_retry(request, context, when=retry.when, sig=retry.sig) for retry in retries)
        )

    def _replaced(
        self, plan: TaskPlan, request: Request, context: Context, replaced: Replaced, runtime: float
    ) -> Outcome:
        """Another signature replaces the task under its id; it is published before this message is answered."""
        try:
            messages = self._composer.compose_replacement(replaced.sig, context)
        except BackendUnreachable as error:
            return not_stored(request, error, runtime)
        except Exception as error:  # noqa: BLE001 - the replacement cannot be composed or encoded
            return self._failed(plan, request, context, error, runtime)
        return Outcome(request.number, states.IGNORED, publish=tuple(messages), runtime=runtime)

    def _end_chord(self, request: Request) -> None:
        """If this was a chord's body, delete the chord's parts."""
        mark = request.headers[CHORD_HEADER]
        if self._chord_store is None or not mark:
            return
        group_id, body_id = read_mark(mark)
        try:
            self._chord_store.end_chord(group_id, body_id)
        except BackendUnreachable as error:
            logger.warning("the parts of chord %s stay until they expire: %s", group_id, error)


def _shown(request: Request, outcome: Outcome, error: BaseException) -> Outcome:
    """The outcome as logs, events and dead letters may tell it."""
    return without_values(outcome, error, frames_of(error)) if is_private(request.content_type) else outcome


def _rejection(request: Request, error: Reject) -> str:
    return f"rejected by the task: {HIDDEN if is_private(request.content_type) else error.reason}"


def _no_result(request: Request) -> ChordError:
    return ChordError(f"task {request.task}[{request.id}] was ignored, so it has no result for the chord it belongs to")


def _ask_for_retry(task: TaskLike, context: Context, error: Exception) -> BaseException:
    """The exception of `task.retry`: Retry, or the error itself once the retries are used up."""
    try:
        task.retry(exc=error, **retry_options(task, context.retries))
    except Exception as verdict:  # noqa: BLE001 - that is how retry answers
        return verdict
    return error
