"""`django-cache`: results in Django's cache, under the keys and in the form of django-celery-results (its backends/cache.py).

The setting `cache_backend` (CELERY_CACHE_BACKEND) names one of CACHES, `default` else. A cache cannot say "unless it is SUCCESS",
but it can say "unless it is there": a SUCCESS is kept under a second key too, which nothing overwrites and which is read first.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from django.core.cache import InvalidCacheBackendError, caches
from django.core.cache.backends.dummy import DummyCache
from django.core.cache.backends.locmem import LocMemCache
from django.core.exceptions import ImproperlyConfigured

from amqtask import states
from amqtask.backends.contract import BackendOptions, Codec, key_prefix
from amqtask.backends.polling import PollingBackend
from amqtask.exceptions import BackendUnreachable, ConfigurationError, EncodeError
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.result import ResultMessage, exception_as_dict

if TYPE_CHECKING:
    from amqtask.ground.shapes import JsonFields

logger = bounded_logger("amqtask.backends")
RESULT, GROUP = "celery-task-meta-", "celery-taskset-meta-"
SUCCESS = "-success"


class CacheBackend(PollingBackend):
    """See amqtask.backends.contract.ResultBackend. Raises: ConfigurationError."""

    supports_autoexpire = True

    def __init__(self, options: BackendOptions) -> None:
        super().__init__(options)
        self._codec = Codec(options)
        self._alias = str(options.settings.get("cache_backend") or "default")
        self._prefix = key_prefix(dict(options.transport_options))
        self._expires = options.expires or None
        try:
            cache = caches[self._alias]
        except (ImproperlyConfigured, InvalidCacheBackendError) as error:
            raise ConfigurationError(f"results in Django's cache {self._alias!r}: {error}") from error
        if isinstance(cache, (LocMemCache, DummyCache)):
            logger.warning(
                "results are kept in Django's cache %r, a %s, which no other process can read: name one that is shared",
                self._alias,
                type(cache).__name__,
            )

    def store(self, result: ResultMessage) -> None:
        """Set the result; of several SUCCESS the first stays. Raises: EncodeError, BackendUnreachable."""
        self._codec.result(result)  # refuses what could not be read elsewhere; the cache would pickle anything
        key, meta = self._key(RESULT, result.task_id), result.as_meta()
        if result.status == states.SUCCESS and not self._keep("add", key + SUCCESS, meta):
            return
        self._keep("set", key, meta)

    def read(self, task_ids: Sequence[str]) -> Iterable[ResultMessage]:
        """One GET_MANY for all results. Raises: BackendUnreachable."""
        keys = [self._key(RESULT, task_id) for task_id in task_ids]
        by_key = self._call_cache("get_many", [*keys, *(key + SUCCESS for key in keys)])
        metas = (by_key.get(key + SUCCESS) or by_key.get(key) for key in keys)
        return [_result(meta) for meta in metas if meta is not None]

    def forget(self, task_id: str) -> None:
        """Delete the result. Raises: BackendUnreachable."""
        key = self._key(RESULT, task_id)
        self._call_cache("delete_many", [key, key + SUCCESS])

    def save_group(self, group_id: str, members: object) -> None:
        """Keep a group's results (their ids). Raises: EncodeError, BackendUnreachable."""
        self._codec.value(members, f"group {group_id}")
        self._keep("set", self._key(GROUP, group_id), {"result": members})

    def restore_group(self, group_id: str) -> object:
        """What `save_group` kept; None when there is nothing. Raises: BackendUnreachable."""
        group = self._call_cache("get", self._key(GROUP, group_id))
        return None if group is None else group["result"]

    def delete_group(self, group_id: str) -> None:
        """Delete the group. Raises: BackendUnreachable."""
        self._call_cache("delete", self._key(GROUP, group_id))

    def _key(self, key_type: str, name: str) -> str:
        return f"{self._prefix}{key_type}{name}"

    def _keep(self, method: str, key: str, value: object) -> bool:
        """Write a value; False where `add` finds the key taken. Raises: EncodeError for one that the cache refuses (it is too
        large, say), BackendUnreachable."""
        cache, trouble = caches[self._alias], "it was not kept"
        for _ in range(2):  # a connection that was cut is made again
            try:
                if getattr(cache, method)(key, value, self._expires) in (None, True):
                    return True
                if method == "add" and cache.get(key) is not None:
                    return False
            except Exception as error:  # noqa: BLE001 - each kind of cache has errors of its own
                trouble = str(error)
            if not self._is_there():
                raise BackendUnreachable(f"Django's cache {self._alias!r} does not answer: {trouble}")
        raise EncodeError(f"Django's cache {self._alias!r} does not take a result: {trouble}")

    def _is_there(self) -> bool:
        """Whether the cache keeps something small."""
        probe = f"{self._prefix}amqtask-probe-{uuid.uuid4()}"
        try:
            caches[self._alias].set(probe, 1, 60)
            return bool(caches[self._alias].get(probe) == 1)
        except Exception:  # noqa: BLE001 - see above
            return False

    def _call_cache(self, method: str, *arguments: object) -> Any:
        try:
            return getattr(caches[self._alias], method)(*arguments)
        except Exception as error:  # each kind of cache has errors of its own
            raise BackendUnreachable(f"Django's cache {self._alias!r} does not answer: {error}") from error


def _result(meta: JsonFields) -> ResultMessage:
    result = ResultMessage.from_meta(meta)
    if isinstance(result.result, BaseException):  # as Celery leaves it there
        result.result = exception_as_dict(result.result)
    return result
