"""The executor of applications with unique tasks or limits: such a task runs when the gate lets it in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

from amqtask import states
from amqtask.execution.context import current_context
from amqtask.execution.executor import Executor
from amqtask.execution.request import HELD, Answer, Outcome
from amqtask.ground.printable import bounded_logger

if TYPE_CHECKING:
    from amqtask.execution.context import Context
    from amqtask.execution.executor import RunBlocking
    from amqtask.execution.request import Request
    from amqtask.execution.task_plan import TaskPlan
    from amqtask.flow.contract import Entry, Verdict
    from amqtask.ground.shapes import Headers, TaskBody
    from amqtask.protocol.flow_options import Breaker

logger = bounded_logger("amqtask.execution")


class GateLike(Protocol):
    """See amqtask.flow.gate.Gate."""

    @property
    def plans(self) -> Mapping[str, Any]:
        """The tasks that ask for something."""

    def enter(
        self, task: str, task_id: str, number: int, headers: Headers, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Entry | None, Verdict]: ...

    def leave(self, task: str, entry: Entry, seconds: float, lock: str, ended: str) -> None: ...

    def rest(self) -> None: ...

    def let_go(self) -> None: ...

    def ended_without_run(self, task: str, task_id: str, headers: Headers) -> None: ...


class GatedExecutor(Executor):
    """An Executor whose tasks in `gate.plans` ask the gate first. `later` calls a function with arguments in a thread: the
    worker's I/O loop must not wait for the store. Without a gate no task asks."""

    def __init__(
        self, *args: Any, gate: GateLike | None = None, later: Callable[..., object] | None = None, **kwargs: Any
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
            return self._without_key(request, error)
        except BaseException as error:  # noqa: BLE001 - a pool ends it: what it may have got ends with its lease
            return self._interrupted(request, error)
        if verdict.other:
            return self._duplicate(request, verdict.other)
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

    def _without_key(self, request: Request, error: Exception) -> Outcome:
        return self.refused(request, error, in_slot=True)

    def _duplicate(self, request: Request, other: str) -> Outcome:
        return self.revoked(request, f"a call with the same unique key is there: {other}", in_slot=True)

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
