"""Context: the data of a running task's call (`self.request`), and the context that is current."""

from __future__ import annotations

from collections.abc import Callable, Container
from contextvars import ContextVar
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from amqtask.flow.deadline import deadline_in
from amqtask.protocol.task import callers_headers

if TYPE_CHECKING:
    from amqtask.exceptions import Retry
    from amqtask.execution.request import Request
    from amqtask.ground.shapes import JsonObject

# Called in each task's context when it has ended (then its output without a final newline is logged).
AT_END: list[Callable[[], None]] = []
_NOTHING: dict[str, object] = {}
_EMBEDDED = {"callbacks": "callbacks", "errbacks": "errbacks", "chain": "chain", "chord": "chord"}
_HEADERS = frozenset(
    {
        "eta", "expires", "group", "group_index", "headers", "origin", "parent_id", "replaced_task_nesting", "root_id",
        "shadow", "stamped_headers", "stamps", "ignore_result",
    }
)  # fmt: skip


class Context:
    """`task.request` with Celery's fields. Any attribute may be set on it; it lasts as long as the run.

    Fields that a plain task never reads are looked up in the message's headers when they are read.
    """

    # The class attributes are the values outside of a task.
    id: str | None = None
    task: str | None = None
    args: Any = None
    kwargs: Any = None
    retries: int = 0
    hostname: str | None = None
    called_directly: bool = True
    is_eager: bool = False
    utc: bool = True
    logfile: str | None = None
    loglevel: int | None = None
    # The third element of the body.
    embed: JsonObject = _NOTHING
    # Of `ask_for_retry`.
    asked_retries: tuple[Retry, ...] = ()
    # Makes the ids of what follows from the run and has none, where each run of the call is to make the same ones.
    follow_up_id: Callable[[], str] | None = None
    # Where the result of a call of a batch is left, to be stored with the others: its id, and what is stored.
    gathered: list[tuple[str, bytes]] | None = None
    _request: Request | None = None
    # Numbers of requests that are asked to end.
    _stops: Container[int] = ()

    def __init__(self, *args: object, **fields: object) -> None:
        """Of fields, or of a mapping of them, as Celery's."""
        self.__dict__.update(*args, **fields)

    @classmethod
    def of(cls, request: Request, args: object, kwargs: object, embed: JsonObject, hostname: str) -> Context:
        """The context of a request that is about to run. Attribute by attribute: that is faster than a dictionary of them."""
        self = cls.__new__(cls)
        self.id = request.id
        self.task = request.task
        self.args = args
        self.kwargs = kwargs
        self.retries = request.headers.get("retries") or 0
        self.hostname = hostname
        self.called_directly = False
        self.is_eager = request.is_eager
        self.embed = embed
        self._request = request
        return self

    def __getattr__(self, name: str) -> Any:
        """Fields from the embed and the headers, also the caller's own headers, as in Celery."""
        if name.startswith("__"):
            raise AttributeError(name)
        if name in _EMBEDDED:
            return self.embed.get(name)
        request = self._request
        if name == "children":
            children: list[object] = []
            self.__dict__["children"] = children
            return children
        if request is None:
            if name in _HEADERS or name in _FROM_REQUEST:
                return None
            raise AttributeError(f"task.request has no field {name!r}")
        if name in _FROM_REQUEST:
            return _FROM_REQUEST[name](request)
        if name == "headers":
            headers = self.__dict__["headers"] = callers_headers(request.headers)
            return headers
        if name in request.headers or name in _HEADERS:
            return request.headers.get(name)
        raise AttributeError(f"task.request has no field {name!r}")

    if TYPE_CHECKING:

        def __setattr__(self, name: str, value: object) -> None: ...

    def get(self, name: str, default: object = None) -> Any:
        """A field, or `default`."""
        return getattr(self, name, default)

    def update(self, *args: object, **kwargs: object) -> None:
        """Set fields."""
        self.__dict__.update(*args, **kwargs)

    def clear(self) -> None:
        """Forget the fields that were set."""
        self.__dict__.clear()

    def ask_for_retry(self, retry: Retry) -> None:
        """Publish another run, although this one continues to its own end."""
        self.asked_retries += (retry,)

    def is_cancelled(self) -> bool:
        """Whether this run is asked to end."""
        request = self._request
        return request is not None and request.number in self._stops

    def is_over_at(self, when: datetime | float) -> bool:
        """Whether a retry at that time, or in so many seconds, would come after the deadline; inline nothing waits."""
        deadline = None if self._request is None or self.is_eager else deadline_in(self._request.headers)
        if deadline is None:
            return False
        if isinstance(when, datetime):
            return when.timestamp() >= deadline.timestamp()
        return datetime.now(timezone.utc) + timedelta(seconds=when) >= deadline

    @property
    def request(self) -> Request | None:
        """The request of this run; None when the task was called directly."""
        return self._request

    def __repr__(self) -> str:
        return f"<Context {self.task}[{self.id}]>"


def _delivery_info(request: Request) -> dict[str, object]:
    if request.is_eager:
        return {"is_eager": True, "exchange": None, "routing_key": None, "priority": None, "redelivered": False}
    return {
        "exchange": request.exchange,
        "routing_key": request.routing_key,
        "priority": request.priority,
        "redelivered": request.redelivered,
        "queue": request.queue,
    }


def _deadline(request: Request) -> object:
    """When the task must have ended; a header of that name that a sender wrote, where there is no deadline."""
    return deadline_in(request.headers) or request.headers.get("deadline")


def _remaining(request: Request) -> object:
    """The seconds until the deadline, below 0 when it has passed."""
    deadline = deadline_in(request.headers)
    if deadline is None:
        return request.headers.get("remaining")
    return (deadline - datetime.now(timezone.utc)).total_seconds()


_FROM_REQUEST: dict[str, Any] = {
    "deadline": _deadline,
    "remaining": _remaining,
    "delivery_info": _delivery_info,
    "correlation_id": lambda request: request.correlation_id,
    "reply_to": lambda request: request.reply_to,
    "time_limit": lambda request: request.hard_limit,
    "soft_time_limit": lambda request: request.soft_limit,
    "timelimit": lambda request: [request.hard_limit, request.soft_limit],
    "taskset": lambda request: request.headers.get("group"),
    "properties": lambda request: request.properties,
}

# Per thread, greenlet and asyncio task.
current: ContextVar[Context | None] = ContextVar("amqtask_current_context", default=None)


def current_context() -> Context | None:
    """The context of the task that runs in this thread, greenlet or asyncio task; None outside of a task."""
    return current.get()
