"""Stores that keep one value per key, under Celery's keys and in its encoding (celery/backends/base.py).

`celery-task-meta-<id>` holds the encoded meta of a task, `celery-taskset-meta-<id>` the members of a group, after
`global_keyprefix` if there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from amqtask import states
from amqtask.backends.contract import BackendOptions, Codec, RetryPolicy, key_prefix
from amqtask.backends.polling import PatientBackend
from amqtask.protocol.result import ResultMessage

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
