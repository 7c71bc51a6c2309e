"""Stores that keep one value per key, under Celery's keys and in its encoding (celery/backends/base.py).

`celery-task-meta-<id>` holds the encoded meta of a task, `celery-taskset-meta-<id>` the members of a group, after
`global_keyprefix` if there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from amqtask import states
from amqtask.backends.contract import BackendOptions, Codec, PatientStore, RetryPolicy, key_prefix, retrying
from amqtask.backends.polling import PollingBackend
from amqtask.protocol.result import ResultMessage

T = TypeVar("T")
IsFinal = Callable[[bytes], bool]


class ValueBackend(PatientStore, PollingBackend):
    """A store adds what it does with one key, and what its errors mean.

    `transport_options`: `global_keyprefix`, `retry_for`, how many seconds the store may be away before callers get
    BackendUnreachable (5), and `polling_interval`.
    """

    keeps_runs = True
    # What the store's library raises.
    errors: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, options: BackendOptions) -> None:
        super().__init__(options)
        transport_options = dict(options.transport_options)
        self._codec = Codec(options)
        prefix = key_prefix(transport_options)
        self._task_prefix, self._group_prefix = f"{prefix}celery-task-meta-", f"{prefix}celery-taskset-meta-"
        self._patience = RetryPolicy(seconds=float(transport_options.get("retry_for", 5.0)))
        self.always_retry = options.always_retry

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

    def is_transient(self, error: Exception) -> bool:
        """Whether another attempt may do better."""
        raise NotImplementedError

    def explain(self, error: Exception) -> Exception:
        """Our error for one of `errors`: BackendUnreachable or, for a value that it does not take, EncodeError."""
        raise NotImplementedError

    # -- results

    def keep(self, result: ResultMessage, policy: RetryPolicy | None) -> None:
        """Write the result, unless SUCCESS is stored."""
        key, body = self._task_prefix + result.task_id, self._codec.result(result)

        def is_success(value: bytes) -> bool:
            return self._codec.read_result(result.task_id, value).status == states.SUCCESS

        self._run(lambda: self.put_unless(key, body, is_success), policy)

    def read(self, task_ids: Sequence[str]) -> Iterable[ResultMessage]:
        """The stored results of these tasks. Raises: BackendUnreachable."""
        keys = {self._task_prefix + task_id: task_id for task_id in task_ids}
        values = self._run(lambda: self.get_values(list(keys)))
        return [self._codec.read_result(keys[key], value) for key, value in values.items()]

    def forget(self, task_id: str) -> None:
        """Delete the result. Raises: BackendUnreachable."""
        self._run(lambda: self.delete_value(self._task_prefix + task_id))

    # -- groups

    def save_group(self, group_id: str, members: object) -> None:
        """Keep a group's results (their ids). Raises: EncodeError, BackendUnreachable."""
        body = self._codec.value({"result": members}, f"group {group_id}")
        self._run(lambda: self.put_value(self._group_prefix + group_id, body))

    def restore_group(self, group_id: str) -> object:
        """What `save_group`, ours or Celery's, kept; None when there is nothing. Raises: BackendUnreachable."""
        key = self._group_prefix + group_id
        body = self._run(lambda: self.get_values([key])).get(key)
        return None if body is None else self._codec.read(body)["result"]

    def delete_group(self, group_id: str) -> None:
        """Delete the group. Raises: BackendUnreachable."""
        self._run(lambda: self.delete_value(self._group_prefix + group_id))

    def _run(self, work: Callable[[], T], policy: RetryPolicy | None = None) -> T:
        return retrying(
            work,
            policy or self._patience,
            errors=self.errors,
            is_transient=self.is_transient,
            explain=self.explain,
        )
