"""A request, as receivers of signals get it (task_received, task_revoked): what Celery's have besides."""

from __future__ import annotations

from operator import attrgetter

from amqtask.execution.request import Request


def _header(name: str, default: object = None) -> property:
    def header(request: Request) -> object:
        value = request.headers.get(name)
        return default if value is None else value

    return property(header)


class OfRequest(Request):
    """Bound to a request."""

    __slots__ = ()

    argsrepr = _header("argsrepr", "")
    kwargsrepr = _header("kwargsrepr", "")
    eta = _header("eta")
    expires = _header("expires")
    group = _header("group")
    group_index = _header("group_index")
    ignore_result = _header("ignore_result", False)
    origin = _header("origin")
    parent_id = _header("parent_id")
    replaced_task_nesting = _header("replaced_task_nesting", 0)
    retries = _header("retries", 0)
    root_id = _header("root_id")
    shadow = _header("shadow")
    stamped_headers = _header("stamped_headers", [])
    stamps = _header("stamps", {})

    name = task_name = property(attrgetter("task"))
    task_id = property(attrgetter("id"))
    request_dict = property(attrgetter("headers"))
    time_limit = property(attrgetter("hard_limit"))
    soft_time_limit = property(attrgetter("soft_limit"))
