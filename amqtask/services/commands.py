"""The commands of Celery's remote control that have a meaning here; each is one small function.

A command takes a Control (what it may look at and change) and the caller's arguments, and returns the payload of its
reply; None: no reply is sent. An AmqTaskError is answered as `{"error": …}`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from amqtask.client.registry import BUILT_IN
from amqtask.exceptions import ConfigurationError, NotRegistered
from amqtask.ground.printable import bounded_logger, masked_plain
from amqtask.services.answers import delayed_info, queue_info, registered_info, rusage, scheduled_info, task_info
from amqtask.services.command_context import Control
from amqtask.services.memory import draw_references, dump_samples, resident_memory
from amqtask.services.revoking import hello, revoke, revoke_by_stamped_headers, revoked, terminate
from amqtask.worker.strategy import as_limit

if TYPE_CHECKING:
    from amqtask.ground.shapes import CommandArguments

logger = bounded_logger("amqtask.worker")


# Delayed tasks in one answer.
MOST_DELAYED = 500
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
    return soon + [delayed_info(control, delivery, due) for due, delivery in control.delayed(MOST_DELAYED)]


def purge_delayed(control: Control, arguments: CommandArguments) -> object:
    """What `amqtask purge` asks: how many delayed messages are held here for each of these (exchange, key); with `delete` they
    are deleted."""
    try:
        addresses = [(str(exchange), str(key)) for exchange, key in arguments.get("addresses") or ()]
    except (TypeError, ValueError):
        return {"error": "addresses are pairs of an exchange and a routing key"}
    count = control.drop_delayed if arguments.get("delete") else control.count_delayed
    return {"counts": [count(address) for address in addresses]}


def registered(control: Control, arguments: CommandArguments) -> object:
    fields = arguments.get("taskinfoitems")
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
    text = dump_samples(control.memory_samples, int(arguments.get("samples") or 10))
    control.memory_samples.clear()
    return text


def objgraph(control: Control, arguments: CommandArguments) -> object:
    return {
        "filename": draw_references(
            str(arguments.get("type") or "Request"),
            limit=int(arguments.get("num") or 200),
            depth=int(arguments.get("max_depth") or 10),
        )
    }


# -- changes


def rate_limit(control: Control, arguments: CommandArguments) -> object:
    name, limit = str(arguments.get("task_name")), arguments.get("rate_limit")
    try:
        control.operations.set_rate_limit(name, limit)
    except NotRegistered:
        logger.error("Rate limit attempt for unknown task %s", name)
        return {"error": "unknown task"}
    except ConfigurationError as error:
        return {"error": f"Invalid rate limit string: {error}"}
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
        seconds = as_limit(float(raw_limit))
    except (TypeError, ValueError, OverflowError):
        seconds = None
    if seconds is None:
        raise ConfigurationError(f"a {limit_name} time limit is a number of seconds above 0, not {raw_limit!r}")
    return seconds


def pool_grow(control: Control, arguments: CommandArguments) -> object:
    return _resized(control, int(arguments.get("n") or 1))


def pool_shrink(control: Control, arguments: CommandArguments) -> object:
    return _resized(control, -int(arguments.get("n") or 1))


def autoscale(control: Control, arguments: CommandArguments) -> object:
    if control.autoscale is None:
        return {"error": "Autoscale not enabled in this worker (start it with --autoscale=MAX,MIN)"}
    max_slots, min_slots = control.autoscale.set_bounds(arguments.get("max"), arguments.get("min"))
    return {"ok": f"autoscale now max={max_slots} min={min_slots}"}


def add_consumer(control: Control, arguments: CommandArguments) -> object:
    queue, dead_letter = control.make_queue(arguments)
    control.operations.consume(queue, dead_letter)
    return {"ok": f"add consumer {queue.name}"}


def cancel_consumer(control: Control, arguments: CommandArguments) -> object:
    name = str(arguments.get("queue"))
    was_consumed = control.operations.cancel(name)
    return {"ok": f"no longer consuming from {name}" if was_consumed else f"was not consuming from {name}"}


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


COMMANDS: dict[str, Command] = {
    "active": active,
    "active_queues": active_queues,
    "add_consumer": add_consumer,
    "autoscale": autoscale,
    "cancel_consumer": cancel_consumer,
    "clock": clock,
    "conf": conf,
    "disable_events": disable_events,
    "election": election,
    "enable_events": enable_events,
    "heartbeat": heartbeat,
    "hello": hello,
    "memdump": memdump,
    "memsample": memsample,
    "objgraph": objgraph,
    "ping": ping,
    "pool_grow": pool_grow,
    "pool_restart": pool_restart,
    "pool_shrink": pool_shrink,
    "purge_delayed": purge_delayed,
    "query_task": query_task,
    "rate_limit": rate_limit,
    "registered": registered,
    "report": report,
    "reserved": reserved,
    "revoke": revoke,
    "revoke_by_stamped_headers": revoke_by_stamped_headers,
    "revoked": revoked,
    "scheduled": scheduled,
    "shutdown": shutdown,
    "stats": stats,
    "terminate": terminate,
    "time_limit": time_limit,
    # Celery's older names of the same commands.
    "dump_active": active,
    "dump_conf": conf,
    "dump_reserved": reserved,
    "dump_revoked": revoked,
    "dump_schedule": scheduled,
    "dump_tasks": registered,
}


def _resized(control: Control, by: int) -> object:
    verb = "grow" if by > 0 else "shrink"
    if control.autoscale is not None:
        return {"error": f"pool_{verb} is not supported with autoscale. Adjust autoscale range instead."}
    control.operations.resize(control.worker.pool.slots + by)
    return {"ok": f"pool will {verb}"}
