"""The ResultBackend contract; implementations are found by URL scheme (entry-point group `amqtask.backends`)."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from amqtask import states
from amqtask.exceptions import BackendNotConfigured, EncodeError, MessageError, TimeoutError
from amqtask.ground.deadlines import arrival
from amqtask.ground.loop import exponential_backoff
from amqtask.ground.plugins import WithOthersNames
from amqtask.ground.printable import bounded_logger, described
from amqtask.protocol.result import ResultMessage, decode_result, encode_result, exception_as_dict
from amqtask.protocol.serialization import (
    LARGEST_BODY,
    content_type,
    content_types,
    dumps,
    is_private,
    is_text,
    loads,
)

if TYPE_CHECKING:
    from amqtask.ground.shapes import Options, SettingValues
    from amqtask.protocol.entities import Queue
    from amqtask.protocol.message import Message
    from amqtask.transport.url import BrokerAddress


# -- How long a result store that is away is asked again: a few seconds, or as `result_backend_always_retry` says.

logger = bounded_logger("amqtask.backends")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Pauses double from `first_pause` to `longest_pause` seconds; `jitter` takes a random part of each.

    It ends after `seconds` (None: never) or `retries`, whichever is first.
    """

    seconds: float | None = 5.0
    retries: float = math.inf
    first_pause: float = 0.05
    longest_pause: float = 1.0
    jitter: bool = False


def retrying(
    work: Callable[[], T],
    policy: RetryPolicy,
    *,
    errors: tuple[type[Exception], ...],
    is_transient: Callable[[Exception], bool],
    explain: Callable[[Exception], Exception],
) -> T:
    """What `work()` returns, called again after each of `errors` that is transient.

    Raises: what `explain(error)` makes of the last one.
    """
    give_up_at = None if policy.seconds is None else time.monotonic() + policy.seconds
    retries = 0
    while True:
        try:
            return work()
        except errors as error:
            pause = exponential_backoff(
                retries, factor=policy.first_pause, maximum=policy.longest_pause, full_jitter=policy.jitter
            )
            is_late = give_up_at is not None and time.monotonic() + pause > give_up_at
            if is_late or retries >= policy.retries or not is_transient(error):
                raise explain(error) from error
            if give_up_at is None and not retries:
                logger.warning("%s; trying again until it does", explain(error))
        time.sleep(pause)
        retries += 1


@dataclass(frozen=True, slots=True)
class BackendOptions:
    """What a backend is built from. `expires` is seconds or None (never); `accept` serializers or content types."""

    url: str
    serializer: str = "json"
    accept: frozenset[str] = frozenset({"json"})
    compression: str | None = None
    expires: float | None = 86400.0
    # Seconds that the parts of a chord are kept; None: as `expires`.
    chord_expires: float | None = None
    persistent: bool = True
    extended: bool = False
    # The broker's addresses, for the backend that lives in the broker (rpc).
    brokers: tuple[BrokerAddress, ...] = ()
    connect_timeout: float = 5.0
    # The deadline of a call (seconds) that does not say its own. Another one is no reason to open the store anew.
    publish_timeout: float | None = field(default=None, compare=False)
    transport_options: tuple[tuple[str, Any], ...] = ()
    # How long a worker goes on when the store is away (`result_backend_always_retry`); None: a few seconds.
    always_retry: RetryPolicy | None = None
    # Bytes that a result may have once it is unpacked.
    largest_body: int = LARGEST_BODY
    # The settings that only one kind of store has, by name: `database_…`, `mongodb_backend_settings` …
    settings: SettingValues = field(default_factory=dict)


ONE_BY_ONE = "this result backend stores one result after the other"
NO_GROUPS = "this result backend does not keep groups: rpc:// does not, the other result stores do (docs/results.md)"


class StoreDefaults(Protocol):
    """What a result store may leave out, and what it is then; one that derives from nothing of ours gets it when it is opened."""

    # Whether `store` waits for a server: event loops then call it in a thread.
    blocks: ClassVar[bool] = False
    # Whether it outlives the worker and gives back all that it was given, `extra` too: a chain whose worker was lost is
    # resumed after the last step that it knows.
    keeps_runs: ClassVar[bool] = False
    # Whether the store deletes expired results by itself; else `cleanup` must be called now and then.
    supports_autoexpire: ClassVar[bool] = True
    # Whether the results of a batch are stored at once: it has `packed` and `store_packed` then.
    stores_together: ClassVar[bool] = False

    def store(self, result: ResultMessage) -> None:
        """See ResultBackend: this one is the store's own."""
        raise NotImplementedError

    def packed(self, result: ResultMessage) -> bytes:
        """The result as `store_packed` takes it. Raises: EncodeError."""
        raise BackendNotConfigured(ONE_BY_ONE)

    def store_packed(self, results: Sequence[tuple[str, bytes]]) -> None:
        """`store` for several: their tasks' ids, and what `packed` made of them. Raises: BackendUnreachable."""
        raise BackendNotConfigured(ONE_BY_ONE)

    def store_briefly(self, result: ResultMessage) -> None:
        """`store`, but it gives up after seconds even with `result_backend_always_retry`: for what a worker stores on its
        I/O loop, and for states on the way."""
        self.store(result)

    # -- stores whose results travel as messages

    @property
    def reply_queue(self) -> Queue | None:
        """The queue that this process's results come to, for calls that are published later by another one."""
        return None

    def keep_reading(self) -> None:
        """Read the queue if the broker is there, in place of `prepare` for calls that are published later."""
        return

    def start_reading(self) -> None:
        """`keep_reading` for an event loop: does not wait."""
        return

    async def aprepare(self, timeout: float | None = None) -> None:
        """`prepare` for an event loop."""
        return

    # -- groups

    def save_group(self, group_id: str, members: Any) -> None:
        """Keep a group. Raises: BackendNotConfigured (it keeps none), BackendUnreachable."""
        raise BackendNotConfigured(NO_GROUPS)

    def restore_group(self, group_id: str) -> Any:
        """What `save_group` kept; None when there is nothing. Raises: as `save_group`."""
        raise BackendNotConfigured(NO_GROUPS)

    def delete_group(self, group_id: str) -> None:
        """Forget a group. Raises: as `save_group`."""
        raise BackendNotConfigured(NO_GROUPS)

    # -- chords

    def add_chord_part(
        self, group_id: str, index: int | None, part: ResultMessage, body_id: str = ""
    ) -> list[Any] | None:
        """See amqtask.execution.contract.ChordStore; a store that has this has all of it."""
        raise BackendNotConfigured("this result backend does not count the parts of chords: the broker does")

    @property
    def counts_chords(self) -> bool:
        """Whether the store is an amqtask.execution.contract.ChordStore; else chords are joined in the broker."""
        return type(self).add_chord_part is not StoreDefaults.add_chord_part


class ResultBackend(StoreDefaults, Protocol):
    """Stores and finds results. Safe across threads, greenlets and forks. What it may leave out: StoreDefaults."""

    def __init__(self, options: BackendOptions) -> None: ...

    # -- the worker's end (see execution.contract.ResultStore)

    def message_for(
        self, result: ResultMessage, reply_to: str | None, correlation_id: str | None
    ) -> Message | None: ...

    def store(self, result: ResultMessage) -> None: ...

    # -- the caller's end

    def reply_to(self) -> str:
        """What goes into the `reply_to` property of a task message ("" for stores that need none)."""

    def prepare(self, task_ids: Sequence[str], timeout: float | None = None) -> None:
        """Called before the tasks are published, so that no result can be missed. `timeout` is the call's own (seconds)."""

    def hold(self, task_id: str, holder: object) -> None:
        """Keep the result for as long as `holder` (an AsyncResult, weakly referenced) lives."""

    def sent(self, task_id: str, reply_to: str) -> None:
        """A call was published that has its result sent to `reply_to`, which `reply_to()` said before; it is held by now."""

    def find(self, task_id: str) -> ResultMessage | None:
        """The newest known result without waiting; None: nothing known (PENDING)."""

    def wait(self, task_id: str, *, timeout: float | None) -> ResultMessage:
        """Block until the result is ready. Raises: TimeoutError, BackendUnreachable."""

    async def await_result(self, task_id: str, *, timeout: float | None) -> ResultMessage: ...

    def iter_ready(self, task_ids: Sequence[str], *, timeout: float | None) -> Iterator[tuple[str, ResultMessage]]:
        """Each result as it becomes ready, without polling one by one; those that are here first.

        `timeout` is for all of them together, 0: what is here now. Raises: TimeoutError, BackendUnreachable."""

    def add_callback(self, task_id: str, callback: Callable[[ResultMessage], None]) -> None:
        """Call once when the result is ready (`AsyncResult.then`): now, or from a thread of the backend's."""

    def forget(self, task_id: str) -> None: ...

    def cleanup(self) -> None:
        """Delete what is older than `result_expires`; nothing where the store does so by itself."""

    def close(self) -> None: ...


class KnownStore(WithOthersNames, StoreDefaults):
    """A store that answers to Celery's names as well (`mark_as_done`, `get_task_meta`, `client` …); with nothing to do where it
    does not say what."""

    def message_for(self, result: ResultMessage, reply_to: str | None, correlation_id: str | None) -> Message | None:
        """None: nothing travels over AMQP."""
        return None

    def reply_to(self) -> str:
        """None needed."""
        return ""

    def prepare(self, task_ids: Sequence[str], timeout: float | None = None) -> None:
        """Nothing to prepare: who waits looks at what is stored."""

    def hold(self, task_id: str, holder: object) -> None:
        """Do nothing: the store keeps the result until it expires."""

    def sent(self, task_id: str, reply_to: str) -> None:
        """Do nothing: results go into the store."""

    def cleanup(self) -> None:
        """Do nothing: what has expired goes by itself."""

    def close(self) -> None:
        """Nothing to close."""


class PatientStore(KnownStore):
    """A store whose `store` goes on for as long as `result_backend_always_retry` says."""

    always_retry: RetryPolicy | None

    def store(self, result: ResultMessage) -> None:
        """Keep a result, unless SUCCESS is stored. Raises: EncodeError, BackendUnreachable."""
        self.keep(result, self.always_retry)

    def store_briefly(self, result: ResultMessage) -> None:
        """`store`, but it gives up after `retry_for` seconds even with `result_backend_always_retry`."""
        self.keep(result, None)

    def keep(self, result: ResultMessage, policy: RetryPolicy | None) -> None:
        """Store it, and try again as the policy says (None: for `retry_for` seconds)."""
        raise NotImplementedError


class MadeForApp:
    """A store of this kind is made as Celery makes its own, by `Class(app=…, url=…)`, not of options."""

    if TYPE_CHECKING:

        def __init__(self, *, app: Any, url: str | None) -> None: ...


# -- How one waits for a result that another thread brings, and what is said when it does not come.


def too_late(task_ids: Sequence[str], missing: int, timeout: float | None) -> TimeoutError:
    """The error for results that did not come in time."""
    seconds = f"{timeout or 0:g} s"
    if len(task_ids) == 1:
        return TimeoutError(f"no result of task {task_ids[0]} within {seconds}")
    return TimeoutError(f"{missing} of {len(task_ids)} results did not come within {seconds}")


# Called with the result, or with why there will be none.
Arrived = Callable[[ResultMessage | Exception], None]


async def await_arrival(
    task_id: str, timeout: float | None, subscribe: Callable[[Arrived], Callable[[], None]]
) -> ResultMessage:
    """The result that `arrived` is called with, from any thread, after `subscribe(arrived)`, which returns how to unsubscribe.

    Raises: TimeoutError, the error that arrived."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[ResultMessage] = loop.create_future()

    def settle(result_or_error: ResultMessage | Exception) -> None:
        if future.done():
            return
        if isinstance(result_or_error, Exception):
            future.set_exception(result_or_error)
        else:
            future.set_result(result_or_error)

    def arrived(result_or_error: ResultMessage | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed, and nobody waits there any more
            loop.call_soon_threadsafe(settle, result_or_error)

    cancel = subscribe(arrived)
    try:
        return await arrival(future, timeout)
    except asyncio.TimeoutError:
        raise too_late([task_id], 1, timeout) from None
    finally:
        cancel()


# -- How the parts of a stored result are written and read: the same for all stores that keep bytes.


class Codec:
    """Writes with `result_serializer`; reads that and what `result_accept_content` names."""

    def __init__(self, options: BackendOptions) -> None:
        self.serializer = options.serializer
        mime_type = content_type(options.serializer)
        # Whether what is written is text.
        self.is_text = is_text(mime_type)
        # Whether nobody but the holders of keys may read what is written.
        self.is_private = is_private(mime_type)
        self._format = (mime_type, "utf-8" if self.is_text else "binary")
        self._accept = content_types(options.accept) | {mime_type}

    def result(self, result: ResultMessage) -> bytes:
        """Write a whole result. Raises: EncodeError."""
        return encode_result(result, self.serializer).body

    def read_result(self, task_id: str, value: bytes) -> ResultMessage:
        """The result that was written; one that cannot be read has failed with the reason, so that its reader gets it."""
        try:
            return decode_result(value, *self._format, self._accept)
        except MessageError as error:
            return unreadable(task_id, error)

    def value(self, value: object, label: str) -> bytes:
        """Write a part of a result; `label` names it in the error. Raises: EncodeError."""
        try:
            return dumps(value, self.serializer).body
        except EncodeError as error:
            reason = error.__cause__ or error
            raise EncodeError(
                f"{label}, {described(value)}, cannot be written as {self.serializer} ({reason}); return plain data, "
                "or choose another result_serializer"
            ) from error

    def text(self, text: str | None) -> str | None:
        """A text that stands beside the result (a traceback), for a column of text. Raises: EncodeError."""
        if text is None or not self.is_private:
            return None if text is None else text.replace("\x00", "\ufffd")
        return base64.b64encode(self.value(text, "a text")).decode()

    def read_text(self, text: str | None) -> str | None:
        """Read what `text` wrote; a plain one from before results were encrypted, too. Raises: SecurityError, Undecodable."""
        if text is None or not self.is_private:
            return text
        try:
            written = base64.b64decode(text, validate=True)
        except ValueError:
            return text
        return str(self.read(written))

    def read(self, value: bytes | str) -> Any:
        """Read what `value` wrote. Raises: ContentDisallowed, Undecodable."""
        return loads(value.encode() if isinstance(value, str) else value, *self._format, self._accept)


def unreadable(task_id: str, error: Exception) -> ResultMessage:
    """The failure that stands for a stored value that is no result, or must not be read."""
    return ResultMessage(task_id, states.FAILURE, exception_as_dict(error))


def key_prefix(transport_options: Options) -> str:
    """`global_keyprefix` as it stands before Celery's keys (celery/backends/base.py)."""
    prefix = str(transport_options.get("global_keyprefix") or "")
    return f"{prefix}_" if prefix and prefix[-1] not in ":_-." else prefix
