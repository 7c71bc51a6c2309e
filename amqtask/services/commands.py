"""The commands of Celery's remote control, as far as they have a meaning here; each is one small function.

A command takes a Control (what it may look at and change) and the caller's arguments, and returns the payload of its
reply; None: nothing is replied. What it raises of ours is answered as `{"error": …}`.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from amqtask import __version__
from amqtask.clock import LamportClock

if TYPE_CHECKING:
    from amqtask.entities import Queue
    from amqtask.execution.request import Request
    from amqtask.services.autoscale import Autoscale
    from amqtask.services.events import EventSender
    from amqtask.worker.orders import Orders
    from amqtask.worker.worker import Worker

_SECRET_NAME = re.compile(r"passw|secret|token|credential|private|security_key|api_?key", re.IGNORECASE)
_PASSWORD_IN_URL = re.compile(r"(?P<start>[\w+.-]+://[^/\s:@]*:)[^@/\s]*@")


@dataclass(slots=True)
class Control:
    """What commands work on. `settings()` is the app's configuration; `make_queue` builds one for `add_consumer`."""

    worker: Worker
    orders: Orders
    autoscale: Autoscale | None
    settings: Callable[[bool], Mapping[str, Any]]
    make_queue: Callable[[Mapping[str, Any]], tuple[Queue, Queue | None]]
    broker_info: Mapping[str, Any]
    events: EventSender
    # The worker's one logical clock, which its events carry too.
    lamport: LamportClock = field(default_factory=LamportClock)

    @property
    def clock(self) -> int:
        """The logical time."""
        return self.lamport.value


Command = Callable[[Control, Mapping[str, Any]], Any]


# -- questions


def ping(control: Control, arguments: Mapping[str, Any]) -> Any:
    return {"ok": "pong"}


def clock(control: Control, arguments: Mapping[str, Any]) -> Any:
    return {"clock": control.clock}


def stats(control: Control, arguments: Mapping[str, Any]) -> Any:
    used = resource.getrusage(resource.RUSAGE_SELF)
    numbers = {
        **control.orders.stats(),
        "pid": os.getpid(),
        "clock": str(control.clock),
        "uptime": round(time.time() - control.worker.lifecycle.started_at),
        "broker": dict(control.broker_info),
        "rusage": {name: getattr(used, f"ru_{name}") for name in ("utime", "stime", "maxrss", "nvcsw", "nivcsw")},
    }
    if control.autoscale is not None:
        numbers["autoscaler"] = control.autoscale.info()
    return numbers


def active(control: Control, arguments: Mapping[str, Any]) -> Any:
    return [_info(control, request, is_active=True) for request in control.orders.running()]


def reserved(control: Control, arguments: Mapping[str, Any]) -> Any:
    return [_info(control, request, is_active=False) for request in control.orders.waiting()]


def scheduled(control: Control, arguments: Mapping[str, Any]) -> Any:
    """Nothing: tasks with an ETA wait in the broker."""
    return []


def revoked(control: Control, arguments: Mapping[str, Any]) -> Any:
    return list(control.worker.revoked.as_dict())


def registered(control: Control, arguments: Mapping[str, Any]) -> Any:
    fields = arguments.get("taskinfoitems") or ()
    names = sorted(control.worker.setup.tasks)
    if not arguments.get("builtins"):
        names = [name for name in names if not name.startswith("celery.")]
    return [_with_fields(name, control.worker.setup.tasks[name], fields) for name in names]


def active_queues(control: Control, arguments: Mapping[str, Any]) -> Any:
    return [_queue_info(queue) for queue in control.worker.queues if queue.name in control.worker.windows.by_queue]


def conf(control: Control, arguments: Mapping[str, Any]) -> Any:
    found = control.settings(bool(arguments.get("with_defaults")))
    return {name: masked(name, value) for name, value in found.items()}


def query_task(control: Control, arguments: Mapping[str, Any]) -> Any:
    wanted = arguments.get("ids") or ()
    ids = {wanted} if isinstance(wanted, str) else set(wanted)
    found = {
        request.id: ["reserved", _info(control, request, is_active=False)]
        for request in control.orders.waiting()
        if request.id in ids
    }
    found.update(
        (request.id, ["active", _info(control, request, is_active=True)])
        for request in control.orders.running()
        if request.id in ids
    )
    return found


def hello(control: Control, arguments: Mapping[str, Any]) -> Any:
    """A worker that starts asks its neighbours for what they know to be revoked."""
    if arguments.get("from_node") == control.worker.setup.hostname:
        return None
    known = arguments.get("revoked")
    if isinstance(known, dict):
        control.worker.revoked.update({str(key): _as_time(value) for key, value in known.items()}, time.time())
    return {"revoked": control.worker.revoked.as_dict(), "clock": control.clock}


def report(control: Control, arguments: Mapping[str, Any]) -> Any:
    lines = [
        f"software -> amqtask:{__version__} py:{platform.python_version()}",
        f"platform -> system:{platform.system()} arch:{platform.machine()} imp:{sys.implementation.name}",
        f"pool     -> {control.worker.pool.name}:{control.worker.pool.slots}",
        f"broker   -> {control.broker_info.get('url', '')}",
    ]
    return {"ok": "\n".join(lines)}


# -- orders


def revoke(control: Control, arguments: Mapping[str, Any]) -> Any:
    ids = _ids(arguments)
    ended = control.orders.revoke(ids, terminate=bool(arguments.get("terminate")))
    if arguments.get("terminate"):
        return {"ok": f"tasks {', '.join(ids)} flagged as revoked; terminated: {', '.join(ended) or 'none ran here'}"}
    return {"ok": f"tasks {', '.join(ids)} flagged as revoked"}


def terminate(control: Control, arguments: Mapping[str, Any]) -> Any:
    return revoke(control, {**arguments, "terminate": True})


def rate_limit(control: Control, arguments: Mapping[str, Any]) -> Any:
    limit = arguments.get("rate_limit")
    control.orders.set_rate_limit(str(arguments.get("task_name")), limit)
    return {"ok": "new rate limit set successfully" if limit else "rate limit disabled successfully"}


def time_limit(control: Control, arguments: Mapping[str, Any]) -> Any:
    control.orders.set_time_limits(
        str(arguments.get("task_name")), soft=arguments.get("soft"), hard=arguments.get("hard")
    )
    return {"ok": "time limits set successfully"}


def pool_grow(control: Control, arguments: Mapping[str, Any]) -> Any:
    return _resized(control, int(arguments.get("n") or 1))


def pool_shrink(control: Control, arguments: Mapping[str, Any]) -> Any:
    return _resized(control, -int(arguments.get("n") or 1))


def autoscale(control: Control, arguments: Mapping[str, Any]) -> Any:
    if control.autoscale is None:
        return {"error": "autoscale is not enabled in this worker (start it with --autoscale=MAX,MIN)"}
    most, least = control.autoscale.set_bounds(arguments.get("max"), arguments.get("min"))
    return {"ok": f"autoscale now max={most} min={least}"}


def add_consumer(control: Control, arguments: Mapping[str, Any]) -> Any:
    queue, dead_letter = control.make_queue(arguments)
    control.orders.consume(queue, dead_letter)
    return {"ok": f"add consumer {queue.name}"}


def cancel_consumer(control: Control, arguments: Mapping[str, Any]) -> Any:
    name = str(arguments.get("queue"))
    was_consumed = control.orders.cancel(name)
    return {"ok": f"no longer consuming from {name}" if was_consumed else f"was not consuming from {name}"}


def shutdown(control: Control, arguments: Mapping[str, Any]) -> Any:
    control.orders.shut_down()


def enable_events(control: Control, arguments: Mapping[str, Any]) -> Any:
    return {"ok": "task events enabled" if control.events.enable() else "task events already enabled"}


def disable_events(control: Control, arguments: Mapping[str, Any]) -> Any:
    return {"ok": "task events disabled" if control.events.disable() else "task events already disabled"}


def heartbeat(control: Control, arguments: Mapping[str, Any]) -> Any:
    control.events.beat_now()


def pool_restart(control: Control, arguments: Mapping[str, Any]) -> Any:
    return {"error": "pool restarts are not supported; restart the worker"}


COMMANDS: dict[str, Command] = {
    "active": active,
    "active_queues": active_queues,
    "add_consumer": add_consumer,
    "autoscale": autoscale,
    "cancel_consumer": cancel_consumer,
    "clock": clock,
    "conf": conf,
    "disable_events": disable_events,
    "enable_events": enable_events,
    "heartbeat": heartbeat,
    "hello": hello,
    "ping": ping,
    "pool_grow": pool_grow,
    "pool_restart": pool_restart,
    "pool_shrink": pool_shrink,
    "query_task": query_task,
    "rate_limit": rate_limit,
    "registered": registered,
    "report": report,
    "reserved": reserved,
    "revoke": revoke,
    "revoked": revoked,
    "scheduled": scheduled,
    "shutdown": shutdown,
    "stats": stats,
    "terminate": terminate,
    "time_limit": time_limit,
    # Celery's older names for the same questions.
    "dump_active": active,
    "dump_conf": conf,
    "dump_reserved": reserved,
    "dump_revoked": revoked,
    "dump_schedule": scheduled,
    "dump_tasks": registered,
}


def masked(name: str, value: Any) -> Any:
    """A setting's value with its secrets starred out, in a form that JSON can carry."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if _SECRET_NAME.search(name):
        return "********"
    if isinstance(value, Mapping):
        return {str(key): masked(str(key), item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [masked("", item) for item in value]
    return _PASSWORD_IN_URL.sub(r"\g<start>********@", value if isinstance(value, str) else repr(value))


def _ids(arguments: Mapping[str, Any]) -> list[str]:
    given = arguments.get("task_id") or arguments.get("task_ids") or ()
    return [given] if isinstance(given, str) else [str(each) for each in given]


def _resized(control: Control, by: int) -> Any:
    if control.autoscale is not None:
        control.autoscale.set_bounds(control.autoscale.most + by, control.autoscale.least + by)
    else:
        control.orders.resize(control.worker.pool.slots + by)
    return {"ok": "pool will grow" if by > 0 else "pool will shrink"}


def _as_time(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else time.time()


def _with_fields(name: str, task: Any, fields: Any) -> str:
    values = [f"{field}={getattr(task, field)}" for field in fields if getattr(task, field, None) is not None]
    return f"{name} [{' '.join(values)}]" if values else name


def _info(control: Control, request: Request, *, is_active: bool) -> dict[str, Any]:
    headers = request.headers
    return {
        "id": request.id,
        "name": request.task,
        "args": headers.get("argsrepr"),
        "kwargs": headers.get("kwargsrepr"),
        "type": request.task,
        "hostname": control.worker.setup.hostname,
        "time_start": control.worker.lifecycle.running_since.get(request.number) if is_active else None,
        "acknowledged": request.number in control.worker.dispatcher.early and is_active,
        "delivery_info": {
            "exchange": request.exchange,
            "routing_key": request.routing_key,
            "priority": request.priority,
            "redelivered": request.redelivered,
        },
        "worker_pid": None,
    }


def _queue_info(queue: Queue) -> dict[str, Any]:
    exchange = queue.exchange
    return {
        "name": queue.name,
        "exchange": {
            "name": exchange.name if exchange else "",
            "type": exchange.type if exchange else "direct",
            "durable": exchange.durable if exchange else True,
            "auto_delete": exchange.auto_delete if exchange else False,
        },
        "routing_key": queue.routing_key or queue.name,
        "queue_arguments": queue.argument_map,
        "durable": queue.durable,
        "exclusive": queue.exclusive,
        "auto_delete": queue.auto_delete,
        "no_ack": False,
    }
