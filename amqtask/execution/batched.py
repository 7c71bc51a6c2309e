"""The executor of applications with batch tasks: the function is called once for what a worker has gathered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from types import CoroutineType
from typing import TYPE_CHECKING

from amqtask import signals
from amqtask.exceptions import BackendUnreachable
from amqtask.execution.batches import BatchCall, settle
from amqtask.execution.context import AT_END, Context, current
from amqtask.execution.gated import GatedExecutor
from amqtask.execution.hooks import tell_start
from amqtask.execution.no_run import INTERRUPTED_SECONDS, not_stored, requeued
from amqtask.execution.request import Outcome, calls_of, is_batch
from amqtask.ground.processes import FORKS, end_forked

if TYPE_CHECKING:
    from amqtask.exceptions import TimeLimitExceeded, WorkerLostError
    from amqtask.execution.executor import RunBlocking
    from amqtask.execution.request import Request
    from amqtask.execution.task_plan import TaskPlan


class _Batch:
    """The calls of one run: those that the function gets, and the outcomes of the others."""

    __slots__ = ("calls", "context", "given", "outcomes", "plan", "request", "started")

    def __init__(self, request: Request, plan: TaskPlan, hostname: str) -> None:
        self.started = perf_counter()
        self.request = request
        self.plan = plan
        self.calls: list[BatchCall] = []
        # The function's own list, which it may change.
        self.given: list[BatchCall] = []
        self.outcomes: list[Outcome] = []
        # Of the run: it is no call's, so it has no id.
        self.context = Context(
            task=request.task, hostname=hostname, called_directly=False, args=(self.given,), kwargs={}
        )


class BatchedExecutor(GatedExecutor):
    """The executor of applications with batch tasks."""

    def execute_here(self, request: Request) -> Outcome:
        """See Executor."""
        if not is_batch(request):
            return super().execute_here(request)
        if self.gate is not None:
            self.gate.let_go()
        try:
            batch = self._begun(request)
            if isinstance(batch, Outcome):
                return batch
            forks = FORKS[0]
            value, raised = self.call_function(batch)
            if FORKS[0] != forks:
                end_forked(raised)
            return self._ended_batch(batch, value, raised)
        except BaseException as error:  # noqa: BLE001 - a limit that came late
            return self._interrupted(request, error)
        finally:
            for call in AT_END:
                call()

    def call_function(self, batch: _Batch) -> tuple[object, BaseException | None]:
        """What it returns or raises. Only in here a time limit strikes (see ThreadInterrupt in amqtask_pools)."""
        current.set(batch.context)
        try:
            value = batch.plan.batch_call(batch.given) if batch.calls else None
            if value.__class__ is CoroutineType:
                value = self.run_coroutine(value)
            return value, None
        except BaseException as error:  # noqa: BLE001 - see Executor
            return None, error

    async def aexecute(self, request: Request, run_blocking: RunBlocking) -> Outcome:
        """See Executor."""
        if not is_batch(request):
            return await super().aexecute(request, run_blocking)
        token = current.set(None)
        value, raised = None, None
        try:
            asks_store = self._store_blocks and any(call.redelivered for call in calls_of(request))
            batch = await run_blocking(self._begun, request) if asks_store else self._begun(request)
            if isinstance(batch, Outcome):
                return batch
            current.set(batch.context)
            forks = FORKS[0]
            try:
                value = await batch.plan.batch_call(batch.given) if batch.calls else None
            except BaseException as error:  # noqa: BLE001 - see Executor
                raised = error
            if FORKS[0] != forks:
                end_forked(raised)
            if self._store_blocks:
                outcome: Outcome = await run_blocking(self._ended_batch, batch, value, raised)
                return outcome
            return self._ended_batch(batch, value, raised)
        except BaseException as error:  # noqa: BLE001 - a limit that came late
            return self._interrupted(request, error)
        finally:
            for call in AT_END:
                call()
            current.reset(token)

    def _begun(self, request: Request) -> _Batch | Outcome:
        try:
            plan = self._plans.get(request.task) or self._plan(request.task)
        except Exception as error:  # noqa: BLE001 - see Executor
            return _of_each(request, partial(super().refused, error=error, in_slot=True))
        batch = _Batch(request, plan, self.hostname)
        for call in calls_of(request):
            self._begin(batch, call)
        batch.given.extend(batch.calls)
        return batch

    def _begin(self, batch: _Batch, request: Request) -> None:
        """Add the call to those that the function gets, or the outcome that it has already."""
        try:
            args, kwargs, embed = request.decoded or self._decode(request, self._largest_body)
        except Exception as error:  # noqa: BLE001 - see Executor
            batch.outcomes.append(self.refused(request, error, in_slot=True))
            return
        plan, context = batch.plan, Context.of(request, args, kwargs, embed, self.hostname)
        context._stops = self.stops
        call = BatchCall(args, kwargs, context)
        current.set(context)
        try:
            if request.redelivered and (resumed := self._resumed(request, context)) is not None:
                batch.outcomes.append(resumed)
                return
            if plan.track_started:
                self._mark_started(plan, request)
            if plan.hooks or signals.task_prerun.connected:
                tell_start(plan, request, context)
        except BaseException as error:  # noqa: BLE001 - see Executor
            call.fail(error)
            batch.outcomes.append(self._outcome_of(batch, call))
            return
        batch.calls.append(call)

    def _ended_batch(self, batch: _Batch, value: object, raised: BaseException | None) -> Outcome:
        if batch.context.asked_retries and raised is None:
            raised = RuntimeError(
                f"task {batch.plan.task.name}: in a batch retry(throw=False) is of no call: use call.retry()"
            )
        try:
            settle(batch.calls, batch.given, value, raised)
        except Exception as error:  # noqa: BLE001 - of a list of the task's own kind
            settle(batch.calls, batch.calls, None, error)
        runtime = perf_counter() - batch.started
        share = runtime / max(1, len(batch.calls))
        gathered = None if self._results is None else self._results.gather()
        ended = []
        for call in batch.calls:
            call.request.gathered = gathered
            ended.append(self._outcome_of(batch, call)._replace(runtime=share))
        if gathered:
            ended = self._stored(batch, ended, gathered)
        return Outcome(batch.request.number, runtime=runtime, calls=(*batch.outcomes, *ended))

    def _stored(self, batch: _Batch, ended: list[Outcome], gathered: Sequence[tuple[str, bytes]]) -> list[Outcome]:
        """The outcomes when the results that were gathered are stored; where they cannot be, their calls come again."""
        assert self._results is not None
        try:
            self._results.store_gathered(gathered)
        except BackendUnreachable as error:
            ids = {task_id for task_id, _ in gathered}
            return [
                not_stored(request, error, outcome.runtime) if request.id in ids else outcome
                for request, outcome in zip((call.request.request for call in batch.calls), ended, strict=True)
                if request is not None
            ]
        return ended

    def _outcome_of(self, batch: _Batch, call: BatchCall) -> Outcome:
        """Never raises, see Executor.execute."""
        context, plan, request = call.request, batch.plan, call.request.request
        assert request is not None
        current.set(context)
        try:
            try:
                value = call.end(plan.task)
            except BaseException as error:  # noqa: BLE001 - every kind is classified
                return self._raised(plan, request, context, error, batch.started)
            return self._returned(plan, request, context, value, batch.started)
        except BaseException as error:  # noqa: BLE001 - see Executor
            return self._late(plan, request, context, error, batch.started)

    # -- requests that no slot ran to their end

    def lost(self, request: Request, error: WorkerLostError | TimeLimitExceeded) -> Outcome:
        """See Endings."""
        return _of_each(request, partial(super().lost, error=error))

    def revoked(self, request: Request, reason: str, *, in_slot: bool = False) -> Outcome:
        """See Endings."""
        return _of_each(request, partial(super().revoked, reason=reason, in_slot=in_slot))

    def _interrupted(self, request: Request, error: BaseException) -> Outcome:
        if is_batch(request):
            reason = f"its batch was interrupted: {error!r}"
            return _of_each(request, lambda call: requeued(call, reason)._replace(pause=INTERRUPTED_SECONDS))
        return super()._interrupted(request, error)

    def refused(self, request: Request, error: Exception, *, in_slot: bool = False) -> Outcome:
        """See Endings. A batch is refused as a whole when a pool cannot hand it to a slot. One of its calls is to blame, so that
        counts as if its process had died: they come again, at last alone."""
        if is_batch(request):
            return _of_each(request, lambda call: requeued(call, str(error))._replace(summary=repr(error)))
        return super().refused(request, error, in_slot=in_slot)


def _of_each(request: Request, end: Callable[[Request], Outcome]) -> Outcome:
    """The outcome of a batch of which each call ends like that; of another request its own."""
    if not is_batch(request):
        return end(request)
    return Outcome(request.number, calls=tuple(end(call) for call in calls_of(request)))
