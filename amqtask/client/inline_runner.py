"""Calls that run here and now: `task.apply()` and `task_always_eager`; the same executor, with callbacks run at once.

The value and the error are kept as they are.
"""

from __future__ import annotations

import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from amqtask import states
from amqtask.calls.signature import Signature, listed
from amqtask.canvas import as_signature, chain, chord, group
from amqtask.client.message_builder import deadline_of
from amqtask.exceptions import ChordError, Terminated
from amqtask.execution.context import Context, current, current_context
from amqtask.execution.executor import Executor
from amqtask.execution.follow_ups import first_task
from amqtask.execution.request import ErrorInfo, Outcome, Request
from amqtask.execution.task_plan import tell, tell_retry
from amqtask.flow.deadline import HEADER as DEADLINE
from amqtask.flow.deadline import deadline_in
from amqtask.protocol.task import saferepr
from amqtask.result import EagerResult

if TYPE_CHECKING:
    from amqtask.calls.application import Application, CalledTask
    from amqtask.exceptions import Retry
    from amqtask.execution.contract import TaskLike
    from amqtask.execution.inbox import InboxRuns
    from amqtask.execution.task_plan import TaskPlan
    from amqtask.ground.shapes import Arguments, HeaderDict, Keywords, OptionDict, Options, SignatureFields
    from amqtask.protocol.message import Message
    from amqtask.protocol.result import ResultMessage
    from amqtask.result import UntypedEagerResult


RunNext = Callable[["SignatureFields", Any, "list[SignatureFields]"], None]


class _Keep:
    """A ResultStore that keeps one result, unencoded."""

    blocks = keeps_runs = stores_together = False

    def __init__(self) -> None:
        self.result: ResultMessage | None = None

    def message_for(self, result: ResultMessage, reply_to: str | None, correlation_id: str | None) -> Message | None:
        """None: no message is needed."""
        return None

    def store(self, result: ResultMessage) -> None:
        """Keep the result."""
        self.result = result

    store_briefly = store


class _RunHere:
    """A Composer that runs callbacks instead of composing messages."""

    def __init__(self, run_next: RunNext) -> None:
        self._run_next = run_next

    def compose_next(
        self,
        signature: SignatureFields,
        result: object,
        context: Context,
        chain: list[SignatureFields],
        *,
        is_bound: bool = True,
    ) -> list[Message]:
        """Run the signature."""
        self._run_next(signature, result, chain)
        return []

    def _never(self, *_: Any, **__: Any) -> Any:
        """The inline executor keeps retries and calls errbacks; whoever runs a header runs the body; `Task.replace` runs here."""
        raise AssertionError("nothing of an inline task becomes a message")

    compose_retry = compose_body = compose_replacement = compose_errback = _never


class InlineExecutor(Executor):
    """For one call. After `execute`: `kept` is the result message, `error` the exception, `retry` the Retry if it was raised,
    `terminated` what a pool has raised to end the task."""

    def __init__(
        self, tasks: Mapping[str, TaskLike], *, run_next: RunNext, hostname: str, inbox: InboxRuns | None = None
    ) -> None:
        self._keeper = _Keep()
        self.error: BaseException | None = None
        self.retry: Retry | None = None
        self.terminated: Terminated | None = None
        super().__init__(
            tasks,
            accept=frozenset(),
            composer=_RunHere(run_next),
            store=self._keeper,
            hostname=hostname,
            inbox=inbox,
        )

    def call_errbacks(self, errbacks: list[SignatureFields], context: Context, error: BaseException) -> None:
        """Call (or run) the errbacks of a chord's body that does not run."""
        token = current.set(context)
        try:
            self.follow_ups.of_failure(Context(**{**context.__dict__, "embed": {"errbacks": errbacks}}), error, "")
        finally:
            current.reset(token)

    @property
    def kept(self) -> ResultMessage | None:
        """The result, with its value as the task returned it."""
        return self._keeper.result

    def _retried(self, plan: TaskPlan, request: Request, context: Context, retry: Retry, runtime: float) -> Outcome:
        self.retry = retry
        tell(tell_retry, plan, request, context, retry, ErrorInfo(retry.exc or retry))
        return Outcome(request.number, "RETRY", runtime=runtime)

    def _classify(
        self, plan: TaskPlan, request: Request, context: Context, error: BaseException, runtime: float
    ) -> Outcome:
        if isinstance(error, Terminated):
            self.terminated = error
        return super()._classify(plan, request, context, error, runtime)

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
        self.error = error
        return super()._failed(plan, request, context, error, runtime, hooks=hooks)


class InlineRunner:
    """Runs an application's tasks in the caller, through the executor, retries and callbacks included."""

    def __init__(self, app: Application, *, in_place_of_publishing: bool = False) -> None:
        self._app = app
        # What is run in place of a publish gets its arguments as a worker would get them.
        self._serializes = in_place_of_publishing

    def run(
        self,
        task: CalledTask,
        args: Sequence[object],
        kwargs: Keywords,
        options: Options,
        *,
        propagate: bool = False,
    ) -> UntypedEagerResult:
        """Run a task; with `propagate` (or the option `throw`) its exception is raised here."""
        self._app.finalize()
        if self._serializes:
            args, kwargs = self._app.calls.travelled(task.name, args, kwargs, options, task)
        task_id = options.get("task_id") or str(uuid.uuid4())
        if options.get("throw") is not None:
            propagate = bool(options["throw"])
        embed = {
            "callbacks": listed(options.get("link")) or None,
            "errbacks": listed(options.get("link_error")) or None,
        }
        embed["chain"] = options.get("chain")
        retries = int(options.get("retries") or 0)
        family = _family(task_id, options)
        deadline, inbox = self._deadline(task, options), self._app.make_inbox_runs([task.name])
        while True:
            executor = InlineExecutor(
                self._app.tasks, run_next=self._run_next, hostname=socket.gethostname(), inbox=inbox
            )
            headers = {
                "task": task.name,
                "id": task_id,
                "retries": retries,
                "ignore_result": False,
                **family,
                **deadline,
                **_stamps(options),
                **(options.get("headers") or {}),
            }
            request = Request(
                number=0,
                id=task_id,
                task=task.name,
                headers=headers,
                decoded=(tuple(args), dict(kwargs), embed),
                is_eager=True,
            )
            outcome = executor.expired(request) if _is_over(request) else executor.execute(request)
            if executor.terminated is not None and current.get() is not None:
                raise executor.terminated  # a limit, or an end, of the task that makes this call
            if executor.retry is None:
                break
            changes = executor.retry.sig or {}
            args = args if changes.get("args") is None else changes["args"]
            kwargs = kwargs if changes.get("kwargs") is None else changes["kwargs"]
            retries += 1
        return self._eager_result(executor, outcome, task_id, task.name, propagate)

    def _deadline(self, task: CalledTask, options: Options) -> HeaderDict:
        """The header of a call's deadline: its own, or that of the task that makes the call, whichever comes first."""
        limit = task.deadline if options.get("deadline") is None else options["deadline"]
        ends = [] if limit is None else [deadline_of(limit, None, lambda: self._app.timezone)]
        caller = current_context()
        if caller is not None and caller.request is not None and (inherited := deadline_in(caller.request.headers)):
            ends.append(inherited)
        return {DEADLINE: min(ends).isoformat()} if ends else {}

    # -- compositions

    def run_composition(self, sig: Signature, args: Arguments = (), *, propagate: bool = False) -> Any:
        """Run a settled, frozen signature; the result of its end. What fails ends all that was to follow it."""
        if isinstance(sig, chain):
            return self._run_chain(sig, args, propagate)
        if isinstance(sig, group):
            results = [self.run_composition(member, args, propagate=propagate) for member in sig.tasks]
            return self._app.group_result(str(sig.id), results)
        if isinstance(sig, chord):
            return self._run_chord(sig, args, propagate)
        call = sig.clone(args)
        task = self._app.tasks[call.task]
        return self.run(task, call.args, call.kwargs, call.options, propagate=propagate)

    def _run_chain(self, sig: chain, args: Arguments, propagate: bool) -> object:
        result: Any = None
        for step in sig.tasks:
            before, result = result, self.run_composition(step, args, propagate=propagate)
            _eldest(result).parent = before
            if isinstance(result, EagerResult) and result.state != states.SUCCESS:
                return self._ended(sig.tasks[-1], result)
            args = (result.get(),) if isinstance(result, EagerResult) else (result.get(disable_sync_subtasks=False),)
        return result

    def _run_chord(self, sig: chord, args: Arguments, propagate: bool) -> object:
        members = [self.run_composition(member, args, propagate=propagate) for member in sig.tasks]
        header = self._app.group_result(str(sig.id), members)
        body = sig.body
        assert body is not None
        failed = next((member for member in members if member.state != states.SUCCESS), None)
        if failed is None:
            values = [member.get() for member in members]
            result = self.run_composition(body, (values,), propagate=propagate)
            _eldest(result).parent = header
            return result
        error = ChordError(f"Dependency {failed.id} raised {saferepr(failed.result, 500)}")
        error.__cause__ = failed.result if isinstance(failed.result, BaseException) else None
        if propagate:
            raise error
        first = as_signature(first_task(body), self._app)
        context = Context(id=first.id, task=first.task, args=first.args, kwargs=first.kwargs)
        for errback in listed(first.options.get("link_error")):
            self._call_errback(errback, context, error)
        result = EagerResult(str(_last(body).id), error, states.FAILURE, None, _last(body).task)
        result.parent = header
        return result

    def _call_errback(self, errback: SignatureFields, context: Context, error: BaseException) -> None:
        executor = InlineExecutor(self._app.tasks, run_next=self._run_next, hostname=socket.gethostname())
        executor.call_errbacks([errback], context, error)

    def _ended(self, last: Signature, result: UntypedEagerResult) -> UntypedEagerResult:
        """The result of a chain's last task when an earlier one did not succeed."""
        end = _last(last)
        if end.id == result.id:
            return result
        ended: UntypedEagerResult = EagerResult(str(end.id), result.result, result.state, result.traceback, end.task)
        ended.parent = result
        return ended

    def _eager_result(
        self, executor: InlineExecutor, outcome: Outcome, task_id: str, name: str, propagate: bool
    ) -> UntypedEagerResult:
        if executor.error is not None and propagate:
            raise executor.error
        kept = executor.kept
        value = executor.error if executor.error is not None else (kept.result if kept is not None else None)
        result: UntypedEagerResult = EagerResult(task_id, value, outcome.state, outcome.traceback or None, name)
        if kept is not None and self._app.conf.task_store_eager_result and self._app.backend is not None:
            self._app.backend.store(kept)
        return result

    def _run_next(self, step: SignatureFields, result: object, later_steps: list[SignatureFields]) -> None:
        sig, _ = self._app.workflows.frozen(as_signature(step, self._app), {})
        following = self.run_composition(sig, (result,))
        if later_steps and following.successful():
            self._run_next(later_steps[-1], following.get(), later_steps[:-1])


def _is_over(request: Request) -> bool:
    deadline = deadline_in(request.headers)
    return deadline is not None and deadline <= datetime.now(timezone.utc)


def _family(task_id: str, options: Options) -> OptionDict:
    """root_id and parent_id of a call: those in its options, else from the task that makes the call, as for a published call."""
    caller = current_context()
    family: dict[str, object] = {"root_id": task_id, "parent_id": None}
    if caller is not None and caller.id is not None and caller.id != task_id:
        family = {"root_id": caller.root_id or caller.id, "parent_id": caller.id}
    return {key: options.get(key) or inherited for key, inherited in family.items()}


def _stamps(options: Options) -> OptionDict:
    names = listed(options.get("stamped_headers"))
    return {"stamped_headers": names, "stamps": {name: options.get(name) for name in names}} if names else {}


def _eldest(result: Any) -> Any:
    """The result that has no parent yet."""
    while result.parent is not None:
        result = result.parent
    return result


def _last(sig: Signature) -> Signature:
    inner = sig.body if isinstance(sig, chord) else sig.tasks[-1] if isinstance(sig, chain) else None
    return sig if inner is None else _last(inner)
