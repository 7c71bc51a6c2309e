"""The executors of applications with unique tasks or limits, which run when the gate lets them in; and of those with batch tasks,
whose function is called once for what a worker has gathered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import perf_counter
from types import CoroutineType
from typing import TYPE_CHECKING, Any

from amqtask import signals, states
from amqtask.exceptions import BackendUnreachable
from amqtask.execution.batches import BatchCall, settle
from amqtask.execution.context import AT_END, Context, current, current_context
from amqtask.execution.executor import Executor
from amqtask.execution.no_run import INTERRUPTED_SECONDS, not_stored, requeued
from amqtask.execution.request import HELD, Answer, Outcome, calls_of, is_batch
from amqtask.execution.task_plan import tell_start
from amqtask.ground.printable import bounded_logger
from amqtask.ground.processes import FORKS, end_forked

if TYPE_CHECKING:
    from amqtask.exceptions import TimeLimitExceeded, WorkerLostError
    from amqtask.execution.executor import RunBlocking
    from amqtask.execution.request import Request
    from amqtask.execution.task_plan import TaskPlan
    from amqtask.flow.contract import Entry, Verdict
    from amqtask.flow.gate import Gate
    from amqtask.ground.shapes import TaskBody
    from amqtask.protocol.flow_options import Breaker

logger = bounded_logger("amqtask.execution")


class GatedExecutor(Executor):
    """An Executor whose tasks in `gate.plans` ask the gate first. `later` calls a function with arguments in a thread: the
    worker's I/O loop must not wait for the store. Without a gate no task asks."""

    def __init__(
        self, *args: Any, gate: Gate | None = None, later: Callable[..., object] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.gate: Any = gate
        self._gated: Mapping[str, Any] = {} if gate is None else gate.plans
        self._later: Any = later
        # Runs that have failed, as their tasks' breakers count; by number, until they leave.
        self._failures: set[int] = set()

    def execute_here(self, request: Request) -> Outcome:
        """See Executor."""
        if request.task not in self._gated:
            if self.gate is not None:
                self.gate.let_go()
            return super().execute_here(request)
        entered = self._enter(request)
        if isinstance(entered, Outcome):
            return entered
        started = perf_counter()
        outcome = super().execute_here(request)
        self._leave(request, entered, outcome, perf_counter() - started)
        return outcome

    def rest(self) -> None:
        """See Executor."""
        if self.gate is not None:
            self.gate.rest()

    async def aexecute(self, request: Request, run_blocking: RunBlocking) -> Outcome:
        """See Executor."""
        if request.task not in self._gated:
            return await super().aexecute(request, run_blocking)
        given_up: list[BaseException] = []
        try:
            entered: Outcome | Entry | None = await run_blocking(self._enter_for, request, given_up)
        except BaseException as error:  # noqa: BLE001 - a pool ends it while it asks, and the thread goes on
            given_up.append(error)
            return self._interrupted(request, error)
        if isinstance(entered, Outcome):
            return entered
        started = perf_counter()
        outcome = await super().aexecute(request, run_blocking)
        try:
            await run_blocking(self._leave, request, entered, outcome, perf_counter() - started)
        except BaseException as error:  # noqa: BLE001 - a limit that came late: the thread goes on, and the outcome counts
            logger.debug("%r while task %s[%s] left the gate", error, request.task, request.id)
        return outcome

    def _enter_for(self, request: Request, given_up: Sequence[BaseException]) -> Outcome | Entry | None:
        """As _enter, in a thread; what came too late is given back."""
        entered = self._enter(request)
        if given_up and entered is not None and not isinstance(entered, Outcome):
            self.gate.leave(request.task, entered, 0.0, "wait", "")
        return entered

    def _enter(self, request: Request) -> Outcome | Entry | None:
        """What it has now; or the outcome of a request that does not run. Never raises."""
        entry: Entry | None = None
        try:
            decoded: TaskBody = request.decoded or self._decode(request, self._largest_body)
            request.decoded = decoded
            args, kwargs, _ = decoded
            entry, verdict = self.gate.enter(request.task, request.id, request.number, request.headers, args, kwargs)
        except Exception as error:  # noqa: BLE001 - no task message, or arguments that make no key
            return self.refused(request, error, in_slot=True)
        except BaseException as error:  # noqa: BLE001 - a pool ends it: what it may have got ends with its lease
            return self._interrupted(request, error)
        if verdict.other:
            return self.revoked(request, f"a call with the same unique key is there: {verdict.other}", in_slot=True)
        if verdict.seconds:
            return self._held(request, entry, verdict)
        return entry

    def _held(self, request: Request, entry: Entry | None, verdict: Verdict) -> Outcome:
        """Its message comes again; it was no attempt."""
        limits = () if entry is None else tuple(bound for bound in entry.bounds if bound.places)
        waited_for = [bound.key for bound in limits if bound.label == verdict.reason]
        others = [bound.key for bound in limits if bound.label != verdict.reason]
        return Outcome(
            request.number, HELD, Answer.REQUEUE, f"it waits {verdict.seconds:.3g} s for its turn ({verdict.reason})",
            pause=verdict.seconds, tickets=dict(verdict.tickets), places=waited_for and waited_for + others,
        )  # fmt: skip

    def _raised(
        self, plan: TaskPlan, request: Request, context: Context, error: BaseException, started: float
    ) -> Outcome:
        flow_plan = self._gated.get(request.task)
        if flow_plan is not None and flow_plan.breaker is not None and _is_failure(flow_plan.breaker, error):
            self._failures.add(request.number)
        return super()._raised(plan, request, context, error, started)

    def _leave(self, request: Request, entry: Entry | None, outcome: Outcome, seconds: float) -> None:
        has_failed = request.number in self._failures
        self._failures.discard(request.number)
        if entry is None:
            return
        if outcome.state in (states.SUCCESS, states.IGNORED, states.REVOKED):
            lock = "free"
        elif outcome.state == states.RETRY or outcome.answer is Answer.REQUEUE:
            lock = "wait"
        else:
            lock = "keep" if entry.lock is not None and entry.lock.until == "success" else "free"
        ended = "failure" if has_failed else "success" if outcome.state == states.SUCCESS else ""
        try:
            self.gate.leave(request.task, entry, seconds, lock, ended)
        except BaseException as error:  # noqa: BLE001 - a limit that came late, or a bug: the outcome counts
            logger.warning("task %s[%s] keeps its place until its lease ends: %r", request.task, request.id, error)

    def _ended(self, request: Request, *args: Any, **kwargs: Any) -> Outcome:
        outcome = super()._ended(request, *args, **kwargs)
        plan = self._gated.get(request.task)
        if plan is not None and (
            outcome.state == states.REVOKED or plan.unique is None or plan.unique.until != "success"
        ):
            call = self.gate.ended_without_run
            if current_context() is not None:
                call(request.task, request.id, request.headers)
            else:
                self._later(call, request.task, request.id, request.headers)
        return outcome


def _is_failure(breaker: Breaker, error: BaseException) -> bool:
    try:
        return breaker.is_failure(error)
    except Exception:  # a user's function
        logger.exception("counts of a Breaker failed; %r is taken for a failure", error)
        return True


# -- batches


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
