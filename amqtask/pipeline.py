"""Pipeline: calls made one by one, published together and confirmed together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar, Token
from types import TracebackType

from amqtask.exceptions import PublishError
from amqtask.protocol.message import Message

# Messages that are published together: so many that a round trip to the broker does not count.
BURST = 1000
# Seconds that a message waits for others while calls still come: an `eta` was worked out when it was composed.
LONGEST_WAIT = 0.1

# The pipeline whose block this code was started in; callers look here first.
opened: ContextVar[Pipeline | None] = ContextVar("amqtask_pipeline", default=None)


class Pipeline:
    """What `app.pipeline()` returns. One thread (or greenlet) fills it; calls of others are published as ever.

    `failed` maps the ids of calls that the broker did not take to their errors.
    """

    def __init__(
        self,
        owner: object,
        publish_many: Callable[[Sequence[Message]], Sequence[PublishError | None]],
        on_settled: Callable[[Message, PublishError | None], object],
    ) -> None:
        self.failed: dict[str, PublishError] = {}
        self.owner = owner
        self._publish_many = publish_many
        self._on_settled = on_settled
        self._waiting: list[Message] = []
        self._since = 0.0
        self._thread = 0
        self._token: Token[Pipeline | None] | None = None

    def add(self, message: Message) -> None:
        """Publish it with the others. Raises: the PublishError of those that it completes a burst with."""
        if not self._waiting:
            self._since = time.monotonic()
        self._waiting.append(message)
        if len(self._waiting) >= BURST or time.monotonic() - self._since >= LONGEST_WAIT:
            self.flush()

    def flush(self) -> None:
        """Publish what waits, and wait until the broker has confirmed all of it. Raises: the first PublishError."""
        messages, self._waiting = self._waiting, []
        if not messages:
            return
        first: PublishError | None = None
        for message, error in zip(messages, self._publish_many(messages), strict=True):
            self._on_settled(message, error)
            if error is None:
                continue
            self.failed[message.properties.headers["id"]] = error
            first = first or error
        if first is not None:
            raise first

    def __enter__(self) -> Pipeline:
        if self._token is not None:
            raise RuntimeError("this pipeline is open already; each block takes one of its own: with app.pipeline()")
        self._thread = threading.get_ident()
        self._token = opened.set(self)
        return self

    def __exit__(
        self, exception_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """What was called is published, whether the block ended well or not: so it would have been without a pipeline."""
        token, self._token = self._token, None
        if token is not None:
            opened.reset(token)
        self.flush()

    @property
    def is_open_here(self) -> bool:
        """Whether this very code runs in its block."""
        # A task or thread that was started with a copy of the context sees the pipeline too, perhaps after its end.
        return self._token is not None and threading.get_ident() == self._thread


def find_pipeline(owner: object) -> Pipeline | None:
    """The pipeline that `owner`'s calls go through here, None outside of `with app.pipeline()`."""
    pipeline = opened.get()
    return pipeline if pipeline is not None and pipeline.owner is owner and pipeline.is_open_here else None


def flush_open() -> None:
    """Publish what waits here, before somebody waits for its result. Raises: PublishError."""
    pipeline = opened.get()
    if pipeline is not None and pipeline.is_open_here:
        pipeline.flush()
