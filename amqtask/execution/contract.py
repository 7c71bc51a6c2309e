"""The executor's view of tasks, results and routing: Protocols, so that it stands below all three."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from amqtask.execution.context import Context
    from amqtask.execution.request import Request
    from amqtask.flow.keys import FlowPlan
    from amqtask.ground.shapes import KeywordDict, SignatureFields
    from amqtask.protocol.flow_options import Batch
    from amqtask.protocol.message import Message
    from amqtask.protocol.result import ResultMessage


class TaskLike(Protocol):
    """A registered task as the executor uses it (amqtask.task.Task is one).

    `run` already takes `self` where the task is bound; the hooks are Celery's.
    Options that fall back to a setting are resolved (never None) before a worker starts, see `Task.bind`.
    """

    name: str
    is_async: bool  # `run` is a coroutine function
    ignore_result: bool
    store_errors_even_if_ignored: bool
    track_started: bool
    acks_late: bool
    acks_on_failure: bool
    acks_on_timeout: bool
    reject_on_worker_lost: bool
    max_retries: int | None
    default_retry_delay: float
    throws: tuple[type[BaseException], ...]
    autoretry_for: tuple[type[BaseException], ...]
    dont_autoretry_for: tuple[type[BaseException], ...]
    retry_kwargs: KeywordDict
    retry_backoff: float  # 0: off; else the factor in seconds
    retry_backoff_max: float
    retry_jitter: bool
    soft_time_limit: float | None
    time_limit: float | None
    deadline: float | None  # seconds from the call
    flow_plan: FlowPlan | None  # of tasks with `unique` or `limits`
    inbox: bool  # it runs in a transaction, and once
    batch: Batch | None  # its function takes many calls
    send_events: bool  # of what happens to it, where its worker sends any
    # Names of the hooks that this class overrides (of before_start, on_success, on_failure, on_retry, after_return),
    # so that the executor can skip the others without a call.
    overridden_hooks: frozenset[str]

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def run(self, *args: Any, **kwargs: Any) -> Any: ...

    def before_start(self, task_id: str, args: Any, kwargs: KeywordDict) -> None: ...

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: KeywordDict) -> None: ...

    def on_failure(self, exc: BaseException, task_id: str, args: Any, kwargs: KeywordDict, einfo: Any) -> None: ...

    def on_retry(self, exc: BaseException, task_id: str, args: Any, kwargs: KeywordDict, einfo: Any) -> None: ...

    def after_return(
        self, status: str, retval: Any, task_id: str, args: Any, kwargs: KeywordDict, einfo: Any
    ) -> None: ...

    def retry(self, *args: Any, **kwargs: Any) -> Any:
        """Raises Retry (with `sig`, the signature to publish) or the final error."""


class Composer(Protocol):
    """Builds the messages that follow from a task (the application has it); pure, no I/O."""

    def compose_retry(
        self, request: Request, context: Context, *, when: datetime | float | None, sig: object
    ) -> Message:
        """The same task id again, `retries + 1`, to the same queue, delayed (celery-facts §1.8)."""

    def compose_next(
        self,
        signature: SignatureFields,
        result: object,
        context: Context,
        chain: list[SignatureFields],
        *,
        is_bound: bool = True,
    ) -> list[Message]:
        """The messages of a callback, errback or next step of a chain; `result` is prepended to its args unless it is
        immutable. Adds their calls to `context.children`. `is_bound`: the deadline of the task that runs is theirs, too."""

    def compose_body(
        self, body: SignatureFields, values: list[object], group_id: str, parent_id: str | None
    ) -> list[Message]:
        """The messages of a chord's body, which gets the list of its header's results."""

    def compose_replacement(self, replacement: object, context: Context) -> list[Message]:
        """The messages of a signature that replaces the running task, under that task's id."""

    def compose_errback(self, errback: SignatureFields, context: Context, error: BaseException, trace: str) -> Message:
        """The message that makes a slot call an errback with (request, exc, traceback)."""


class ChordStore(Protocol):
    """A result store that counts the parts of chords (a ResultBackend may be one)."""

    def set_chord_size(self, group_id: str, size: int, body_id: str = "") -> None:
        """A header of `size` members is about to be published. With a `body_id` only calls that name it may add parts to the
        chord and end it. Raises: BackendUnreachable."""

    def add_chord_part(
        self, group_id: str, index: int | None, part: ResultMessage, body_id: str = ""
    ) -> list[Any] | None:
        """A member has ended; a member that ends again counts once. Returns all parts in order when this completes the chord
        (for the same member again, too, until `end_chord`: its worker may not have published the body), else None.

        Raises: EncodeError, BackendUnreachable."""

    def add_to_chord(self, group_id: str, task_id: str) -> None:
        """Add one member to a chord. Raises: BackendUnreachable."""

    def end_chord(self, group_id: str, body_id: str = "") -> None:
        """The body has run: forget the parts. Raises: BackendUnreachable."""


class ResultStore(Protocol):
    """Where a slot leaves results (amqtask.backends.contract.ResultBackend is one). One with `keeps_runs` is a ChainStore."""

    @property
    def blocks(self) -> bool:
        """Whether `store` waits for a server: event loops then call it in a thread."""

    @property
    def keeps_runs(self) -> bool:
        """Whether a chain can be resumed from what is stored."""

    @property
    def stores_together(self) -> bool:
        """Whether the results of a batch are stored at once; then it is a GatheringStore."""

    def message_for(self, result: ResultMessage, reply_to: str | None, correlation_id: str | None) -> Message | None:
        """The message that carries this result, for stores that live in AMQP; None for the others."""

    def store(self, result: ResultMessage) -> None:
        """Store it now, in this thread; does nothing for stores that live in AMQP.

        Raises: EncodeError (the value cannot be written), BackendUnreachable."""

    def store_briefly(self, result: ResultMessage) -> None:
        """`store`, but it gives up after seconds where `store` may try for ever when its server is away
        (`result_backend_always_retry`): for what a worker stores on its I/O loop, and for states on the way."""


class GatheringStore(ResultStore, Protocol):
    """A result store that takes several results in one round trip."""

    def packed(self, result: ResultMessage) -> bytes:
        """The result as `store_packed` takes it. Raises: EncodeError."""

    def store_packed(self, results: Sequence[tuple[str, bytes]]) -> None:
        """`store` for several: their tasks' ids, and what `packed` made of them. Raises: BackendUnreachable."""


class ChainStore(ResultStore, Protocol):
    """A result store that outlives the worker and gives back all that it was given, `extra` too: a chain whose worker was
    lost is resumed after the last step that it knows."""

    def find(self, task_id: str) -> ResultMessage | None:
        """The stored result, or None. Raises: BackendUnreachable."""
