"""The composition root: the only package that knows all parts, and puts workers, relays and indexers together."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING

from amqtask import signals
from amqtask.assembly.worker import WorkerBuilder, check_relay
from amqtask.assembly.worker import build_relay as build_relay
from amqtask.assembly.worker import build_relaying as build_relaying
from amqtask.client.registry import BUILT_IN
from amqtask.exceptions import ConfigurationError, LimitUnsupported, QueueNotFound
from amqtask.ground.plugins import load
from amqtask.ground.printable import bounded_logger, count, first_of, printable
from amqtask.pool import Pool, find_pool, limits_of, share_of
from amqtask.protocol.control import mailbox
from amqtask.protocol.serialization import check_usable, content_types, is_private, is_protected
from amqtask.protocol.task import as_limit
from amqtask.remote.kept import NOTE, Pauses
from amqtask.services.flow import warn_of_deadlines
from amqtask.services.kept_orders import read_pauses
from amqtask.topology.declarations import as_consumed, base_of, dead_letter_queue, direct_queue, too_many
from amqtask.topology.slots import QueueSlots, queue_slots, with_slots
from amqtask.transport.declare import LONGEST_NAME, wrong_name
from amqtask.worker.options import WorkQueue
from amqtask.worker.worker import Worker

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.history.indexer import Indexer
    from amqtask.worker.options import WorkerOptions

logger = bounded_logger("amqtask.worker")

# RabbitMQ's default consumer_timeout: a delivery that stays unanswered for longer closes the consumer's channel.
CONSUMER_TIMEOUT_SECONDS = 1800.0


def build_worker(app: AmqTask, options: WorkerOptions) -> Worker:
    """A worker that is ready to `run()`. Raises: ConfigurationError (LimitUnsupported, PoolNotFound, QueueNotFound)."""
    hostname = options.hostname or f"celery@{socket.gethostname()}"
    _check_hostname(hostname, app.conf.control_exchange)
    _override_settings(app, options)
    if signals.celeryd_init:
        signals.celeryd_init.send(
            sender=hostname,
            instance=SimpleNamespace(app=app, hostname=hostname),  # there is no worker yet
            conf=app.conf,
            options=options._asdict(),
        )
    app.import_modules()
    for module in options.include:
        load(module)
    app.finalize()
    pool_class = find_pool(options.pool or app.conf.worker_pool)
    _check_limits(app, pool_class)
    _check_protection(app)
    app.make_inbox_runs(app.tasks)  # before anything is opened: there may be no inbox
    if app.conf.outbox_relay:
        check_relay(app, pool_class)
    elif app.outbox is not None:
        logger.info(
            "calls in transactions wait in the outbox until something relays them: `amqtask relay`, or a worker or beat "
            "with --relay"
        )
    slots = _queue_slots(app, options)
    if options.exclude_queues:
        app.queues.deselect(options.exclude_queues)
    queues = _selected(app, hostname)
    _check_shares(pool_class, queues)
    summary = too_many(queue for work in queues for queue in work if queue is not None)
    if summary:
        logger.warning("this worker has %s", summary)
    if options.purge:
        _purge(app, queues)
    paused = read_pauses(Pauses(app.broker.note(NOTE)))
    worker = WorkerBuilder(app, options, hostname, pool_class, queues, slots, paused).build()
    if signals.celeryd_after_setup:
        signals.celeryd_after_setup.send(sender=hostname, instance=worker, conf=app.conf)
        # A receiver may have selected others: instance.app.amqp.queues.select_add(…).
        worker.lifecycle.queues = _selected(app, hostname)
        for work in worker.lifecycle.queues:
            if work.queue.name not in worker.work_queues:
                worker.add_queue(*work)
    return worker


def build_indexer(app: AmqTask, *, is_patient: bool = False) -> Indexer:
    """What reads kept events from the broker into the index of history, ready to `run()`. Raises: ConfigurationError."""
    from amqtask.history.indexer import Indexer

    conf, keeping = app.conf, app.runtime.history_queue
    return Indexer(
        app.history.index,
        lambda position: app.broker.tail(
            keeping, position, name=f"amqtask history {os.getpid()}@{socket.gethostname()}"
        ),
        accept=app.runtime.accepted_events,
        max_age=conf.history_max_age,
        max_bytes=conf.history_max_bytes,
        is_patient=is_patient,
    )


def _override_settings(app: AmqTask, options: WorkerOptions) -> None:
    """The command line wins over the configuration, before tasks take their defaults from it."""
    overrides = {
        "task_time_limit": options.time_limit,
        "task_soft_time_limit": options.soft_time_limit,
        "worker_concurrency": options.concurrency,
        "worker_max_tasks_per_child": options.max_tasks_per_child,
        "worker_max_memory_per_child": options.max_memory_per_child,
        "worker_prefetch_multiplier": options.prefetch_multiplier,
        "worker_disable_prefetch": options.disable_prefetch,
        "worker_state_db": options.statedb,
        "worker_send_task_events": options.task_events,
        "outbox_relay": options.relay,
    }
    for name, value in overrides.items():
        if value is not None:
            setattr(app.conf, name, value)


def _check_limits(app: AmqTask, pool_class: type[Pool]) -> None:
    """A limit that nobody would enforce is refused now, not missed later."""
    longest = 0.0
    for name, task in app.tasks.items():
        if name.startswith(BUILT_IN):
            continue
        for limit_name, limit in (("hard", as_limit(task.time_limit)), ("soft", as_limit(task.soft_time_limit))):
            if limit is None:
                continue
            longest = max(longest, limit)
            # Of several pools the one of its queue, where the task says one; else one of them must have it.
            pool = share_of(pool_class, task.queue).pool if isinstance(task.queue, str) else pool_class
            limits = limits_of(pool, is_async=task.is_async)
            if limit_name not in limits:
                has = " and ".join(sorted(limits)) or "no"
                raise LimitUnsupported(
                    f"task {name} has a {limit_name} time limit of {limit:g} s, but the {pool.name} pool has {has} "
                    "time limits for such a task. Take the limit away or choose another pool (prefork has both)."
                )
    warn_of_deadlines(app.tasks.values(), pool_class)
    if longest > CONSUMER_TIMEOUT_SECONDS:
        logger.warning(
            "a task may run for %g s, longer than RabbitMQ's default consumer_timeout of 30 minutes, after which a "
            "broker before 4.3 closes the consumer and delivers the task again. Raise consumer_timeout in rabbitmq.conf, or "
            "set x-consumer-timeout on the queue (RabbitMQ 3.12 or later).",
            longest,
        )


def _check_protection(app: AmqTask) -> None:
    """Raises: ConfigurationError for signing or encryption without keys; warns of results that say what messages hide."""
    conf = app.conf
    serializers = {task.serializer for task in app.tasks.values() if task.serializer}
    check_usable(
        {conf.task_serializer, conf.result_serializer, conf.event_serializer, *conf.accept_content, *serializers}
    )
    hidden = sorted(name for name in app.tasks.own if is_private(app.tasks[name].serializer))
    if hidden and app.backend is not None and not is_private(conf.result_serializer):
        logger.warning(
            "the messages of %s are encrypted, but what they return or raise is stored as it is: "
            "set result_serializer = 'encrypted'",
            first_of(hidden),
        )
    unread = sorted({name for name in serializers if not content_types([name]) <= content_types(conf.accept_content)})
    if any(map(is_protected, unread)):
        logger.warning("this worker has tasks whose serializer its accept_content refuses: %s", ", ".join(unread))


def _check_hostname(name: str, prefix: str) -> None:
    """Raises: ConfigurationError for a node name whose queues cannot be declared."""
    added = len(mailbox("", prefix).name)
    if reason := wrong_name(name, LONGEST_NAME - added):
        raise ConfigurationError(f"the node name {printable(name, 60)} cannot be used: it {reason} (-n, --hostname)")


def _queue_slots(app: AmqTask, options: WorkerOptions) -> dict[str, QueueSlots]:
    """The slots of queues: those in -Q, else those of the setting; what -Q names is selected. Raises: ConfigurationError."""
    slots = {base_of(name): queue_slots(text) for name, text in (app.conf.worker_queue_slots or {}).items()}
    if options.queues:
        asked = [with_slots(text, app.queues) for text in options.queues]
        app.queues.select([name for name, _ in asked])
        slots.update({base_of(name): own for name, own in asked if own is not None})
    return slots


def _selected(app: AmqTask, hostname: str) -> tuple[WorkQueue, ...]:
    queues = [as_consumed(queue) for queue in app.queues.consumed]
    if app.conf.worker_direct:
        queues.append(direct_queue(hostname))
    works = tuple(WorkQueue(queue, dead_letter_queue(queue, app.queue_defaults)) for queue in queues)
    for name in (queue.name for work in works for queue in work if queue is not None):
        if reason := wrong_name(name):
            raise ConfigurationError(f"the queue {printable(name, 60)!r} cannot be consumed: its name {reason}")
    return works


def _check_shares(pool_class: type[Pool], queues: Sequence[WorkQueue]) -> None:
    """Raises: ConfigurationError when one of several pools is for a queue that is not consumed."""
    consumed = {base_of(work.queue.name) for work in queues}
    missing = {queue for share in pool_class.shares for queue in share.queues if base_of(queue) not in consumed}
    if missing:
        raise ConfigurationError(
            f"-P gives a pool to {first_of(sorted(missing))}, which this worker does not consume: name the queue in -Q, too"
        )


def _purge(app: AmqTask, queues: Sequence[WorkQueue]) -> None:
    with app.broker.queue_jobs() as jobs:
        for work in queues:
            try:
                erased = jobs.purge(work.queue.name)
            except QueueNotFound:
                continue
            logger.warning("purge: erased %s from %s", count(erased, "message"), work.queue.name)
