"""The commands of Celery's remote control that have a meaning here; each is one small function.

A command takes a Control (what it may look at and change) and the caller's arguments, and returns the payload of its
reply; None: no reply is sent. An AmqTaskError is answered as `{"error": …}`.
"""

from __future__ import annotations

import gc
import math
import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING, Any

from amqtask.client.registry import BUILT_IN
from amqtask.exceptions import AmqTaskError, ConfigurationError, NotRegistered
from amqtask.ground.printable import bounded_logger, masked_plain
from amqtask.ground.processes import resident_bytes
from amqtask.protocol.entities import Exchange
from amqtask.protocol.serialization import dumps, is_private
from amqtask.protocol.task import as_limit, decode_body, saferepr
from amqtask.services.command_context import Control, Later, whole
from amqtask.services.delayed import Which, as_task
from amqtask.services.revoking import hello, revoke, revoke_by_stamped_headers, revoked, terminate
from amqtask.topology.delays import TO_HEADER, waiting_priority
from amqtask.topology.slots import asked_slots
from amqtask.worker.lines import parse_rate
from amqtask.worker.strategy import bare_request

if TYPE_CHECKING:
    from amqtask.execution.request import Request
    from amqtask.ground.shapes import CommandArguments, JsonObject
    from amqtask.protocol.entities import Queue
    from amqtask.protocol.message import Delivery


# -- The form of the panel's answers: Celery's dictionaries of tasks, queues, tasks' options and resources.
#
# Sources: celery/worker/request.py (`info`), kombu's Queue.as_dict, celery/worker/worker.py (`rusage`).

# The options of each task in the answer to `registered`, by default.
TASK_FIELDS = ("exchange", "routing_key", "rate_limit")
RUSAGE = (
    "utime", "stime", "maxrss", "ixrss", "idrss", "isrss", "minflt", "majflt", "nswap", "inblock", "oublock",
    "msgsnd", "msgrcv", "nsignals", "nvcsw", "nivcsw",
)  # fmt: skip
# Larger bodies (bytes) are not decoded for an answer: the worker's loop would wait meanwhile.
LARGE = 64 * 1024
# Pickled bodies are not decoded for an answer.
_PLAIN = frozenset({"application/json", "application/x-msgpack", "application/x-yaml"})


def task_info(control: Control, request: Request, *, safe: bool) -> JsonObject:
    """One task in this worker. `safe`: its arguments as the text that came with the message."""
    running, pool = control.operations.find(request), control.worker.pool
    args, kwargs = _arguments(control, request, safe=safe)
    return {
        "id": request.id,
        "name": request.headers.get("shadow") or request.task,
        "args": args,
        "kwargs": kwargs,
        "type": request.task,
        "hostname": control.worker.setup.hostname,
        "time_start": control.operations.start_of(request) if running is not None else None,
        "acknowledged": running is not None and request.number in control.worker.deliveries.acks_early,
        "delivery_info": {
            "exchange": request.exchange,
            "routing_key": request.routing_key,
            "priority": request.priority,
            "redelivered": request.redelivered,
        },
        "worker_pid": running.pid if running is not None else None,
        **({"pool": pool.member(request.queue).name} if len(pool.members) > 1 else {}),
    }


def _arguments(control: Control, request: Request, *, safe: bool) -> tuple[object, object]:
    """The arguments; or their text, if the sender chose another text than Python's repr (usually to hide a value)."""
    headers = request.headers
    sent_reprs = headers.get("argsrepr"), headers.get("kwargsrepr")
    if is_private(request.content_type):
        return sent_reprs
    if sent_reprs != (None, None) and (safe or len(request.body) > LARGE):
        return sent_reprs
    try:
        accept = control.accept & _PLAIN
        args, kwargs, _ = request.decoded or decode_body(
            request.body, request.content_type, request.content_encoding, headers, accept, LARGE
        )
        dumps([args, kwargs], "json")
    except (AmqTaskError, TypeError, ValueError):
        return sent_reprs
    decoded = tuple(args), kwargs
    is_true = all(
        text is None or _plain(saferepr(value)) == _plain(text) for text, value in zip(sent_reprs, decoded, strict=True)
    )
    return (list(args), dict(kwargs)) if is_true else sent_reprs


def _plain(text: object) -> str:
    """The text with lists for tuples, because JSON makes lists of tuples."""
    return str(text).replace("(", "[").replace(")", "]").replace(",]", "]")


def scheduled_info(control: Control, request: Request) -> JsonObject:
    """One task that waits here for its ETA."""
    return {
        "eta": request.headers.get("eta"),
        "priority": 6,  # the priority of ETA tasks among Celery's timers
        "request": task_info(control, request, safe=False),
    }


def delayed_info(control: Control, delivery: Delivery, due: float) -> JsonObject:
    """One delayed message that this worker holds until it is due."""
    request = bare_request(delivery, 0)
    headers = request.headers
    request.exchange = str(headers.get(TO_HEADER) or "")
    request.priority = waiting_priority(delivery.properties)
    eta = datetime.fromtimestamp(due, timezone.utc).isoformat()
    return {"eta": headers.get("eta") or eta, "priority": 6, "request": task_info(control, request, safe=True)}


def queue_info(queue: Queue) -> JsonObject:
    """One queue that is consumed, with kombu's names."""
    arguments = queue.argument_map
    return {
        "name": queue.name,
        "exchange": _exchange_info(queue.exchange),
        "routing_key": queue.routing_key or queue.name,
        "queue_arguments": arguments,
        "binding_arguments": None,
        "consumer_arguments": None,
        "durable": queue.durable,
        "exclusive": queue.exclusive,
        "auto_delete": queue.auto_delete,
        "no_ack": False,
        "alias": None,
        "bindings": [
            {"exchange": binding.source.name, "routing_key": binding.routing_key, "arguments": dict(binding.arguments)}
            for binding in queue.bindings
        ],
        "no_declare": queue.passive or None,
        "expires": _seconds(arguments.get("x-expires")),
        "message_ttl": _seconds(arguments.get("x-message-ttl")),
        "max_length": arguments.get("x-max-length"),
        "max_length_bytes": arguments.get("x-max-length-bytes"),
        "max_priority": arguments.get("x-max-priority"),
    }


def _exchange_info(exchange: Exchange | None) -> JsonObject:
    return {
        "name": exchange.name if exchange else "",
        "type": exchange.type if exchange else "direct",
        "arguments": dict(exchange.arguments) if exchange else None,
        "durable": exchange.durable if exchange else True,
        "passive": exchange.passive if exchange else False,
        "auto_delete": exchange.auto_delete if exchange else False,
        "delivery_mode": None,
        "no_declare": False,
    }


def _seconds(milliseconds: object) -> float | None:
    return milliseconds / 1000 if isinstance(milliseconds, (int, float)) else None


def registered_info(name: str, task: Any, fields: Any) -> str:
    """`name [attribute=value …]` with the attributes that the task has; without private ones."""
    names = [field for field in fields or TASK_FIELDS if isinstance(field, str) and not field.startswith("_")]
    values = [f"{field}={getattr(task, field)}" for field in names if getattr(task, field, None) is not None]
    return f"{name} [{' '.join(values)}]" if values else name


def rusage() -> Mapping[str, float]:
    """The resource usage of the main process (getrusage(2))."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {name: getattr(used, f"ru_{name}") for name in RUSAGE}


# -- The memory commands memsample, memdump and objgraph, in the form of Celery's answers (celery/utils/debug.py).

_UNITS = ((2**40, "TB"), (2**30, "GB"), (2**20, "MB"), (2**10, "KB"))


def resident_memory() -> str:
    """The resident memory of this process as text; where that is not available, the most that it ever had."""
    return humanized(resident_bytes())


def humanized(size: int) -> str:
    """Bytes as `12.3MB`."""
    for unit, name in _UNITS:
        if size >= unit:
            return f"{size / unit:.5g}{name}"
    return f"{size}b"


def dump_samples(samples: Sequence[str], limit: int) -> str:
    """At most `limit` of the samples, evenly taken, and the memory in use after a garbage collection."""
    kept = list(samples)
    if len(kept) > limit > 0:
        kept = [kept[index * len(kept) // limit] for index in range(limit)]
    gc.collect()
    lines = ["- rss (sample):", *(f"-    > {sample}," for sample in kept)] if kept else []
    return "\n".join([*lines, f"- rss (end): {resident_memory()}.", ""])


def draw_references(type_name: str, *, limit: int, depth: int) -> str:
    """Draw the references to objects of a type into a PNG file; its name. The worker waits meanwhile.

    Raises: ConfigurationError when objgraph is not installed.
    """
    import tempfile

    try:
        import objgraph
    except ImportError as error:
        raise ConfigurationError("objgraph is not installed on the worker: pip install objgraph") from error
    objects = objgraph.by_type(type_name)[:limit]
    with tempfile.NamedTemporaryFile(prefix="cobjg", suffix=".png", delete=False) as file:
        objgraph.show_backrefs(
            objects, max_depth=depth, highlight=lambda candidate: candidate in objects, filename=file.name
        )
        return file.name


logger = bounded_logger("amqtask.worker")


# Delayed tasks in one answer; places that one question about them may name, and attributes that one about tasks may.
MOST_DELAYED = 500
MOST_ADDRESSES, MOST_FIELDS = 1_000, 100
# More slots than these are a slip: in one order to grow or shrink; and in all.
MOST_MORE, MOST_SLOTS = 1_000, 10_000
Command = Callable[[Control, "CommandArguments"], object]


# -- questions


def ping(control: Control, arguments: CommandArguments) -> object:
    return {"ok": "pong"}


def clock(control: Control, arguments: CommandArguments) -> object:
    return {"clock": control.clock}


def stats(control: Control, arguments: CommandArguments) -> object:
    numbers = {
        **control.operations.stats(),
        "pid": os.getpid(),
        "clock": str(control.clock),
        "uptime": round(time.time() - control.worker.lifecycle.started_at),
        "time": time.time(),
        "broker": dict(control.broker_info),
        "rusage": rusage(),
    }
    if control.autoscale is not None:
        numbers["autoscaler"] = control.autoscale.info()
    return numbers


def active(control: Control, arguments: CommandArguments) -> object:
    safe = bool(arguments.get("safe"))
    return [task_info(control, request, safe=safe) for request in control.operations.active()]


def reserved(control: Control, arguments: CommandArguments) -> object:
    safe = bool(arguments.get("safe"))
    return [task_info(control, request, safe=safe) for request in control.operations.reserved()]


def scheduled(control: Control, arguments: CommandArguments) -> object:
    """The tasks whose ETA is near; all other tasks with an ETA, a countdown or a retry wait in the broker."""
    soon = [scheduled_info(control, request) for request in control.operations.soon()]

    def answer(waiting: Sequence[tuple[float, Delivery]]) -> object:
        return soon + [delayed_info(control, delivery, due) for due, delivery in waiting]

    ask = partial(control.delayed, MOST_DELAYED)
    return Later(ask, answer) if control.delayed_blocks else answer(ask())


def purge_delayed(control: Control, arguments: CommandArguments) -> object:
    """What `amqtask purge` asks: how many delayed messages are held here for each of these (exchange, key); with `delete` they
    are deleted."""
    try:
        addresses = [(str(exchange), str(key)) for exchange, key in arguments.get("addresses") or ()]
    except (TypeError, ValueError):
        return {"error": "addresses are pairs of an exchange and a routing key"}
    if len(addresses) > MOST_ADDRESSES:
        return {"error": f"{len(addresses)} addresses; {MOST_ADDRESSES} at most"}
    count = control.drop_delayed if arguments.get("delete") else control.count_delayed
    return {"counts": [count(address) for address in addresses]}


def release_delayed(control: Control, arguments: CommandArguments) -> object:
    """What the console asks: have delayed messages that are held here run now, or as `revoked` ones not at all."""
    criteria = {name: arguments.get(name) for name in ("id", "task", "queue")}
    which = Which(**{name: None if value is None else str(value) for name, value in criteria.items()})
    revoked = bool(arguments.get("revoked"))
    return {"released": control.release_delayed(lambda delivery: which.has(as_task(delivery)), revoked=revoked)}


def registered(control: Control, arguments: CommandArguments) -> object:
    fields = arguments.get("taskinfoitems") or ()
    if len(fields) > MOST_FIELDS:
        return {"error": f"{len(fields)} taskinfoitems; {MOST_FIELDS} at most"}
    tasks = control.worker.setup.tasks
    names = sorted(tasks)
    if not arguments.get("builtins"):
        names = [name for name in names if not name.startswith(BUILT_IN)]
    return [registered_info(name, tasks[name], fields) for name in names]


def active_queues(control: Control, arguments: CommandArguments) -> object:
    return [queue_info(queue) for queue in control.worker.consumed]


def conf(control: Control, arguments: CommandArguments) -> object:
    settings = control.settings(bool(arguments.get("with_defaults")))
    return {name: masked_plain(name, value) for name, value in settings.items()}


def query_task(control: Control, arguments: CommandArguments) -> object:
    task_ids = arguments.get("ids") or ()
    ids = {task_ids} if isinstance(task_ids, str) else set(task_ids)
    operations = control.operations
    by_state = {"reserved": operations.reserved(), "scheduled": operations.soon(), "active": operations.active()}
    return {
        request.id: [state, task_info(control, request, safe=False)]
        for state, requests in by_state.items()
        for request in requests
        if request.id in ids
    }


def report(control: Control, arguments: CommandArguments) -> object:
    return {"ok": control.report()}


def memsample(control: Control, arguments: CommandArguments) -> object:
    sample = resident_memory()
    control.memory_samples.append(sample)
    return sample


def memdump(control: Control, arguments: CommandArguments) -> object:
    text = dump_samples(control.memory_samples, whole(arguments, "samples", 10))
    control.memory_samples.clear()
    return text


def objgraph(control: Control, arguments: CommandArguments) -> object:
    return {
        "filename": draw_references(
            str(arguments.get("type") or "Request"),
            limit=whole(arguments, "num", 200),
            depth=whole(arguments, "max_depth", 10),
        )
    }


# -- changes


def rate_limit(control: Control, arguments: CommandArguments) -> object:
    name, limit = str(arguments.get("task_name")), arguments.get("rate_limit")
    try:
        parse_rate(limit)
    except ConfigurationError as error:
        return {"error": f"Invalid rate limit string: {error}"}
    try:
        control.operations.set_rate_limit(name, limit)
    except NotRegistered:
        logger.error("Rate limit attempt for unknown task %s", name)
        return {"error": "unknown task"}
    logger.info("New rate limit for tasks of type %s: %s.", name, limit or "none")
    return {"ok": "new rate limit set successfully" if limit else "rate limit disabled successfully"}


def time_limit(control: Control, arguments: CommandArguments) -> object:
    name, soft, hard = str(arguments.get("task_name")), _limit(arguments, "soft"), _limit(arguments, "hard")
    try:
        control.operations.set_time_limits(name, soft=soft, hard=hard)
    except NotRegistered:
        logger.error("Change time limit attempt for unknown task %s", name)
        return {"error": "unknown task"}
    logger.info("New time limits for tasks of type %s: soft=%s hard=%s", name, soft, hard)
    return {"ok": "time limits set successfully"}


def _limit(arguments: CommandArguments, limit_name: str) -> float | None:
    raw_limit = arguments.get(limit_name)
    if raw_limit is None:
        return None
    try:
        seconds = float(raw_limit)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    limit = as_limit(seconds)
    if limit is None and seconds != 0:
        raise ConfigurationError(
            f"a {limit_name} time limit is a number of seconds above 0, or 0 for none, not {raw_limit!r}"
        )
    return limit


def pool_grow(control: Control, arguments: CommandArguments) -> object:
    return _resized(control, 1, arguments)


def pool_shrink(control: Control, arguments: CommandArguments) -> object:
    return _resized(control, -1, arguments)


def autoscale(control: Control, arguments: CommandArguments) -> object:
    if control.autoscale is None:
        return {"error": "Autoscale not enabled in this worker (start it with --autoscale=MAX,MIN)"}
    most, least = (whole(arguments, name, None, MOST_SLOTS) for name in ("max", "min"))
    max_slots, min_slots = control.autoscale.set_bounds(most, least)
    return {"ok": f"autoscale now max={max_slots} min={min_slots}"}


def add_consumer(control: Control, arguments: CommandArguments) -> object:
    queue, dead_letter = control.make_queue(arguments)
    asked = arguments.get("slots")
    slots = None if asked is None else asked_slots(queue.name, asked)
    # It first: when it cannot have its slots, its shards are not consumed either.
    is_consumed = control.operations.consume(queue, dead_letter, slots)
    for shard in control.make_shards(queue):
        control.operations.consume(*shard)
    name = arguments.get("queue")  # a worker's own queue of a broadcast has another, which says nothing
    if not is_consumed:
        return {"ok": f"add consumer {name}, which is paused: it is consumed when somebody resumes it"}
    return {"ok": f"add consumer {name}"}


def cancel_consumer(control: Control, arguments: CommandArguments) -> object:
    name = str(arguments.get("queue"))
    was_consumed = control.operations.cancel(name)
    return {"ok": f"no longer consuming from {name}" if was_consumed else f"was not consuming from {name}"}


def pause_queue(control: Control, arguments: CommandArguments) -> object:
    name = str(arguments.get("queue"))
    return {"ok": f"paused {name}" if control.operations.pause(name) else f"was not consuming from {name}"}


def resume_queue(control: Control, arguments: CommandArguments) -> object:
    name = str(arguments.get("queue"))
    return {"ok": f"consuming from {name}" if control.operations.resume(name) else f"{name} is none of its queues"}


def shutdown(control: Control, arguments: CommandArguments) -> None:
    control.operations.shut_down()


def enable_events(control: Control, arguments: CommandArguments) -> object:
    return {"ok": "task events enabled" if control.events.enable() else "task events already enabled"}


def disable_events(control: Control, arguments: CommandArguments) -> object:
    return {"ok": "task events disabled" if control.events.disable() else "task events already disabled"}


def heartbeat(control: Control, arguments: CommandArguments) -> None:
    control.events.beat_now()


def pool_restart(control: Control, arguments: CommandArguments) -> object:
    if control.reload is None:
        return {"error": "Pool restarts not enabled (set worker_pool_restarts = True)"}
    if arguments.get("reloader") is not None:
        return {"error": "a reloader is a function of the worker's process and cannot be sent to it"}
    reload, modules, reload_imported = control.reload, arguments.get("modules"), bool(arguments.get("reload"))
    control.operations.restart_pool(lambda: reload([modules] if isinstance(modules, str) else modules, reload_imported))
    return {"ok": "reload started"}


def election(control: Control, arguments: CommandArguments) -> object:
    if control.elections is None:
        return {"error": "this worker takes no part in elections"}
    election_id, topic = str(arguments.get("id") or ""), str(arguments.get("topic"))
    try:
        control.elections.hold(election_id, topic, arguments.get("action"))
    except ValueError as error:
        logger.error("control: election %r: %s", election_id, error)  # usually the caller asks for no answer
        return {"error": str(error)}
    return {"ok": f"standing for election {election_id}"}


def _resized(control: Control, sign: int, arguments: CommandArguments) -> object:
    by = sign * (whole(arguments, "n", 1, MOST_MORE) or 1)
    verb = "grow" if by > 0 else "shrink"
    pool = control.operations.pool(arguments.get("pool"))
    if control.autoscale is not None and pool is control.operations.pool():
        return {"error": f"pool_{verb} is not supported with autoscale. Adjust autoscale range instead."}
    if pool.slots + by > MOST_SLOTS:
        return {"error": f"{pool.slots + by} slots; {MOST_SLOTS} at most"}
    control.operations.resize(pool.slots + by, pool)
    return {"ok": f"pool will {verb}"}


_ALL: tuple[Command, ...] = (
    active, active_queues, add_consumer, autoscale, cancel_consumer, clock, conf, disable_events, election,
    enable_events, heartbeat, hello, memdump, memsample, objgraph, pause_queue, ping, pool_grow, pool_restart,
    pool_shrink, purge_delayed, release_delayed, query_task, rate_limit, registered, report, reserved,
    resume_queue, revoke, revoke_by_stamped_headers, revoked, scheduled, shutdown, stats, terminate, time_limit,
)  # fmt: skip
COMMANDS: dict[str, Command] = {
    **{function.__name__: function for function in _ALL},
    # Celery's older names of the same commands.
    "dump_active": active,
    "dump_conf": conf,
    "dump_reserved": reserved,
    "dump_revoked": revoked,
    "dump_schedule": scheduled,
    "dump_tasks": registered,
}
