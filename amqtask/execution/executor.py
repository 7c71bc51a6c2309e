"""Runs one request and returns one Outcome: received → find task → decode → bind context → run → classify → encode.

The same code in every pool, inline (`task.apply`) and in tests. It does no I/O of its own but storing results in stores that
want it from the slot (Redis). What has to be published afterwards leaves it as messages in the Outcome.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import os
import traceback as tracebacks
from collections.abc import Callable, Coroutine, Mapping
from time import perf_counter
from typing import TYPE_CHECKING, Any

from amqtask import signals, states
from amqtask.exceptions import (
    BackendUnreachable,
    EncodeError,
    Ignore,
    MessageError,
    NotRegistered,
    Reject,
    Retry,
    TaskRevokedError,
    Terminated,
    TimeLimitExceeded,
    WorkerLostError,
)
from amqtask.execution.context import Context, current
from amqtask.execution.coroutines import CoroutineRunner
from amqtask.execution.outcome import Answer, Outcome
from amqtask.execution.retries import retry_options, wants_retry
from amqtask.protocol.result import ResultMessage, exception_as_dict, now_iso
from amqtask.protocol.task import decode_body, saferepr

if TYPE_CHECKING:
    from amqtask.execution.contract import Composer, ResultStore, TaskLike
    from amqtask.execution.request import Request
    from amqtask.message import Message

logger = logging.getLogger("amqtask.execution")
RunCoroutine = Callable[[Coroutine[Any, Any, Any]], Any]


class ErrorInfo:
    """What hooks and signals get as `einfo`: the exception and its traceback as text."""

    __slots__ = ("exception", "traceback", "type")

    def __init__(self, error: BaseException) -> None:
        self.type = type(error)
        self.exception = error
        self.traceback = "".join(tracebacks.format_exception(type(error), error, error.__traceback__))

    def __str__(self) -> str:
        return self.traceback


class _Plan:
    """What is looked up for a task once."""

    __slots__ = ("call", "hooks", "is_async", "task", "track_started", "wants_result")

    def __init__(self, task: TaskLike, has_store: bool) -> None:
        self.task = task
        # A class that overrides __call__ gets its say; for all others `run` is called directly.
        overrides_call = "__call__" in getattr(task, "overridden_hooks", ())
        self.call: Callable[..., Any] = task.__call__ if overrides_call else task.run
        self.hooks = frozenset(task.overridden_hooks)
        self.is_async = task.is_async
        self.track_started = task.track_started and has_store
        self.wants_result = has_store and not task.ignore_result


class Executor:
    """Runs requests of registered tasks. One per process; threads may share it if each sets no `run_coroutine`."""

    def __init__(
        self,
        tasks: Mapping[str, TaskLike],
        *,
        accept: frozenset[str],
        composer: Composer,
        store: ResultStore | None = None,
        hostname: str = "",
        verbose: bool = False,
        extended: bool = False,
    ) -> None:
        self.tasks = tasks
        self.hostname = hostname
        self.run_coroutine: RunCoroutine = CoroutineRunner()
        self._accept = accept
        self._composer = composer
        self._store = store
        self._verbose = verbose
        self._extended = extended
        self._plans: dict[str, _Plan] = {}

    # -- the pipeline

    def execute(self, request: Request) -> Outcome:
        """Run a request to its end; never raises but for what ends the whole process."""
        started = perf_counter()
        try:
            plan = self._plans.get(request.task) or self._plan(request.task)
            args, kwargs, embed = request.decoded or self._decode(request)
        except MessageError as error:
            return self.refused(request, error)
        context = Context.of(request, args, kwargs, embed, self.hostname)
        token = current.set(context)
        try:
            try:
                self._before(plan, request, context)
                value = plan.call(*args, **kwargs)
                if plan.is_async:
                    value = self.run_coroutine(value)
            except BaseException as error:  # noqa: BLE001 - the border to user code; every kind is classified
                return self._raised(plan, request, context, error, started)
            return self._returned(plan, request, context, value, started)
        finally:
            current.reset(token)

    async def aexecute(self, request: Request, run_sync: Callable[..., Coroutine[Any, Any, Any]]) -> Outcome:
        """The same for an event loop; `run_sync(function, *args)` runs a plain function elsewhere."""
        try:
            plan = self._plans.get(request.task) or self._plan(request.task)
        except MessageError as error:
            return self.refused(request, error)
        if not plan.is_async:
            found: Outcome = await run_sync(self.execute, request)
            return found
        started = perf_counter()
        try:
            args, kwargs, embed = request.decoded or self._decode(request)
        except MessageError as error:
            return self.refused(request, error)
        context = Context.of(request, args, kwargs, embed, self.hostname)
        token = current.set(context)
        try:
            try:
                self._before(plan, request, context)
                value = await plan.call(*args, **kwargs)
            except BaseException as error:  # noqa: BLE001 - see execute
                return self._raised(plan, request, context, error, started)
            return self._returned(plan, request, context, value, started)
        finally:
            current.reset(token)

    def _plan(self, name: str) -> _Plan:
        task = self.tasks.get(name)
        if task is None:
            near = difflib.get_close_matches(name, self.tasks, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise NotRegistered(
                f"no task {name!r} is registered in this worker.{hint} Is the module that defines it imported "
                "(include, autodiscover_tasks)?"
            )
        plan = self._plans[name] = _Plan(task, self._store is not None)
        return plan

    def _decode(self, request: Request) -> tuple[Any, Any, dict[str, Any]]:
        return decode_body(request.body, request.content_type, request.content_encoding, request.headers, self._accept)

    def _before(self, plan: _Plan, request: Request, context: Context) -> None:
        if plan.track_started and self._wants_result(plan, request):
            started = ResultMessage(request.id, states.STARTED, {"pid": os.getpid(), "hostname": self.hostname})
            self._store_early(request, started)
        if signals.task_prerun:
            signals.task_prerun.send(
                sender=plan.task, task_id=request.id, task=plan.task, args=context.args, kwargs=context.kwargs
            )
        if "before_start" in plan.hooks:
            plan.task.before_start(request.id, context.args, context.kwargs)

    # -- how it ended

    def _returned(self, plan: _Plan, request: Request, context: Context, value: Any, started: float) -> Outcome:
        runtime = perf_counter() - started
        embed = context.embed
        try:
            publish = self._follow_ups(context, embed, value) if embed.get("callbacks") or embed.get("chain") else ()
            result = None
            if self._wants_result(plan, request):
                result = self._keep(request, self._message(request, states.SUCCESS, value, context))
        except BackendUnreachable as error:
            return self._not_stored(request, error, runtime)
        except Exception as error:  # noqa: BLE001 - the value or a follow-up cannot be encoded: the task failed
            return self._failed(plan, request, context, error, runtime)
        if "on_success" in plan.hooks:
            self._hook(plan.task.on_success, value, request.id, context.args, context.kwargs)
        if signals.task_success:
            signals.task_success.send(sender=plan.task, result=value, runtime=runtime)
        self._after(plan, request, context, states.SUCCESS, value, None)
        summary = saferepr(value) if self._verbose else ""
        return Outcome(request.number, publish=publish, result=result, runtime=runtime, summary=summary)

    def _raised(self, plan: _Plan, request: Request, context: Context, error: BaseException, started: float) -> Outcome:
        runtime = perf_counter() - started
        task = plan.task
        if isinstance(error, Exception) and wants_retry(task, error):
            error = self._autoretry(task, context, error)
        match error:
            case Retry():
                return self._retried(plan, request, context, error, runtime)
            case Ignore():
                self._after(plan, request, context, states.IGNORED, None, None)
                return Outcome(request.number, states.IGNORED, runtime=runtime)
            case Reject(requeue=True):
                reason = f"rejected by the task: {error.reason}"
                return Outcome(request.number, states.REJECTED, Answer.REQUEUE, reason, runtime=runtime)
            case Reject():
                reason = f"rejected by the task: {error.reason}"
                failed = self._failed(plan, request, context, error, runtime, hooks=False)
                return failed._replace(answer=Answer.DEAD_LETTER, reason=reason, state=states.REJECTED)
            case Terminated():
                return self.revoked(request, str(error) or "terminated")
            case _:
                return self._failed(plan, request, context, error, runtime)

    def _autoretry(self, task: TaskLike, context: Context, error: Exception) -> BaseException:
        """What `task.retry` raises: Retry, or the error itself once the retries are used up."""
        try:
            task.retry(exc=error, **retry_options(task, context.retries))
        except Exception as verdict:  # noqa: BLE001 - that is how retry answers
            return verdict
        return error

    def _retried(self, plan: _Plan, request: Request, context: Context, retry: Retry, runtime: float) -> Outcome:
        try:
            message = self._composer.compose_retry(request, context, when=retry.when, sig=retry.sig)
        except Exception as error:  # noqa: BLE001 - the retry's own arguments cannot be encoded
            return self._failed(plan, request, context, error, runtime)
        cause = retry.exc or retry
        info = ErrorInfo(cause)
        result = None
        if self._wants_result(plan, request):
            meta = self._message(request, states.RETRY, exception_as_dict(cause), context, info.traceback)
            try:
                result = self._keep(request, meta)
            except BackendUnreachable as error:
                logger.warning("RETRY of task %s[%s] was not stored: %s", request.task, request.id, error)
        if "on_retry" in plan.hooks:
            self._hook(plan.task.on_retry, cause, request.id, context.args, context.kwargs, info)
        if signals.task_retry:
            signals.task_retry.send(sender=plan.task, request=context, reason=retry, einfo=info)
        self._after(plan, request, context, states.RETRY, retry, info)
        return Outcome(
            request.number, states.RETRY, publish=(message,), result=result, runtime=runtime, summary=str(retry)
        )

    def _failed(
        self,
        plan: _Plan,
        request: Request,
        context: Context,
        error: BaseException,
        runtime: float,
        *,
        hooks: bool = True,
    ) -> Outcome:
        task = plan.task
        info = ErrorInfo(error)
        publish = self._error_callbacks(context, error, info)
        try:
            result = self._keep_failure(plan, request, context, error, info)
        except BackendUnreachable as unreachable:
            return self._not_stored(request, unreachable, runtime)
        if hooks:
            if "on_failure" in plan.hooks:
                self._hook(task.on_failure, error, request.id, context.args, context.kwargs, info)
            if signals.task_failure:
                signals.task_failure.send(
                    sender=task, task_id=request.id, exception=error, args=context.args, kwargs=context.kwargs,
                    traceback=error.__traceback__, einfo=info,
                )  # fmt: skip
            self._after(plan, request, context, states.FAILURE, error, info)
        acked = task.acks_on_failure or not task.acks_late
        return Outcome(
            request.number,
            states.FAILURE,
            Answer.ACK if acked else Answer.DEAD_LETTER,
            "" if acked else f"the task failed: {saferepr(error, 200)}",
            publish,
            result,
            runtime,
            saferepr(error, 500),
            info.traceback,
            isinstance(error, task.throws or ()),
        )

    def _not_stored(self, request: Request, error: BackendUnreachable, runtime: float) -> Outcome:
        """The result is not kept anywhere: the message goes back, and the task runs again."""
        return Outcome(
            request.number, states.REJECTED, Answer.REQUEUE, f"its result could not be stored: {error}", runtime=runtime
        )

    # -- ends that no slot comes to

    def lost(self, request: Request, error: WorkerLostError | TimeLimitExceeded) -> Outcome:
        """The process that ran it died, or it was killed at its hard limit."""
        task = self.tasks.get(request.task)
        timed_out = isinstance(error, TimeLimitExceeded)
        late = task is None or task.acks_late
        requeue = late and (
            (not task.acks_on_timeout if timed_out else task.reject_on_worker_lost) if task is not None else True
        )
        if requeue:
            return Outcome(request.number, states.REJECTED, Answer.REQUEUE, str(error), summary=repr(error))
        return self._ended(request, states.FAILURE, error, Answer.ACK)

    def refused(self, request: Request, error: Exception) -> Outcome:
        """It can't or must not be run: dead-lettered with the reason, and FAILURE for whoever waits."""
        return self._ended(request, states.FAILURE, error, Answer.DEAD_LETTER)

    def revoked(self, request: Request, reason: str) -> Outcome:
        """Revoked before it ran, or terminated while it did."""
        return self._ended(request, states.REVOKED, TaskRevokedError(reason), Answer.ACK)

    def expired(self, request: Request) -> Outcome:
        """Its `expires` passed before it could run."""
        return self._ended(request, states.REVOKED, TaskRevokedError("expired"), Answer.ACK)

    def _ended(self, request: Request, state: str, error: Exception, answer: Answer) -> Outcome:
        result = None
        if self._store is not None and request.headers.get("ignore_result") is not True and request.id:
            meta = ResultMessage(request.id, state, exception_as_dict(error), date_done=now_iso())
            try:
                result = self._keep(request, meta)
            except BackendUnreachable as unreachable:
                logger.error("%s of task %s[%s] was not stored: %s", state, request.task, request.id, unreachable)
        return Outcome(request.number, state, answer, str(error), result=result, summary=saferepr(error, 500))

    # -- results

    def _wants_result(self, plan: _Plan, request: Request) -> bool:
        if self._store is None:
            return False
        ignored = request.headers.get("ignore_result")  # None: the task's own setting decides
        return plan.wants_result if ignored is None else not ignored

    def _message(
        self, request: Request, state: str, value: Any, context: Context, trace: str | None = None
    ) -> ResultMessage:
        headers = request.headers
        ready = state in states.READY_STATES
        meta = ResultMessage(
            request.id,
            state,
            value,
            trace,
            list(context.__dict__.get("children", ())),
            now_iso() if ready else None,
            headers.get("group"),
            headers.get("parent_id"),
        )
        if self._extended:
            meta.extra = {
                "name": request.task,
                "args": context.args,
                "kwargs": context.kwargs,
                "worker": self.hostname,
                "retries": context.retries,
                "queue": request.routing_key,
            }
        return meta

    def _keep(self, request: Request, result: ResultMessage) -> Message | None:
        """Store it here, or the message that carries it. Raises: EncodeError, BackendUnreachable."""
        assert self._store is not None
        message = self._store.message_for(result, request.reply_to, request.correlation_id)
        if message is None:
            self._store.store(result)
        return message

    def _keep_failure(
        self, plan: _Plan, request: Request, context: Context, error: BaseException, info: ErrorInfo
    ) -> Message | None:
        if self._store is None:
            return None
        if not self._wants_result(plan, request) and not plan.task.store_errors_even_if_ignored:
            return None
        meta = self._message(request, states.FAILURE, exception_as_dict(error), context, info.traceback)
        try:
            return self._keep(request, meta)
        except EncodeError:
            # result_extended: the arguments may be what cannot be written.
            meta.extra = {}
            meta.result = exception_as_dict(Exception(saferepr(error)))
            return self._keep(request, meta)

    def _store_early(self, request: Request, result: ResultMessage) -> None:
        """STARTED: worth storing now or not at all (stores in AMQP get it with the outcome, too late to matter)."""
        assert self._store is not None
        try:
            if self._store.message_for(result, request.reply_to, request.correlation_id) is None:
                self._store.store(result)
        except BackendUnreachable as error:
            logger.warning("STARTED of task %s[%s] was not stored: %s", request.task, request.id, error)

    # -- what follows

    def _follow_ups(self, context: Context, embed: Mapping[str, Any], value: Any) -> tuple[Message, ...]:
        messages: list[Message] = []
        for callback in embed.get("callbacks") or ():
            messages += self._composer.compose_next(callback, value, context, [])
        chain = embed.get("chain")
        if chain:
            messages += self._composer.compose_next(chain[-1], value, context, list(chain[:-1]))
        return tuple(messages)

    def _error_callbacks(self, context: Context, error: BaseException, info: ErrorInfo) -> tuple[Message, ...]:
        """Errbacks of one parameter are published with the failed task's id; those of (request, exc, traceback) that are
        registered here run here, as in Celery."""
        messages: list[Message] = []
        for errback in context.embed.get("errbacks") or ():
            task = self.tasks.get(errback["task"])
            if task is not None and _parameters(task) >= 3 and not task.is_async:
                self._hook(task.run, context, error, info.traceback)
                continue
            try:
                messages += self._composer.compose_next(errback, context.id, context, [])
            except Exception:
                logger.exception("errback %s of task %s[%s] cannot be published", errback, context.task, context.id)
        return tuple(messages)

    # -- hooks and signals at the end

    def _after(
        self, plan: _Plan, request: Request, context: Context, state: str, value: Any, info: ErrorInfo | None
    ) -> None:
        if "after_return" in plan.hooks:
            self._hook(plan.task.after_return, state, value, request.id, context.args, context.kwargs, info)
        if signals.task_postrun:
            signals.task_postrun.send(
                sender=plan.task, task_id=request.id, task=plan.task, args=context.args, kwargs=context.kwargs,
                retval=value, state=state,
            )  # fmt: skip

    def _hook(self, hook: Callable[..., Any], *arguments: Any) -> None:
        """A hook that fails is logged; the task's outcome stands."""
        try:
            hook(*arguments)
        except Exception:
            logger.exception("hook %s failed", getattr(hook, "__qualname__", hook))


def _parameters(task: TaskLike) -> int:
    """How many positional parameters a task's function takes."""
    try:
        kinds = inspect.signature(task.run).parameters.values()
    except (TypeError, ValueError):
        return 0
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(1 for parameter in kinds if parameter.kind in positional)
