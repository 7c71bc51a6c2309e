"""Stores that cannot tell when a result comes, so that whoever waits asks again: the common part of all of them.

Who waits in its own thread asks there. For callbacks and coroutines one thread per process asks for all of them together;
it lives for as long as somebody waits. The pause between two questions grows from FIRST_PAUSE to `polling_interval`, and
is never shorter than what the last question took, so that a slow store is not asked all the time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple, TypeVar

from amqtask import states
from amqtask.backends.contract import (
    Arrived,
    BackendOptions,
    Codec,
    KnownStore,
    PatientStore,
    RetryPolicy,
    await_arrival,
    key_prefix,
    retrying,
    too_late,
)
from amqtask.exceptions import BackendUnreachable
from amqtask.ground.deadlines import end_of
from amqtask.ground.lazy import ByProcess
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.result import ResultMessage

logger = bounded_logger("amqtask.backends")
T = TypeVar("T")
OnResult = Callable[[ResultMessage], None]
OnError = Callable[[BackendUnreachable], None]
Read = Callable[[Sequence[str]], Iterable[ResultMessage]]
# Seconds.
FIRST_PAUSE, LONGEST_PAUSE = 0.01, 0.5
GROWTH = 1.5
CLOSED = "the result store was closed while its results were waited for"


class PollingBackend(KnownStore):
    """See amqtask.backends.contract.ResultBackend; a store adds `read`, `store`, `forget` and what it keeps for groups.

    `transport_options`: `polling_interval`, the longest pause in seconds between two questions of one who waits (0.5).
    """

    # Event loops call `store` in a thread (amqtask.execution.contract.ResultStore).
    blocks: ClassVar[bool] = True
    supports_autoexpire: ClassVar[bool] = False

    def __init__(self, options: BackendOptions) -> None:
        self._longest_pause = float(dict(options.transport_options).get("polling_interval", LONGEST_PAUSE))
        self._pollers = ByProcess(lambda: Poller(self.read_alone, self._longest_pause))

    # -- what a store adds

    def read(self, task_ids: Sequence[str]) -> Iterable[ResultMessage]:
        """The stored results of these tasks, in any order; none for tasks without one. Raises: BackendUnreachable."""
        raise NotImplementedError

    def read_alone(self, task_ids: Sequence[str]) -> Iterable[ResultMessage]:
        """`read`, as the thread calls it that asks for callbacks and coroutines."""
        return self.read(task_ids)

    def store(self, result: ResultMessage) -> None:
        """Store a result; a stored SUCCESS stays. Raises: EncodeError, BackendUnreachable."""
        raise NotImplementedError

    def forget(self, task_id: str) -> None:
        """Delete the result. Raises: BackendUnreachable."""
        raise NotImplementedError

    # -- the caller's end

    def find(self, task_id: str) -> ResultMessage | None:
        """The stored result, or None."""
        return next(iter(self.read([task_id])), None)

    def wait(self, task_id: str, *, timeout: float | None) -> ResultMessage:
        """Ask until the result is there."""
        return next(self._ready([task_id], timeout))[1]

    def iter_ready(self, task_ids: Sequence[str], *, timeout: float | None) -> Iterator[tuple[str, ResultMessage]]:
        """Each result once it is stored; of those that one look finds, the one that ended first comes first."""
        return self._ready(task_ids, timeout)

    def _ready(self, task_ids: Sequence[str], timeout: float | None) -> Iterator[tuple[str, ResultMessage]]:
        missing = set(task_ids)
        deadline = end_of(timeout)
        pause = FIRST_PAUSE
        while missing:
            asked_at = time.monotonic()
            results = _in_order(self.read(list(missing)))
            missing.difference_update(result.task_id for result in results)
            yield from ((result.task_id, result) for result in results)
            now = time.monotonic()
            if missing and deadline is not None and now >= deadline:
                raise too_late(task_ids, len(missing), timeout)
            if missing:
                pause = FIRST_PAUSE if results else min(pause * GROWTH, self._longest_pause)
                next_pause = max(pause, 0.0 if results else now - asked_at)
                time.sleep(next_pause if deadline is None else min(next_pause, deadline - now))

    async def await_result(self, task_id: str, *, timeout: float | None) -> ResultMessage:
        """`wait` for an event loop, which the polling thread wakes. Raises: TimeoutError, BackendUnreachable."""
        poller = self._pollers.get()

        def subscribe(arrived: Arrived) -> Callable[[], None]:
            waiter = poller.add(task_id, arrived, arrived)
            return lambda: poller.cancel(task_id, waiter)

        return await await_arrival(task_id, timeout, subscribe)

    def add_callback(self, task_id: str, callback: OnResult) -> None:
        """Call once when the result is stored, from the polling thread of this process."""
        self._pollers.get().add(task_id, callback)

    def close(self) -> None:
        """End the polling thread."""
        self._pollers.end(Poller.close)


class PatientBackend(PatientStore, PollingBackend):
    """A store of that kind that may be away for a while: it is asked again. A store adds what its errors mean, and `keep`.

    `transport_options`: also `retry_for`, how many seconds it may be away before callers get BackendUnreachable (5).
    """

    # What the store's library raises.
    errors: tuple[type[Exception], ...] = (OSError,)
    # How many ids one question has at most: databases limit the number of parameters.
    at_once: ClassVar[int] = 500

    def __init__(self, options: BackendOptions) -> None:
        super().__init__(options)
        self.always_retry = options.always_retry
        self._patience = RetryPolicy(seconds=float(dict(options.transport_options).get("retry_for", 5.0)))

    def read(self, task_ids: Sequence[str]) -> Iterable[ResultMessage]:
        """The stored results of these tasks, by `read_some`. Raises: BackendUnreachable."""
        starts = range(0, len(task_ids), self.at_once)
        return [result for start in starts for result in self.read_some(task_ids[start : start + self.at_once])]

    def read_some(self, task_ids: Sequence[str]) -> Iterable[ResultMessage]:
        """`read` for at most `at_once` of them, in one question."""
        raise NotImplementedError

    def is_transient(self, error: Exception) -> bool:
        """Whether another attempt may do better."""
        raise NotImplementedError

    def explain(self, error: Exception) -> Exception:
        """Our error for one of `errors`: BackendUnreachable or, for a value that it does not take, EncodeError."""
        raise NotImplementedError

    def retrying(self, work: Callable[[], T], policy: RetryPolicy | None = None) -> T:
        """What `work()` returns, called again while the store is away. Raises: what `explain` makes of its error."""
        return retrying(
            work,
            policy or self._patience,
            errors=self.errors,
            is_transient=self.is_transient,
            explain=self.explain,
        )


def _in_order(results: Iterable[ResultMessage]) -> list[ResultMessage]:
    return sorted((result for result in results if result.is_ready), key=lambda result: result.date_done or "")


class Waiter(NamedTuple):
    """Callbacks for one result, called once; without `on_error` a store that is away is asked again for ever."""

    on_result: OnResult
    on_error: OnError | None


class Poller:
    """Polls the store for the results that somebody waits for. Its thread starts with the first waiter and ends with the last."""

    def __init__(self, read: Read, longest_pause: float) -> None:
        self._read = read
        self._longest_pause = longest_pause
        self._lock = threading.Lock()
        self._waiting: dict[str, list[Waiter]] = {}
        self._woken = threading.Event()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def add(self, task_id: str, on_result: OnResult, on_error: OnError | None = None) -> Waiter:
        """Call `on_result` or `on_error` once; the waiter that is returned can be cancelled."""
        waiter = Waiter(on_result, on_error)
        with self._lock:
            self._waiting.setdefault(task_id, []).append(waiter)
            self._woken.set()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="amqtask results", daemon=True)
                self._thread.start()
        return waiter

    def cancel(self, task_id: str, waiter: Waiter) -> None:
        """Cancel a waiter."""
        with self._lock:
            waiting = self._waiting.get(task_id, [])
            if waiter in waiting:
                waiting.remove(waiter)
            if not waiting:
                self._waiting.pop(task_id, None)

    def close(self) -> None:
        """End the thread; waiters with `on_error` are called with BackendUnreachable, the others not at all."""
        with self._lock:
            self._is_closed = True
            given_up, self._waiting = self._waiting, {}
            thread = self._thread
        self._woken.set()
        for task_id, waiting in given_up.items():
            for waiter in waiting:
                if waiter.on_error is not None:
                    _call(waiter.on_error, BackendUnreachable(CLOSED), task_id)
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=5.0)

    def _run(self) -> None:
        pause = FIRST_PAUSE
        while True:
            if self._woken.is_set():
                self._woken.clear()
                pause = FIRST_PAUSE
            with self._lock:
                if not self._waiting:
                    self._thread = None
                    return
                task_ids = list(self._waiting)
            asked_at = time.monotonic()
            pause = self._ask(task_ids, pause)
            # Waiters that came meanwhile are looked for soon, but never more often than the store can answer.
            time.sleep(min(time.monotonic() - asked_at, self._longest_pause))
            self._woken.wait(pause)

    def _ask(self, task_ids: list[str], pause: float) -> float:
        """Read the results once and call who waits for them; returns the pause before the next look, in seconds."""
        try:
            results = _in_order(self._read(task_ids))
        except BackendUnreachable as error:
            self._tell(task_ids, error)
            return self._longest_pause
        except Exception:  # whatever a library raises: the thread serves all who wait
            logger.exception("results cannot be read, trying again")
            return self._longest_pause
        for result in results:
            with self._lock:
                waiting = self._waiting.pop(result.task_id, [])
            for waiter in waiting:
                _call(waiter.on_result, result, result.task_id)
        return FIRST_PAUSE if results else min(pause * GROWTH, self._longest_pause)

    def _tell(self, task_ids: list[str], error: BackendUnreachable) -> None:
        error_callbacks: list[tuple[str, OnError]] = []
        with self._lock:
            for task_id in task_ids:
                waiting = self._waiting.pop(task_id, [])
                error_callbacks += [(task_id, waiter.on_error) for waiter in waiting if waiter.on_error is not None]
                patient = [waiter for waiter in waiting if waiter.on_error is None]
                if patient:
                    self._waiting[task_id] = patient
            is_over = self._is_closed
        for task_id, on_error in error_callbacks:
            _call(on_error, error, task_id)
        if not is_over:
            logger.warning("results cannot be waited for: %s", error)


def _call(
    callback: Callable[[ResultMessage], None] | OnError,
    result_or_error: ResultMessage | BackendUnreachable,
    task_id: str,
) -> None:
    try:
        callback(result_or_error)  # type: ignore[arg-type] # each is called with its own kind
    except Exception:  # a user's callback
        logger.exception("a callback for the result of task %s failed", task_id)


# -- Stores that keep one value per key, under Celery's keys and in its encoding (celery/backends/base.py).
#
# `celery-task-meta-<id>` holds the encoded meta of a task, `celery-taskset-meta-<id>` the members of a group, after
# `global_keyprefix` if there is one.

IsFinal = Callable[[bytes], bool]


class ValueBackend(PatientBackend):
    """A store adds what it does with one key, and what its errors mean.

    `transport_options`: `global_keyprefix`, and those of `PatientBackend` and `PollingBackend`.
    """

    keeps_runs = True

    def __init__(self, options: BackendOptions) -> None:
        super().__init__(options)
        self._codec = Codec(options)
        prefix = key_prefix(dict(options.transport_options))
        self._task_prefix, self._group_prefix = f"{prefix}celery-task-meta-", f"{prefix}celery-taskset-meta-"

    # -- what a store adds

    def get_values(self, keys: Sequence[str]) -> Mapping[str, bytes]:
        """The values of those keys that have one."""
        raise NotImplementedError

    def put_value(self, key: str, value: bytes) -> None:
        """Write the value, whatever was there."""
        raise NotImplementedError

    def put_unless(self, key: str, value: bytes, is_final: IsFinal) -> None:
        """Write the value, unless there is one of which `is_final` is true; nobody else writes between look and write."""
        raise NotImplementedError

    def delete_value(self, key: str) -> None:
        """Delete the value, if there is one."""
        raise NotImplementedError

    # -- results

    def keep(self, result: ResultMessage, policy: RetryPolicy | None) -> None:
        """Write the result, unless SUCCESS is stored."""
        key, body = self._task_prefix + result.task_id, self._codec.result(result)

        def is_success(value: bytes) -> bool:
            return self._codec.read_result(result.task_id, value).status == states.SUCCESS

        self.retrying(lambda: self.put_unless(key, body, is_success), policy)

    def read(self, task_ids: Sequence[str]) -> Iterable[ResultMessage]:
        """The stored results of these tasks. Raises: BackendUnreachable."""
        keys = {self._task_prefix + task_id: task_id for task_id in task_ids}
        values = self.retrying(lambda: self.get_values(list(keys)))
        return [self._codec.read_result(keys[key], value) for key, value in values.items()]

    def forget(self, task_id: str) -> None:
        """Delete the result. Raises: BackendUnreachable."""
        self.retrying(lambda: self.delete_value(self._task_prefix + task_id))

    # -- groups

    def save_group(self, group_id: str, members: object) -> None:
        """Keep a group's results (their ids). Raises: EncodeError, BackendUnreachable."""
        body = self._codec.value({"result": members}, f"group {group_id}")
        self.retrying(lambda: self.put_value(self._group_prefix + group_id, body))

    def restore_group(self, group_id: str) -> object:
        """What `save_group`, ours or Celery's, kept; None when there is nothing. Raises: BackendUnreachable."""
        key = self._group_prefix + group_id
        body = self.retrying(lambda: self.get_values([key])).get(key)
        return None if body is None else self._codec.read(body)["result"]

    def delete_group(self, group_id: str) -> None:
        """Delete the group. Raises: BackendUnreachable."""
        self.retrying(lambda: self.delete_value(self._group_prefix + group_id))
