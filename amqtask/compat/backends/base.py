"""`celery.backends.base`."""

from __future__ import annotations

from typing import Any, NoReturn

from amqtask.backends.values import ValueBackend as KeyValueStoreBackend
from amqtask.compat._state import get_current_task
from amqtask.exceptions import BackendNotConfigured

__all__ = ["BaseBackend", "DisabledBackend", "KeyValueStoreBackend", "get_current_task"]


class _NoBackend(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return instance is None or super().__instancecheck__(instance)


class DisabledBackend(metaclass=_NoBackend):
    """What `app.backend` is in Celery when no results are kept: None here, which `isinstance` takes for one."""

    def _is_disabled(self, *_: Any, **__: Any) -> NoReturn:
        raise BackendNotConfigured("the application keeps no results: set result_backend")

    get_state = get_status = get_result = get_traceback = get_task_meta_for = wait_for = get_many = _is_disabled


class BaseBackend:
    """For annotations."""
