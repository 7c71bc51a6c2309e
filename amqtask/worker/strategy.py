"""The strategy: a delivery becomes a Request, and a verdict says what to do with it.

What a task's own options decide is computed once per task name (`TaskStrategy`); per message only its
headers are read, the body is left to the slot. A message that is not Celery's protocol v2 takes the slow
path: its body is read here (protocol v1), or it is refused.

A worker compiles the strategies of all its tasks when it starts (`Strategies`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from amqtask.exceptions import InvalidTaskError, MessageError
from amqtask.execution.request import Request, request_of
from amqtask.ground.plugins import LONGEST_COMPARED, near_names, others_names
from amqtask.ground.printable import printable
from amqtask.protocol.message import OddHeaders
from amqtask.protocol.task import LONGEST_ID, as_limit, checked_id, limits_in, read_v1, timestamp

if TYPE_CHECKING:
    from amqtask.execution.contract import TaskLike
    from amqtask.ground.shapes import Headers
    from amqtask.protocol.flow_options import Batch
    from amqtask.protocol.message import Delivery

# A request whose ETA is nearer than this (seconds) waits here; one with a later ETA goes to the delay levels.
NEAR_SECONDS = 0.1


class Action(IntEnum):
    """What to do with a delivery."""

    RUN = 0
    SOON = 1  # run it in `seconds`, which are few
    DELAY = 2  # to the delay levels for `seconds`, confirm, then ack
    EXPIRED = 3
    DEAD_LETTER = 4  # delivered too often: its process died each time
    REFUSE = 5  # not a task message


class Verdict(NamedTuple):
    """The action, and its arguments. `deadline` is the wall-clock time before which it must have started, if any."""

    action: Action
    seconds: float = 0.0
    reason: str = ""
    deadline: float | None = None


RUN = Verdict(Action.RUN)


class TaskStrategy:
    """One task's options that matter for each of its messages; compiled once."""

    __slots__ = (
        "acks_late",
        "batch",
        "count",
        "deadline",
        "hard_limit",
        "is_plain",
        "name",
        "problem",
        "soft_limit",
        "task",
    )

    def __init__(
        self,
        name: str,
        task: TaskLike | None,
        *,
        hard_limit: float | None = None,
        soft_limit: float | None = None,
        problem: str = "",
    ) -> None:
        self.name = name
        self.task = task
        # Why there is no task.
        self.problem = problem
        self.acks_late = True
        self.hard_limit = as_limit(hard_limit)
        self.soft_limit = as_limit(soft_limit)
        self.count = 0
        # Seconds, for messages whose sender did not know that the task has one.
        self.deadline: float | None = None
        self.batch: Batch | None = None
        if task is not None:
            self.batch = task.batch
            self.acks_late = task.acks_late
            self.deadline = task.deadline
            # A task's own 0 means that it has no limit, whatever the worker's limit is.
            if task.time_limit is not None:
                self.hard_limit = as_limit(task.time_limit)
            if task.soft_time_limit is not None:
                self.soft_limit = as_limit(task.soft_time_limit)
        # No option of this task needs a decision per message.
        is_free = task is not None and task.flow_plan is None and self.deadline is None and self.batch is None
        self.is_plain = is_free and self.acks_late


def read_request(delivery: Delivery, number: int, name: str, strategy: TaskStrategy) -> Request:
    """The request of a protocol v2 message; the body is not read. Raises: InvalidTaskError.

    Written out attribute by attribute: this runs for every message, and a call with twenty keywords costs
    as much again.
    """
    properties = delivery.properties
    headers = properties.headers
    request = Request.__new__(Request)
    request.number = number
    request.task = name
    request.headers = headers
    request.body = delivery.body
    task_id = headers.get("id") or properties.correlation_id or ""
    if task_id.__class__ is not str or len(task_id) > LONGEST_ID or not task_id.isprintable():
        task_id = checked_id(task_id)
    request.id = task_id
    request.content_type = properties.content_type
    request.content_encoding = properties.content_encoding
    request.correlation_id = properties.correlation_id
    request.reply_to = properties.reply_to
    request.exchange = delivery.exchange
    request.routing_key = delivery.routing_key
    request.queue = delivery.queue
    request.priority = properties.priority
    request.redelivered = delivery.redelivered
    # Only the broker's count is valid, on redeliveries; a sender's header means nothing.
    request.attempts = attempts_in(headers) if delivery.redelivered else 0
    request.decoded = None
    request.is_eager = False
    request.delivery = delivery
    request.first = None
    request.places = ()
    request.until = 0.0
    limits = headers.get("timelimit")
    if limits is None or limits == [None, None]:
        request.hard_limit = strategy.hard_limit
        request.soft_limit = strategy.soft_limit
    else:
        hard, soft = limits_in(headers)
        request.hard_limit = strategy.hard_limit if hard is None else hard
        request.soft_limit = strategy.soft_limit if soft is None else soft
    return request


def judge(request: Request, now: Callable[[], float], *, delivery_limit: int | None) -> Verdict:
    """The verdict by the headers. `now` is the wall clock, called only when a time is in the headers."""
    headers = request.headers
    if request.attempts and delivery_limit and request.attempts >= delivery_limit:
        explanation = (
            "each time the worker that had it, or the process that ran it, was lost (the workers' logs say how)"
        )
        return Verdict(Action.DEAD_LETTER, reason=without_end(request.attempts, explanation))
    eta, expires = headers.get("eta"), headers.get("expires")
    if not eta and not expires:
        return RUN
    try:
        deadline = timestamp(expires) if expires else None
        start = timestamp(eta) if eta else 0.0
    except (TypeError, ValueError, AttributeError, OverflowError) as exc:
        return Verdict(Action.REFUSE, reason=f"eta or expires is no ISO 8601 time: {printable(str(exc), 200)}")
    clock = now()
    if deadline is not None and clock >= deadline:
        return Verdict(Action.EXPIRED, deadline=deadline)
    if start > clock:
        wait = start - clock
        return Verdict(Action.DELAY if wait > NEAR_SECONDS else Action.SOON, seconds=wait, deadline=deadline)
    return RUN if deadline is None else Verdict(Action.RUN, deadline=deadline)


def without_end(times: int, explanation: str) -> str:
    """The reason for a message that must not be delivered again."""
    return f"delivered {'once' if times == 1 else f'{times} times'} without an end: {explanation}"


def attempts_in(headers: Headers) -> int:
    """How often the message was delivered before, by the broker's header."""
    count = headers.get("x-delivery-count")
    return count if count.__class__ is int and count > 0 else 0


__getattr__ = others_names(__name__)


class Strategies(dict[str, TaskStrategy]):
    """Task name to strategy; for an unknown name a strategy with the reason (not kept: anybody may send any name)."""

    def __init__(
        self, tasks: Mapping[str, TaskLike], *, hard_limit: float | None = None, soft_limit: float | None = None
    ) -> None:
        super().__init__()
        self._tasks = tasks
        self._hard_limit = hard_limit
        self._soft_limit = soft_limit
        for name, task in tasks.items():
            self._compile(name, task)

    def __missing__(self, name: str) -> TaskStrategy:
        task = self._tasks.get(name)
        if task is not None:  # registered after the worker started
            return self._compile(name, task)
        near = near_names(name, self._tasks)
        hint = f" Did the sender mean {near[0]!r}?" if near else ""
        problem = (
            f"no task {printable(name, LONGEST_COMPARED)!r} is registered in this worker.{hint} "
            "Is its module imported (include=, imports, autodiscover_tasks)?"
        )
        return TaskStrategy(name, None, problem=problem)

    def forget(self, name: str) -> None:
        """The task was replaced: compile its strategy anew, and keep its count."""
        old = self.pop(name, None)
        if old is not None and name in self._tasks:
            self._compile(name, self._tasks[name]).count = old.count

    def _compile(self, name: str, task: TaskLike) -> TaskStrategy:
        strategy = TaskStrategy(name, task, hard_limit=self._hard_limit, soft_limit=self._soft_limit)
        self[name] = strategy
        return strategy


# -- The border (`read_strange`): reads unusual messages. A message that cannot be read is refused with a reason, and harms
# nothing else.
#
# A protocol v2 message with the usual headers is read by `read_request`; all others come here. Protocol v1 has everything in
# the body, so the worker itself has to read that, up to a bound; the slot that runs the task reads it once more.


def bare_request(delivery: Delivery, number: int) -> Request:
    """A request that only stands for its delivery; it has an id where that is known, for logs and for the result."""
    properties = delivery.properties
    headers = properties.headers if isinstance(properties.headers, dict) else {}
    task_id = headers.get("id") or properties.correlation_id or properties.message_id
    request = request_of(
        delivery,
        number,
        task_id=task_id if isinstance(task_id, str) and len(task_id) <= LONGEST_ID and task_id.isprintable() else "",
        task=printable(str(headers.get("task") or ""), LONGEST_ID),
        queue=delivery.queue,
    )
    request.headers = headers
    request.redelivered = delivery.redelivered
    request.delivery = delivery
    return request


def read_strange(delivery: Delivery, number: int, accept: frozenset[str]) -> tuple[Request, MessageError | None]:
    """The request of a message that is no plain protocol v2, and the error if it is no task message."""
    request = bare_request(delivery, number)
    raw_headers = delivery.properties.headers
    try:
        if isinstance(raw_headers, OddHeaders):
            raise InvalidTaskError(raw_headers.problem)
        if request.task:
            raise InvalidTaskError(f"the header `task` is {request.task!r}, not a name")
        headers = read_v1(
            delivery.body,
            request.content_type,
            request.content_encoding,
            accept,
            compression=request.headers.get("compression"),
        )
    except MessageError as error:
        return request, error
    # A worker that has sent it back to wait has written into these.
    ours = {name: value for name, value in (raw_headers or {}).items() if name.startswith("amqtask-")}
    request.headers = {**headers, **ours}
    request.task, request.id = headers["task"], headers["id"]
    request.hard_limit, request.soft_limit = limits_in(headers)
    if delivery.redelivered and raw_headers:
        request.attempts = attempts_in(raw_headers)
    return request, None
