"""Runs a task in its caller: the same executor, with callbacks run at once, and the value and error kept as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from amqtask.execution.context import Context, current
from amqtask.execution.exception_info import ErrorInfo
from amqtask.execution.executor import Executor
from amqtask.execution.outcome import Outcome

if TYPE_CHECKING:
    from amqtask.exceptions import Retry
    from amqtask.execution.contract import TaskLike
    from amqtask.execution.request import Request
    from amqtask.execution.task_plan import TaskPlan
    from amqtask.ground.shapes import SignatureFields
    from amqtask.protocol.message import Message
    from amqtask.protocol.result import ResultMessage

RunNext = Callable[["SignatureFields", Any, "list[SignatureFields]"], None]


class _Keep:
    """A ResultStore that keeps one result, unencoded."""

    blocks = keeps_runs = False

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

    def compose_retry(self, request: Request, context: Context, *, when: object, sig: object) -> Message:
        """Never called: the inline executor keeps retries."""
        raise AssertionError("an inline retry is not published")

    def compose_next(
        self, signature: SignatureFields, result: object, context: Context, chain: list[SignatureFields]
    ) -> list[Message]:
        """Run the signature."""
        self._run_next(signature, result, chain)
        return []

    def compose_body(
        self, body: SignatureFields, values: list[object], group_id: str, parent_id: str | None
    ) -> list[Message]:
        """Never called: inline, the caller that runs the header runs the body, too."""
        raise AssertionError("an inline chord has no parts")

    def compose_replacement(self, replacement: object, context: Context) -> list[Message]:
        """Never called: inline, `Task.replace` runs the replacement."""
        raise AssertionError("an inline task is not replaced by a message")

    def compose_errback(self, errback: SignatureFields, context: Context, error: BaseException, trace: str) -> Message:
        """Never called: inline, errbacks are called directly."""
        raise AssertionError("an inline errback is called")


class InlineExecutor(Executor):
    """For one call. After `execute`: `kept` is the result message, `error` the exception, `retry` the Retry if it was raised."""

    def __init__(self, tasks: Mapping[str, TaskLike], *, run_next: RunNext, hostname: str) -> None:
        self._keeper = _Keep()
        self.error: BaseException | None = None
        self.retry: Retry | None = None
        super().__init__(tasks, accept=frozenset(), composer=_RunHere(run_next), store=self._keeper, hostname=hostname)

    def call_errbacks(self, errbacks: list[SignatureFields], context: Context, error: BaseException) -> None:
        """Call (or run) the errbacks of a chord's body that does not run."""
        token = current.set(context)
        try:
            self._follow_up_composer.of_failure(
                Context(**{**context.__dict__, "embed": {"errbacks": errbacks}}), error, ""
            )
        finally:
            current.reset(token)

    @property
    def kept(self) -> ResultMessage | None:
        """The result, with its value as the task returned it."""
        return self._keeper.result

    def _retried(self, plan: TaskPlan, request: Request, context: Context, retry: Retry, runtime: float) -> Outcome:
        self.retry = retry
        self._tell_retry(plan, request, context, retry, ErrorInfo(retry.exc or retry))
        return Outcome(request.number, "RETRY", runtime=runtime)

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
