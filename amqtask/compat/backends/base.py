"""`celery.backends.base`."""

from __future__ import annotations

from typing import Any, NoReturn

from amqtask.backends.values import ValueBackend as KeyValueStoreBackend
from amqtask.compat._state import get_current_task
from amqtask.exceptions import BackendNotConfigured

__all__ = ["BaseBackend", "DisabledBackend", "KeyValueStoreBackend", "get_current_task"]


class DisabledBackend:
    """What `app.backend` is in Celery when no results are kept (here it is None); for `isinstance`."""

    def _is_disabled(self, *_: Any, **__: Any) -> NoReturn:
        raise BackendNotConfigured("the application keeps no results: set result_backend")

    get_state = get_status = get_result = get_traceback = get_task_meta_for = wait_for = get_many = _is_disabled


class BaseBackend:
    """For annotations."""
