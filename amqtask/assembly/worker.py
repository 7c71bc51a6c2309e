"""Puts the parts of a worker together: each gets what it needs in its constructor. And the relay of an application's outbox."""

from __future__ import annotations

import logging
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from amqtask import signals
from amqtask.canvas import as_signature
from amqtask.events.dispatcher import LamportClock
from amqtask.exceptions import ConfigurationError
from amqtask.execution.chain_steps import Perhaps, SharedFlag, SlotSteps, Stops
from amqtask.ground import VERSION, systemd
from amqtask.ground.django_project import uses_django
from amqtask.ground.lazy import lazy
from amqtask.ground.plugins import plugins
from amqtask.ground.printable import bounded_logger, masked_plain
from amqtask.pool import GREEN_POOLS, OnOutcomes, Pool, PoolOptions, Share, share_of
from amqtask.protocol.entities import Queue
from amqtask.protocol.serialization import content_types, control_serializer
from amqtask.remote.kept import NOTE, Pauses
from amqtask.services.autoscale import Autoscale
from amqtask.services.command_context import Control, asked_queue
from amqtask.services.elections import Elections
from amqtask.services.events import HEARTBEAT_SECONDS, EventSender
from amqtask.services.flow import Later, Leases
from amqtask.services.forwarder import Forwarder, MakeConsumer
from amqtask.services.kept_orders import Pausing, RevokeReader
from amqtask.services.panel import Panel
from amqtask.services.reloading import import_again
from amqtask.services.watchdog import STUCK_SECONDS, Watchdog
from amqtask.topology.declarations import as_consumed, base_of, dead_letter_queue
from amqtask.transport.loop import PikaLoop
from amqtask.worker.division import check_reserved
from amqtask.worker.operations import Operations
from amqtask.worker.options import WorkerSetup, WorkQueue, usable_processors
from amqtask.worker.prefetch import MAX_WINDOW
from amqtask.worker.report import Report
from amqtask.worker.revoked import MAX_IDS
from amqtask.worker.worker import Worker
from amqtask.worker.workflows import ChordJoiner

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.execution.task_plan import Wrapper
    from amqtask.ground.shapes import CommandArguments, JsonFields
    from amqtask.outbox.contract import Outbox
    from amqtask.outbox.relay import Relay
    from amqtask.protocol.message import Message
    from amqtask.services.monitoring import Monitoring
    from amqtask.topology.slots import QueueSlots
    from amqtask.transport.contract import Consumer, ConsumerListener, Delayed, LoopPublisher
    from amqtask.worker.options import Service, WorkerOptions

logger = bounded_logger("amqtask.worker")

# How long a nacked delayed message is tried on other channels, before the forwarder takes another connection.
FORWARD_PATIENCE = 2.0


def _task_wrapper() -> Wrapper | None:
    """In a Django project: have each task find its connections, language and time zone as a request does."""
    if not uses_django():
        return None
    wrapper: Wrapper = plugins().around_django_tasks()
    return wrapper


def _warn(text: str) -> None:
    logger.warning("%s", text)


def _from_environment(name: str) -> float | None:
    """A number above 0; None if the variable is not set. Raises: ConfigurationError."""
    text = os.environ.get(name)
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if number <= 0:
        raise ConfigurationError(f"the environment variable {name} is a number above 0, not {text!r}")
    return number


class WorkerBuilder:
    """Holds what several parts are made from while a worker is put together. Raises: ConfigurationError (slots of queues)."""

    def __init__(
        self,
        app: AmqTask,
        options: WorkerOptions,
        hostname: str,
        pool_class: type[Pool],
        queues: tuple[WorkQueue, ...],
        queue_slots: Mapping[str, QueueSlots],
        paused: frozenset[str] | None,
    ) -> None:
        self.app = app
        self.conf = app.conf
        self.options = options
        self.hostname = hostname
        self.pool_class = pool_class
        self.queues = queues
        self.queue_slots = queue_slots
        max_slots, min_slots = options.autoscale or (0, 0)
        self.most_slots = max_slots or None
        self.slots = max(1, min_slots) if max_slots else self.conf.worker_concurrency or usable_processors()
        self.check_slots()
        # None: the broker could not be asked, and nothing is consumed before it has been.
        self.paused = paused
        self.revokes_max = int(_from_environment("CELERY_WORKER_REVOKES_MAX") or MAX_IDS)
        self.revoke_expires = _from_environment("CELERY_WORKER_REVOKE_EXPIRES")
        self.loop = PikaLoop()
        # Whether slots describe what tasks return, for log lines and events. Monitors may ask for events at any time.
        self.describes = SharedFlag(is_on=logger.isEnabledFor(logging.INFO) or self.tells_tasks)
        self.clock = LamportClock()
        self.gate, self.later = app.runtime.make_gate(), Later()
        self.executor = app.make_executor(
            hostname, verbose=self.describes.state, wrapper=_task_wrapper(), gate=self.gate, later=self.later.call
        )
        self.stops = self.executor.stops = Stops()
        self.perhaps = Perhaps()
        self.slot_steps = SharedFlag(is_on=False)
        if self.executor.resumes_chains and self.conf.worker_chain_seconds:
            self.executor.steps = SlotSteps(
                app.tasks, self.conf.worker_chain_seconds, self.slot_steps.state, self.perhaps
            )

    def check_slots(self) -> None:
        """Raises: ConfigurationError for more reserved slots than there are."""
        first = share_of(self.pool_class, None)
        queues: dict[Share, list[str]] = {}
        for name in dict.fromkeys(base_of(work.queue.name) for work in self.queues):
            queues.setdefault(share_of(self.pool_class, name), []).append(name)
        for share, names in queues.items():
            most = (self.most_slots if share == first else None) or share.slots or self.slots
            check_reserved(self.queue_slots, names, most)

    def build(self) -> Worker:
        report = Report()
        publisher = self.publisher("results")
        monitoring = self.monitoring(publisher)
        results = monitoring.publisher if monitoring else publisher
        worker = Worker(
            self.setup(),
            loop=self.loop,
            publisher=results,
            endings=self.executor,
            report=report,
            make_pool=self.pool,
            make_consumer=lambda listener: self.consumer(listener, "consumer"),
            chord_joiner=self.chord_joiner(publisher),
            services=lambda worker: self.services(worker, monitoring),
            app=self.app,
        )
        report.sender = worker
        return worker

    @property
    def tells_tasks(self) -> bool:
        """Whether task events are sent from the beginning."""
        return bool(self.conf.worker_send_task_events or self.conf.task_history)

    def setup(self) -> WorkerSetup:
        conf, app = self.conf, self.app
        return WorkerSetup(
            hostname=self.hostname,
            queues=self.queues,
            paused=self.paused_queues(),
            queue_slots=self.queue_slots,
            tasks=app.tasks,
            delays=app.delays,
            most_slots=self.most_slots,
            prefetch=self.pinned_prefetch(),
            delivery_limit=conf.task_delivery_limit,
            # A broker closes a connection after two to three heartbeats without a sign of life.
            silence_seconds=3.0 * (conf.broker_heartbeat or 60),
            accept=content_types(conf.accept_content),
            time_limit=conf.task_time_limit,
            soft_time_limit=conf.task_soft_time_limit,
            rate_limits=self.rate_limits(),
            chain_seconds=conf.worker_chain_seconds,
            slot_steps=self.slot_steps,
            stops=self.stops,
            perhaps_revoked=self.perhaps,
            shutdown_timeout=conf.worker_shutdown_timeout,
            soft_shutdown_timeout=conf.worker_soft_shutdown_timeout or 0.0,
            soft_shutdown_on_idle=bool(conf.worker_enable_soft_shutdown_on_idle),
            term_is_quit=os.environ.get("REMAP_SIGTERM") == "SIGQUIT",
            install_signals=self.options.install_signals,
            statedb=conf.worker_state_db,
            revokes_max=self.revokes_max,
            revoke_expires=self.revoke_expires,
        )

    def paused_queues(self) -> frozenset[str]:
        """With the shards of paused ones; all, before the broker has told which."""
        names = frozenset(work.queue.name for work in self.queues)
        if self.paused is None:
            return names
        return self.paused | {name for name in names if base_of(name) in self.paused}

    def pinned_prefetch(self) -> int | None:
        """A number pins the window; None lets it adapt."""
        slots = self.most_slots or self.slots
        if self.conf.worker_disable_prefetch:
            return slots
        if self.options.prefetch is not None:
            return self.options.prefetch or MAX_WINDOW
        multiplier = self.conf.worker_prefetch_multiplier
        if multiplier is not None:
            # 0 means unlimited, as in Celery.
            return min(MAX_WINDOW, max(1, round(slots * multiplier))) if multiplier else MAX_WINDOW
        pinned = self.conf.worker_prefetch
        return None if pinned in (None, "auto") else int(pinned)

    def rate_limits(self) -> dict[str, str | float]:
        if self.conf.worker_disable_rate_limits:
            return {}
        return {name: task.rate_limit for name, task in self.app.tasks.items() if task.rate_limit}

    def pool(self, on_outcomes: OnOutcomes) -> Pool:
        options = PoolOptions(
            slots=self.slots,
            max_tasks_per_child=self.conf.worker_max_tasks_per_child,
            max_memory_per_child=self.conf.worker_max_memory_per_child,
            start_timeout=self.conf.worker_proc_alive_timeout or 10.0,
            hostname=self.hostname,
            on_child_start=self.child_started,
        )
        return self.pool_class(self.executor, self.loop, on_outcomes, options)

    def child_started(self) -> None:
        """In each new child process."""
        if signals.worker_process_init:
            signals.worker_process_init.send(sender=self.hostname)

    def consumer(self, listener: ConsumerListener, role: str, *, no_ack: bool = False) -> Consumer:
        return self.app.broker.consumer(
            self.loop,
            listener,
            name=f"{self.hostname} {role}",
            heartbeat=self.conf.broker_heartbeat,
            no_ack=no_ack,
        )

    def publisher(self, role: str) -> LoopPublisher:
        return self.app.broker.loop_publisher(
            self.loop, name=f"{self.hostname} {role}", heartbeat=self.conf.broker_heartbeat, on_warning=_warn
        )

    def chord_joiner(self, publisher: LoopPublisher) -> ChordJoiner | None:
        """Chords are joined in the broker where no store counts their parts."""
        if self.app.chord_store is not None:
            return None
        make_collector = partial(
            self.app.broker.collector,
            self.loop,
            name=f"{self.hostname} chords",
            heartbeat=self.conf.broker_heartbeat,
            beside=publisher,
            on_warning=_warn,
        )
        accept = content_types(self.conf.result_accept_content or self.conf.accept_content)
        return ChordJoiner(
            make_collector, self.executor.follow_ups, accept | content_types([self.conf.result_serializer])
        )

    def services(self, worker: Worker, monitoring: Monitoring | None) -> list[Service]:
        operations = Operations(worker)
        watchdog = Watchdog(worker)
        services: list[Service] = [watchdog]
        delayed = self.app.broker.delayed()
        if delayed is None:
            delayed = forwarder = self.forwarder()
            services.append(forwarder)
        leases: Leases | None = None
        if self.gate is not None:
            read_limits = self.app.limits.read if self.options.metrics_port is not None else None
            leases = Leases(self.loop, self.gate, self.later, lambda: worker.dispatcher.running.values(), read_limits)
            services.append(leases)
        if monitoring is not None:
            services += monitoring.services(worker, watchdog, lambda: leases.limits if leases is not None else ())
        if systemd.is_asked():
            services.append(self.notifier(worker, watchdog))
        autoscale: Autoscale | None = None
        if self.options.autoscale is not None:
            max_slots, min_slots = self.options.autoscale
            autoscale = Autoscale(worker, operations, max_slots=max_slots, min_slots=min_slots)
            services.append(autoscale)
        events = self.events(worker)
        services.append(events)
        worker.followers.append(lambda host, reason: self.telling.go_to(host, reason))
        pausing = Pausing(
            operations,
            loop=self.loop,
            pauses=Pauses(self.app.broker.note(NOTE)),
            knows=self.paused is not None,
        )
        services.append(pausing)
        if self.conf.worker_enable_remote_control:
            revokes = self.revokes(worker, operations)
            if revokes is not None:
                services.append(revokes)
            elections = self.elections()
            panel = self.panel(worker, operations, autoscale, events, elections, delayed, pausing, revokes)
            services += [elections, panel]
            worker.followers.append(panel.go_to)
        if self.conf.outbox_relay:
            services.append(build_relaying(self.app))
        if self.options.beat:
            services.append(self.beat())
        if "steps" in vars(self.app):  # of a program that was written for Celery
            services.append(plugins().celery_bootsteps(self.app, worker, self.options))
        return services

    def revokes(self, worker: Worker, operations: Operations) -> RevokeReader | None:
        """Reads what the broker keeps; its publisher is connected only while it writes."""
        publisher = self.app.broker.publisher(name=f"{self.hostname} revokes", on_warning=_warn)
        kept = self.app.runtime.kept_revokes(publisher)
        if kept is None:
            return None
        return RevokeReader(
            operations,
            worker.dispatcher,
            loop=self.loop,
            revokes=kept,
            is_ready=lambda: worker.lifecycle.is_ready,
            written=publisher.close,
        )

    def notifier(self, worker: Worker, watchdog: Watchdog) -> Service:
        """Tells systemd what this worker does; a worker that /live would call stuck is not healthy."""
        return systemd.Notifier(
            self.loop,
            is_ready=lambda: worker.lifecycle.is_ready,
            is_healthy=lambda: watchdog.stuck_for() < STUCK_SECONDS / 2,
            is_stopping=lambda: worker.is_quiet,
        )

    def forwarder(self) -> Forwarder:
        """Delayed messages; what it consumes and publishes shares a connection."""
        return Forwarder(loop=self.loop, delays=self.app.delays, make_ends=self.forwarding_ends)

    def forwarding_ends(self, listener: ConsumerListener) -> tuple[Consumer, LoopPublisher, MakeConsumer]:
        ends = self.app.broker.shared_ends(
            self.loop, name=f"{self.hostname} delays", heartbeat=self.conf.broker_heartbeat
        )
        # The consumer first: it is the first to be told that their connection is lost.
        consumer = ends.consumer(listener)
        publisher = ends.publisher(on_warning=_warn, nack_patience=FORWARD_PATIENCE)
        return consumer, publisher, partial(ends.consumer, is_second=True)

    def beat(self) -> Service:
        """The scheduler; its modules are loaded only for -B."""
        from amqtask.beat.build import embedded_beat
        from amqtask.beat.contract import BeatOptions

        return embedded_beat(
            self.app,
            BeatOptions(schedule=self.options.schedule, scheduler=self.options.scheduler),
            self.loop,
            self.hostname,
        )

    def monitoring(self, publisher: LoopPublisher) -> Monitoring | None:
        """What metrics and health need; its modules are loaded only when a port is asked for."""
        if self.options.metrics_port is None and self.options.health_port is None:
            return None
        from amqtask.services.monitoring import Monitoring

        gate = self.gate
        return Monitoring(
            self.options, self.loop, publisher, breakers=dict if gate is None else lambda: gate.breaker_states()
        )

    def events(self, worker: Worker) -> EventSender:
        interval = self.options.heartbeat_interval or HEARTBEAT_SECONDS
        return EventSender(
            worker,
            clock=self.clock,
            make_publisher=lambda: self.telling,
            exchange=self.conf.event_exchange,
            serializer=self.conf.event_serializer,
            task_events=self.tells_tasks,
            sent_events=self.app.runtime.tells_sent,
            heartbeat=None if self.options.without_heartbeat else interval,
            keeping=self.app.runtime.keeping,
            on_enabled=self.describes.turn_on,
        )

    @lazy
    def telling(self) -> LoopPublisher:
        """One connection for events and for replies to remote commands: with heartbeats it is open, so that a worker
        which is busy in its own thread (solo) does not have to connect before it can answer."""
        return self.publisher("events and replies")

    def elections(self) -> Elections:
        return Elections(
            loop=self.loop,
            make_consumer=lambda listener: self.consumer(listener, "election", no_ack=True),
            call=lambda action: as_signature(action, self.app).apply_async(),
            prefix=self.conf.control_exchange,
        )

    def panel(
        self,
        worker: Worker,
        operations: Operations,
        autoscale: Autoscale | None,
        events: EventSender,
        elections: Elections,
        delayed: Delayed,
        pausing: Pausing,
        revokes: RevokeReader | None,
    ) -> Panel:
        control = Control(
            worker=worker,
            operations=operations,
            autoscale=autoscale,
            settings=self.conf.table,
            make_queue=self.make_queue,
            make_shards=self.make_shards,
            broker_info=self.broker_info(),
            accept=content_types(self.conf.accept_content),
            app=self.app,
            report=self.report,
            reload=self.reload if self.conf.worker_pool_restarts else None,
            events=events,
            lamport=self.clock,
            elections=elections,
            heard=revokes.heard if revokes is not None else lambda command: None,
            delayed=delayed.soonest,
            delayed_blocks=delayed.blocks,
            count_delayed=delayed.count,
            drop_delayed=delayed.drop,
            release_delayed=delayed.release,
        )
        return Panel(
            control,
            loop=self.loop,
            make_consumer=lambda listener: self.consumer(listener, "control", no_ack=True),
            make_publisher=lambda: self.telling,
            accept=content_types(self.conf.accept_content),
            serializer=control_serializer(self.conf.task_serializer),
            prefix=self.conf.control_exchange,
            queue_ttl=self.conf.control_queue_ttl,
            queue_expires=self.conf.control_queue_expires,
            mingles=not self.options.without_mingle,
            on_listening=pausing.look,
        )

    def broker_info(self) -> JsonFields:
        """Under kombu's names (kombu/connection.py, `info`), without the password."""
        return {
            **self.app.broker.info(),
            "connect_timeout": self.conf.broker_connection_timeout,
            "heartbeat": self.conf.broker_heartbeat,
        }

    def report(self) -> str:
        """For a bug report, as `inspect report` answers it: versions, then the settings that were given."""
        lines = [
            f"software -> amqtask:{VERSION} py:{platform.python_version()}",
            f"platform -> system:{platform.system()} arch:{platform.machine()} "
            f"kernel version:{platform.release()} imp:{sys.implementation.name}",
            f"pool     -> {self.pool_class.name}:{self.slots}",
            f"settings -> transport:{self.app.broker.transport} broker:{self.app.broker_name} "
            f"results:{masked_plain('', self.app.backend_url or 'disabled')}",
            "",
            *(f"{name}: {masked_plain(name, value)!r}" for name, value in self.conf.table().items()),
        ]
        return "\n".join(lines)

    def reload(self, modules: Iterable[str] | None, again: bool) -> set[str]:
        """None: all modules that the configuration and the command line name."""
        if modules is None:
            modules = (*self.conf.include, *self.conf.imports, *self.options.include)
        return import_again(self.app, modules, reload=again)

    def make_queue(self, arguments: CommandArguments) -> tuple[Queue, Queue | None]:
        """The queue of `add_consumer`, and where its dead letters go. Raises: ConfigurationError."""
        queue_or_name = asked_queue(arguments, self.app.queue_defaults)
        queue = (
            as_consumed(self.app.queues[queue_or_name])
            if isinstance(queue_or_name, str)
            else self.app.queues.add(queue_or_name)
        )
        return queue, dead_letter_queue(queue, self.app.queue_defaults)

    def make_shards(self, queue: Queue) -> list[WorkQueue]:
        """The shards of a queue that has fair tasks."""
        shards = self.app.queues.with_shards([queue])[1:]
        return [WorkQueue(shard, dead_letter_queue(shard, self.app.queue_defaults)) for shard in shards]


# -- the relay of an outbox


def build_relay(app: AmqTask, *, batch: int | None = None, interval: float | None = None) -> Relay:
    """A relay of the application's outbox, ready to `run()`. Raises: ConfigurationError."""
    app.load_tasks()
    conf = app.conf
    from amqtask.outbox.relay import BATCH, Relay

    return Relay(
        _outbox(app).store(),
        app.publisher,
        app.delays,
        batch=batch or BATCH,
        interval=conf.outbox_interval if interval is None else interval,
        timeout=conf.broker_publish_timeout,
        on_sent=(lambda messages: _tell_sent(app, messages)) if app.runtime.tells_sent else None,
    )


def build_relaying(app: AmqTask) -> Service:
    """A relay in a thread, for a process that does something else. Raises: ConfigurationError."""
    from amqtask.outbox.relay import Relaying

    return Relaying(build_relay(app))


def check_relay(app: AmqTask, pool_class: type[Pool]) -> None:
    """Raises: ConfigurationError where this worker cannot relay the outbox."""
    if pool_class.name in GREEN_POOLS:
        raise ConfigurationError(
            f"a worker with the {pool_class.name} pool cannot relay the outbox: the database would block all its green threads. "
            "Run `amqtask relay` beside it."
        )
    _outbox(app)


def _tell_sent(app: AmqTask, messages: Sequence[Message]) -> None:
    """What a chord is told is no call."""
    app.sent_events.sent([message for message in messages if "task" in message.properties.headers])


def _outbox(app: AmqTask) -> Outbox:
    if app.outbox is None:
        raise ConfigurationError(
            "the application has no outbox to relay: set `outbox` (True for Django's), or make a SqlAlchemyOutbox in a module "
            "that the application's `include` or `imports` names"
        )
    return app.outbox
