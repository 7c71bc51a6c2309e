"""amqtask: a RabbitMQ-first task queue with Celery's names and messages. Public names, resolved on first use."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from amqtask.ground.plugins import register as _register

if TYPE_CHECKING:
    from amqtask.app import AmqTask, Celery
    from amqtask.calls.signature import Signature, StampingVisitor
    from amqtask.canvas import chain, chord, chunks, group, maybe_signature, signature, xmap, xstarmap
    from amqtask.client.registry import shared_task
    from amqtask.exceptions import Ignore, Reject, Retry
    from amqtask.execution.batches import BatchCall
    from amqtask.ground import VERSION as __version__
    from amqtask.ground.current import CurrentApp
    from amqtask.ground.plugins import Plugins
    from amqtask.protocol.entities import Binding, Broadcast, Exchange, Queue
    from amqtask.protocol.flow_options import Batch, Breaker, Concurrency, Fair, Rate, Unique
    from amqtask.remote.commands import control_command, inspect_command
    from amqtask.result import AsyncResult, EagerResult
    from amqtask.results import GroupResult, ResultSet, allow_join_result
    from amqtask.schedules import crontab
    from amqtask.task import Task, current_task
    from amqtask.utils import uuid

    current_app: CurrentApp[AmqTask]

# Name → the module that it is in, and `:` with the name that it has there, if that is another one.
_WHERE = {
    "AmqTask": "app",
    "AsyncResult": "result",
    "Batch": "protocol.flow_options",
    "BatchCall": "execution.batches",
    "Binding": "protocol.entities",
    "Broadcast": "protocol.entities",
    "Celery": "app",
    "Breaker": "protocol.flow_options",
    "Concurrency": "protocol.flow_options",
    "EagerResult": "result",
    "Exchange": "protocol.entities",
    "Fair": "protocol.flow_options",
    "GroupResult": "results",
    "Ignore": "exceptions",
    "Queue": "protocol.entities",
    "Rate": "protocol.flow_options",
    "Reject": "exceptions",
    "ResultSet": "results",
    "Retry": "exceptions",
    "Signature": "calls.signature",
    "StampingVisitor": "calls.signature",
    "Task": "task",
    "Unique": "protocol.flow_options",
    "allow_join_result": "results",
    "chain": "canvas",
    "chord": "canvas",
    "chunks": "canvas",
    "control_command": "remote.commands",
    "crontab": "schedules",
    "current_app": "ground.current",
    "current_task": "task",
    "group": "canvas",
    "inspect_command": "remote.commands",
    "maybe_signature": "canvas",
    "shared_task": "client.registry",
    "signature": "canvas",
    "uuid": "utils",
    "xmap": "canvas",
    "xstarmap": "canvas",
    "__version__": "ground:VERSION",
    # Only programs written for Celery ask for these.
    "VERSION": "compat.names",
    "bugreport": "compat.names",
    "registry": "compat.names",
    "subtask": "canvas:signature",
    "version_info": "compat.names:VERSION",
}

__all__ = [
    "AmqTask", "AsyncResult", "Batch", "BatchCall", "Binding", "Breaker", "Broadcast", "Celery", "Concurrency",
    "EagerResult", "Exchange", "Fair", "GroupResult", "Ignore", "Queue", "Rate", "Reject", "ResultSet", "Retry", "Signature",
    "StampingVisitor", "Task", "Unique", "__version__", "allow_join_result", "chain", "chord", "chunks",
    "control_command", "crontab", "current_app", "current_task", "group", "inspect_command", "maybe_signature",
    "shared_task", "signature", "uuid", "xmap", "xstarmap",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    from amqtask.ground.plugins import load_path  # noqa: PLC0415 - `import amqtask` alone imports next to nothing

    where = _WHERE.get(name)
    if where is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = load_path(f"amqtask.{where}" if ":" in where else f"amqtask.{where}:{name}")
    globals()[name] = value
    return value


def _plugins() -> Plugins:
    import amqtask.plugin_table

    return amqtask.plugin_table


_register(_plugins)


class _Elsewhere:
    """Modules that are only at Celery's places are found in amqtask.compat."""

    @staticmethod
    def find_spec(fullname: str, path: object = None, target: object = None) -> Any:
        if not fullname.startswith("amqtask.") or fullname.startswith("amqtask.compat"):
            return None
        from amqtask.compat import Finder

        return Finder.find_spec(fullname)


sys.meta_path.append(_Elsewhere)


def __dir__() -> list[str]:
    return sorted(__all__)
