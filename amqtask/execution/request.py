"""What a slot gets and gives back: Request, and its end as Outcome; ErrorInfo; and the exceptions with which a pool ends a
task."""

from __future__ import annotations

import sys
import traceback as tracebacks
from collections.abc import Sequence
from enum import IntEnum
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from amqtask import states
from amqtask.exceptions import Terminated
from amqtask.ground.plugins import WithListedNames

if TYPE_CHECKING:
    from amqtask.ground.shapes import HeaderDict, TaskBody
    from amqtask.protocol.chord import ChordPart
    from amqtask.protocol.message import Delivery, Message, PropertiesLike


_NO_HEADERS: HeaderDict = {}

# Properties that few messages have, and that only tasks read (`self.request.properties`).
_RARE = ("app_id", "message_id", "timestamp", "type", "user_id")


class Request(
    WithListedNames,
    others_names="""argsrepr eta expires group group_index ignore_result kwargsrepr name origin parent_id replaced_task_nesting
    request_dict retries root_id shadow soft_time_limit stamped_headers stamps task_id task_name time_limit""",
):
    """A delivery that is going to run.

    `number` is unique within the worker process (the same task id may be there twice: a redelivery).
    `soft_limit` and `hard_limit` are seconds or None. `decoded` is (args, kwargs, embed) when the body
    needs no decoding (inline calls, protocol v1); otherwise the slot decodes `body`.
    `attempts` is how often the broker has delivered the message before (0 at first).
    For a batch `decoded` is Calls, the requests of its calls; then there is neither `id`, `body` nor `delivery`.
    For a step of a chain that the broker did not deliver (worker.steps), `first` is the request that it delivered, and no step
    begins after `until` (time.monotonic; 0.0 for a delivery).
    `places` are the keys of its limits, if it has waited in this worker: first the one that it waited for.
    `delivery`, `first` and `places` stay in the worker's main process and are never sent; of the delivery's properties only the
    rare ones are sent (`rare`, None where there are none).
    """

    __slots__ = (
        "attempts",
        "body",
        "content_encoding",
        "content_type",
        "correlation_id",
        "decoded",
        "delivery",
        "exchange",
        "first",
        "hard_limit",
        "headers",
        "id",
        "is_eager",
        "number",
        "places",
        "priority",
        "queue",
        "rare",
        "redelivered",
        "reply_to",
        "routing_key",
        "soft_limit",
        "task",
        "until",
    )  # fmt: skip

    def __init__(
        self,
        *,
        number: int,
        id: str,
        task: str,
        headers: HeaderDict | None = None,
        body: bytes = b"",
        content_type: str | None = "application/json",
        content_encoding: str | None = "utf-8",
        correlation_id: str | None = None,
        reply_to: str | None = None,
        exchange: str = "",
        routing_key: str = "",
        queue: str = "",
        priority: int | None = None,
        redelivered: bool = False,
        attempts: int = 0,
        soft_limit: float | None = None,
        hard_limit: float | None = None,
        decoded: TaskBody | None = None,
        is_eager: bool = False,
        delivery: Any = None,
    ) -> None:
        self.number = number
        self.id = id
        self.task = task
        self.headers = _NO_HEADERS if headers is None else headers
        self.body = body
        self.content_type = content_type
        self.content_encoding = content_encoding
        self.correlation_id = correlation_id
        self.reply_to = reply_to
        self.exchange = exchange
        self.routing_key = routing_key
        self.queue = queue
        self.priority = priority
        self.redelivered = redelivered
        self.attempts = attempts
        self.soft_limit = soft_limit
        self.hard_limit = hard_limit
        self.decoded = decoded
        self.is_eager = is_eager
        self.delivery = delivery
        self.first: Request | None = None
        self.places: Sequence[str] = ()
        self.until = 0.0
        self.rare: dict[str, object] | None = None

    @property
    def properties(self) -> dict[str, object]:
        """The AMQP properties of the message, without its headers; rare ones only where it has them."""
        rare = self.rare if self.delivery is None else _rare_properties(self.delivery.properties)
        return {
            "correlation_id": self.correlation_id,
            "reply_to": self.reply_to,
            "content_type": self.content_type,
            "content_encoding": self.content_encoding,
            "priority": self.priority,
            **(rare or {}),
        }

    @property
    def log_fields(self) -> dict[str, object]:
        """What a log line about it says in `extra`."""
        return {"task_id": self.id, "task_name": self.task, "queue": self.queue}

    def to_frame(self) -> tuple[object, ...]:
        """All fields that are sent to another process."""
        delivery = self.delivery
        rare = self.rare if delivery is None else _rare_properties(delivery.properties)
        return (
            self.number, self.id, self.task, self.headers, self.body, self.content_type, self.content_encoding,
            self.correlation_id, self.reply_to, self.exchange, self.routing_key, self.queue, self.priority,
            self.redelivered, self.attempts, self.soft_limit, self.hard_limit, self.decoded, self.is_eager, self.until, rare,
        )  # fmt: skip

    @classmethod
    def from_frame(cls, frame: tuple[Any, ...]) -> Request:
        """The request that `to_frame` wrote."""
        self = cls.__new__(cls)
        (
            self.number, self.id, self.task, self.headers, self.body, self.content_type, self.content_encoding,
            self.correlation_id, self.reply_to, self.exchange, self.routing_key, self.queue, self.priority,
            self.redelivered, self.attempts, self.soft_limit, self.hard_limit, self.decoded, self.is_eager, self.until,
            self.rare,
        ) = frame  # fmt: skip
        self.delivery = self.first = None
        self.places = ()
        return self

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle it as `to_frame` writes it, also within an outcome."""
        return Request.from_frame, (self.to_frame(),)

    def __repr__(self) -> str:
        return f"<Request {self.task}[{self.id}] #{self.number}>"


class Calls(list[Request]):
    """The calls of a batch, in place of a decoded body."""


def calls_of(request: Request) -> Sequence[Request]:
    """The calls of a batch, or the request itself."""
    decoded: object = request.decoded
    return decoded if isinstance(decoded, Calls) else (request,)


def is_batch(request: Request) -> bool:
    """Whether it stands for the calls of a batch."""
    decoded: object = request.decoded
    return isinstance(decoded, Calls)


def request_of(message: Message | Delivery, number: int, *, task_id: str, task: str, queue: str) -> Request:
    """The request of a message; of the limits in its headers nothing is read."""
    properties = message.properties
    return Request(
        number=number,
        id=task_id,
        task=task,
        headers=properties.headers,
        body=message.body,
        content_type=properties.content_type,
        content_encoding=properties.content_encoding,
        correlation_id=properties.correlation_id,
        reply_to=properties.reply_to,
        exchange=message.exchange,
        routing_key=message.routing_key,
        queue=queue,
        priority=properties.priority,
    )


def _rare_properties(properties: PropertiesLike) -> dict[str, object] | None:
    """The rare properties that the message has. Written out: this runs for each message that goes to a child process."""
    if (
        properties.app_id
        is properties.message_id
        is properties.timestamp
        is properties.type
        is properties.user_id
        is None
    ):
        return None
    present = {name: getattr(properties, name) for name in _RARE}
    return {name: value for name, value in present.items() if value is not None}


# The state in an outcome of a request that was not let in: it waits for its turn, a moment in its worker, longer in the broker.
HELD = "HELD"
# Why a task of a cancelled workflow is revoked.
CANCELLED = "cancelled"


class Answer(IntEnum):
    """The answer to the broker for a delivery, after all else was done."""

    ACK = 0
    REQUEUE = 1  # basic.reject(requeue=True): counts towards the delivery limit
    DEAD_LETTER = 2  # publish to `<queue>.dead` with the reason, then ack
    DROP = 3  # basic.reject(requeue=False): the queue's own dead-letter policy decides


class Outcome(NamedTuple):
    """The end of one request.

    The worker publishes `publish` (retries, next steps) and `result` (a result that travels by AMQP), waits
    for the broker's confirms, and only then gives `answer`. A result for a store with a server of its
    own (Redis) was already stored by the slot. `summary` is a repr of the return value or exception, for
    logs and events; `runtime` is seconds.
    """

    number: int
    state: str = states.SUCCESS
    answer: Answer = Answer.ACK
    reason: str = ""
    publish: tuple[Message, ...] = ()
    result: Message | None = None
    runtime: float = 0.0
    summary: str = ""
    traceback: str = ""
    expected: bool = False  # an exception listed in the task's `throws`: logged without traceback
    # Seconds until a REQUEUE comes again (when the result store is away; when it was HELD).
    pause: float = 0.0
    # Parts of chords that are joined in the broker: before the answer they are published, confirmed, and the chord is looked at.
    parts: tuple[ChordPart, ...] = ()
    # `publish` is only the next step of a chain, and a redelivery could be resumed from the stored result.
    is_step: bool = False
    # The request of that step, where the slot has begun with it by itself.
    going_on: Request | None = None
    # Of a batch: the outcomes of its calls, which are all that counts.
    calls: tuple[Outcome, ...] = ()
    # Of one that was HELD: its tickets by the labels of their limits, and the keys of those that have places; first the one whose
    # places are taken, none where it waits for something else.
    tickets: dict[str, int] = {}  # noqa: RUF012 - a field of a NamedTuple, which nobody changes
    places: list[str] = []  # noqa: RUF012


# In place of a value of an encrypted message.
HIDDEN = "(hidden: the message is encrypted)"
_new = tuple.__new__
_NO_TICKETS, _NO_PLACES = Outcome._field_defaults["tickets"], Outcome._field_defaults["places"]


def of_success(
    number: int,
    runtime: float,
    summary: str = "",
    *,
    publish: tuple[Message, ...] = (),
    result: Message | None = None,
    parts: tuple[ChordPart, ...] = (),
    is_step: bool = False,
) -> Outcome:
    """`Outcome(number, …)` of a task that has succeeded, in a third of the time."""
    return _new(
        Outcome,
        (
            number, states.SUCCESS, Answer.ACK, "", publish, result, runtime, summary, "", False, 0.0, parts, is_step, None, (),
            _NO_TICKETS, _NO_PLACES,
        ),
    )  # fmt: skip


def without_values(outcome: Outcome, error: BaseException, frames: str) -> Outcome:
    """The outcome of a message whose body is private: its texts say which kind of error it was, and nothing that the error says.
    They go to logs, events and the headers of dead letters."""
    summary = f"{type(error).__name__} {HIDDEN}"
    trace = f"{frames}{summary}\n" if outcome.traceback else ""
    return outcome._replace(reason=outcome.reason and summary, summary=summary, traceback=trace)


class ErrorInfo:
    """The `einfo` of hooks and signals: an exception with its traceback as text, made while the traceback exists."""

    __slots__ = ("exception", "traceback", "type")

    def __init__(self, error: BaseException) -> None:
        self.type = type(error)
        self.exception = error
        self.traceback = _format(error)

    @property  # type: ignore[misc] # nobody sets it
    def __class__(self) -> Any:
        """Receivers of signals (of tracing libraries) check for billiard's ExceptionInfo, as in Celery: where that class is
        imported this is an instance of it."""
        billiard = sys.modules.get("billiard.einfo")
        return ErrorInfo if billiard is None else billiard.ExceptionInfo

    @property
    def tb(self) -> TracebackType | None:
        """The traceback object."""
        return self.exception.__traceback__

    @property
    def exc_info(self) -> tuple[type[BaseException], BaseException, TracebackType | None]:
        """The exception in the form of sys.exc_info()."""
        return self.type, self.exception, self.tb

    def __str__(self) -> str:
        return self.traceback

    def __reduce__(self) -> tuple[object, ...]:
        return _again, (self.exception, self.traceback)


def _format(error: BaseException) -> str:
    try:
        text = "".join(tracebacks.format_exception(type(error), error, error.__traceback__))
        # os.fsdecode makes lone surrogates of invalid bytes, which no database takes.
        return text.encode("utf-8", "backslashreplace").decode()
    except Exception as broken:  # noqa: BLE001 - a user's __str__ or __cause__; what it raised is in the text
        return f"{type(error).__qualname__} (its traceback cannot be printed: {type(broken).__name__})\n"


def frames_of(error: BaseException) -> str:
    """The traceback without what the exception says."""
    return "Traceback (most recent call last):\n" + "".join(tracebacks.format_tb(error.__traceback__))


def _again(error: BaseException, traceback: str) -> ErrorInfo:
    """Restores a pickle, which has no traceback of the exception."""
    restored = ErrorInfo(error)
    restored.traceback = traceback
    return restored


# -- raised inside a task by its pool: Terminated is a BaseException, so that a task's `except Exception` lets them pass. (The
# soft time limit, SoftTimeLimitExceeded, is an Exception on purpose: the task may handle it.)


class HardLimitReached(Terminated):
    """The hard time limit: `seconds` have passed."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"hard time limit of {seconds:g} s exceeded")
        self.seconds = seconds


class Abandoned(Terminated):
    """The pool stops and has returned the request: nothing is stored, and the outcome is dropped."""

    def __init__(self) -> None:
        super().__init__("the worker stops")
