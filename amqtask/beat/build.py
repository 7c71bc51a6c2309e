"""Finds the store of entries, and puts a beat together: in a process that does nothing else, or on a worker's loop."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from amqtask import signals
from amqtask.beat.contract import BeatService, KeepsTime, StoreOptions
from amqtask.beat.leader import LeaderListener, Leadership, leader_queue
from amqtask.beat.scheduler import Scheduler
from amqtask.beat.sender import AppSender
from amqtask.beat.service import Beat, Clerk
from amqtask.exceptions import AccessRefused, ConfigurationError, MessageError
from amqtask.ground import systemd
from amqtask.ground.loop import OneTimer
from amqtask.ground.plugins import load_path
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.control import PREFIX, mailbox, read_command, reply_message
from amqtask.protocol.serialization import check_usable, content_types, control_serializer
from amqtask.remote.kept import NOTE, Pauses, of_beat
from amqtask.transport.contract import ConsumerListener
from amqtask.transport.loop import PikaLoop
from amqtask.worker.shutdown import EX_FAILURE, EX_OK, SignalHandlers

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.beat.contract import BeatOptions, ScheduleStore, StoreOptions
    from amqtask.pool import Loop
    from amqtask.protocol.message import Delivery
    from amqtask.transport.contract import Consumer, LoopPublisher
    from amqtask.worker.options import RunnableLoop

GROUP = "amqtask.schedule_stores"
DEFAULT = "file"
# What configurations written for Celery say.
_CELERYS = {
    "celery.beat.PersistentScheduler": "file",
    "celery.beat.Scheduler": "memory",
    "django_celery_beat.schedulers.DatabaseScheduler": "django",
}

StoreFactory = Callable[["AmqTask", "StoreOptions"], "ScheduleStore"]


def short_name(spec: str | None) -> str:
    """The name of a store, Celery's own names translated."""
    name = spec or DEFAULT
    return _CELERYS.get(name.replace(":", "."), name)


def find_store(spec: str | None) -> StoreFactory | KeepsTime:
    """The store of that name (a StoreFactory), or a class that keeps time itself (KeepsTime).

    Raises: ConfigurationError saying what there is.
    """
    name = short_name(spec)
    library_scheduler = _of_library(spec or "") if name == "django" else None
    if library_scheduler is not None:
        return library_scheduler
    points = {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}
    try:
        if name in points:
            store: Any = points[name].load()
        elif ":" in name or "." in name:
            store = load_path(name)
        else:
            names = ", ".join(sorted(points))
            raise ConfigurationError(f"no schedule store {name!r}: there are {names}; or say module:Class")
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"the schedule store {spec!r} cannot be loaded: {error}") from error
    if not isinstance(store, KeepsTime) and not (hasattr(store, "entries") and hasattr(store, "record")):
        raise ConfigurationError(
            f"{spec!r} is not a schedule store (amqtask.beat.contract.ScheduleStore): it has no entries() and record(). A "
            "scheduler class written for Celery must derive from amqtask.beat.Scheduler in place of celery.beat.Scheduler."
        )
    factory: StoreFactory | KeepsTime = store
    return factory


def _of_library(path: str) -> KeepsTime | None:
    """django-celery-beat's own scheduler, where its tables are this project's, ours are not, and it derives from amqtask.beat."""
    if "django_celery_beat.models" not in sys.modules or "amqtask.contrib.django.models" in sys.modules:
        return None
    scheduler = load_path(
        path if path.startswith("django_celery_beat") else "django_celery_beat.schedulers:DatabaseScheduler"
    )
    return scheduler if isinstance(scheduler, KeepsTime) else None


logger = bounded_logger("amqtask.beat")

# Short, so that a leader that is cut off is soon followed by another: the broker gives a connection up after two to three
# of them (https://www.rabbitmq.com/docs/heartbeats).
HEARTBEAT_SECONDS = 3
# Stores whose entries are the settings'; beats that differ in these only have the same schedule.
_SETTINGS_STORES = frozenset({"file", "memory"})


def build_beat(app: AmqTask, options: BeatOptions) -> BeatProcess:
    """A process that is ready to `run()`. Raises: ConfigurationError."""
    app.load_tasks()
    loop = PikaLoop()
    name = f"beat@{socket.gethostname()} {os.getpid()}"

    def make(on_failed: Callable[[Exception], None]) -> BeatService:
        return _beat(app, options, loop, name, on_failed=on_failed, on_start=_tell_started)

    return BeatProcess(loop, make, _pinged(app, options, loop))


def _pinged(app: AmqTask, options: BeatOptions, loop: Any) -> Pinged | None:
    is_enabled = options.remote_control
    if not (app.conf.beat_enable_remote_control if is_enabled is None else is_enabled):
        return None
    nodename = options.hostname or f"celerybeat@{socket.gethostname()}"
    return Pinged(
        nodename,
        loop=loop,
        make_transport=lambda: _transport(
            app, loop, f"{nodename} control", heartbeat=app.conf.broker_heartbeat, no_ack=True
        ),
        accept=content_types(app.conf.accept_content),
        serializer=control_serializer(app.conf.task_serializer),
        prefix=app.conf.control_exchange,
    )


def embedded_beat(app: AmqTask, options: BeatOptions, loop: Any, hostname: str) -> BeatService:
    """A service for a worker's loop. Raises: ConfigurationError."""

    def tell(beat: object) -> None:
        _tell_started(beat)
        if signals.beat_embedded_init:
            signals.beat_embedded_init.send(sender=beat)

    def failed(error: Exception) -> None:
        logger.critical("beat: this worker sends no periodic tasks: %s", error)

    return _beat(app, options, loop, f"{hostname} beat", on_failed=failed, on_start=tell)


def leader_name(app: AmqTask, scheduler: str | None) -> str:
    """The name of the queue by which the beats of one schedule know each other."""
    if app.conf.beat_leader_queue:
        return str(app.conf.beat_leader_queue)
    store = short_name(scheduler or app.conf.beat_scheduler)
    parts = ["amqtask.beat", app.main or "default", app.conf.task_default_queue]
    return ".".join([*parts, *([] if store in _SETTINGS_STORES else [store])])


def make_scheduler(app: AmqTask) -> Scheduler:
    """The scheduler that the settings ask for. Raises: ConfigurationError for a time zone that is not known."""
    conf = app.conf
    return Scheduler(app.timezone, catch_up=conf.beat_catch_up_window, deadline=conf.beat_cron_starting_deadline)


def _beat(
    app: AmqTask,
    options: BeatOptions,
    loop: Any,
    client_name: str,
    *,
    on_failed: Callable[[Exception], None],
    on_start: Callable[[Any], None],
) -> BeatService:
    conf = app.conf
    check_usable([conf.task_serializer])
    factory = find_store(options.scheduler or conf.beat_scheduler)
    if isinstance(factory, KeepsTime):
        return factory.make_beat(app, options, loop, on_start=on_start, on_failed=on_failed)
    queue = leader_queue(leader_name(app, options.scheduler), queue_type=conf.task_default_queue_type)
    make_consumer, publisher = _transport(app, loop, client_name)

    def make_leadership(listener: LeaderListener, seed: Callable[[], bytes]) -> Leadership:
        return Leadership(
            queue, loop=loop, make_consumer=make_consumer, publisher=publisher, listener=listener, seed=seed
        )

    return Beat(
        loop=loop,
        clerk=Clerk(lambda: factory(app, StoreOptions(filename=options.schedule)), loop),
        scheduler=make_scheduler(app),
        sender=AppSender(app, queue.name),
        publisher=publisher,
        make_leadership=make_leadership,
        read_paused=lambda: _read_paused(app, queue.name),
        max_interval=options.max_interval or conf.beat_max_loop_interval or None,
        on_start=on_start,
        on_failed=on_failed,
    )


def pauses_of(app: AmqTask, leader: str) -> Pauses:
    """The paused periodic tasks of the beats with this leaders' queue, as the broker keeps them."""
    return Pauses(app.broker.note(NOTE), section=of_beat(leader))


def _read_paused(app: AmqTask, leader: str) -> frozenset[str]:
    """The paused entries; none where the broker's user may not read them, as with queues. Raises: OperationalError."""
    try:
        return frozenset(pauses_of(app, leader).read())
    except AccessRefused as error:
        logger.warning("beat: what is paused may not be read, so nothing is taken for paused: %s", error)
        return frozenset()


def _transport(
    app: AmqTask, loop: Any, client_name: str, *, heartbeat: int | None = HEARTBEAT_SECONDS, no_ack: bool = False
) -> tuple[Callable[[ConsumerListener], Consumer], LoopPublisher]:
    ends = app.broker.shared_ends(loop, name=client_name, heartbeat=heartbeat, writes=True)
    publisher = ends.publisher(on_warning=lambda text: logger.warning("%s", text))
    return lambda listener: ends.consumer(listener, no_ack=no_ack), publisher


def _tell_started(beat: object) -> None:
    if signals.beat_init:
        signals.beat_init.send(sender=beat)


# -- Answers `inspect ping` as the node `celerybeat@host`, and nothing else (celery/beat.py, BeatPidbox): for health checks.
#
# It lives on beat's own loop, so that it answers is a sign that beat turns.

RETRY_SECONDS = 30.0


class Pinged(ConsumerListener):
    """Listens on a mailbox of its own; `start` and `stop`. Consumer (without acks) and publisher are made when it connects."""

    def __init__(
        self,
        nodename: str,
        *,
        loop: Loop,
        make_transport: Callable[[], tuple[Callable[[ConsumerListener], Consumer], LoopPublisher]],
        accept: frozenset[str],
        serializer: str = "json",
        prefix: str = PREFIX,
    ) -> None:
        self.nodename = nodename
        self._make_transport = make_transport
        self._accept = accept
        self._serializer = serializer
        self._mailbox = mailbox(nodename, prefix)
        self._consumer: Consumer | None = None
        self._publisher: LoopPublisher | None = None
        self._timer = OneTimer(loop)
        self._is_stopped = False

    def start(self) -> None:
        """Begin to consume the mailbox."""
        if self._consumer is None and not self._is_stopped:
            make_consumer, self._publisher = self._make_transport()
            self._consumer = make_consumer(self)
            self._consumer.add_queue(self._mailbox, prefetch=10)
            self._consumer.start()
            self._publisher.start()

    def stop(self) -> None:
        """Stop consuming, and close the connection."""
        self._is_stopped = True
        self._timer.cancel()
        self._drop()

    def _drop(self) -> None:
        consumer, self._consumer = self._consumer, None
        publisher, self._publisher = self._publisher, None
        if publisher is not None:
            publisher.stop()
        if consumer is not None:
            consumer.stop()

    # -- what the consumer tells

    def on_delivery(self, delivery: Delivery) -> None:
        """A command: only ping is for us, and an error would spoil the answers of workers."""
        try:
            command = read_command(*delivery.content, self._accept)
        except MessageError as error:
            logger.debug("beat: a message that is not a command: %s", error)
            return
        if command.method == "ping" and command.wants_reply and command.is_for(self.nodename) and self._publisher:
            reply = reply_message(command, self.nodename, {"ok": "pong"}, serializer=self._serializer)
            self._publisher.publish(reply, lambda error: None)

    def on_connection_lost(self, error: Exception) -> None:
        """The consumer connects again by itself."""
        logger.info("beat: the connection for remote control is lost: %s", error)

    def on_warning(self, text: str) -> None:
        """Log at debug level only: beat's own connection has the same warning."""
        logger.debug("beat: remote control: %s", text)

    def on_fatal(self, error: Exception) -> None:
        """No queue of that name can be had, as a rule because another beat has it: log, and try again later."""
        logger.warning(
            "beat: no answers to ping as %s, trying again later: is there another beat of that name? Give each its own "
            "(-n beat2@%%h). (%s)",
            self.nodename,
            error,
        )
        self._drop()
        if not self._is_stopped:
            self._timer.set(RETRY_SECONDS, self.start)


# Seconds that the end of the process waits for messages on their way to the broker.
STOP_SECONDS = 5.0


class BeatProcess:
    """Runs one beat until TERM, INT or QUIT, or until it cannot go on. A second signal ends it on the spot."""

    def __init__(
        self,
        loop: RunnableLoop,
        make_beat: Callable[[Callable[[Exception], None]], BeatService],
        companion: Pinged | None = None,
    ) -> None:
        self._companion = companion
        self._loop = loop
        self.beat = make_beat(self._fail)
        self.exit_code = EX_OK
        self._is_ending = False
        self._handlers = SignalHandlers(loop, self._on_signal)
        self._notifier = systemd.Notifier(loop, is_stopping=lambda: self._is_ending)

    def run(self, *, install_signals: bool = True) -> int:
        """Run beat until it ends; returns the exit code."""
        if install_signals:
            self._handlers.install()
        try:
            self.beat.start()
            if self._companion is not None:
                self._companion.start()
            if systemd.is_asked():
                self._notifier.start()
            self._loop.run()
        finally:
            self._notifier.stop()
            self._handlers.restore()
            self._loop.close()
        return self.exit_code

    def stop(self) -> None:
        """End in good order; may be called from any thread."""
        self._loop.call_soon_threadsafe(lambda: self._on_signal(signal.SIGTERM))

    def _on_signal(self, signum: int) -> None:
        if self._is_ending:
            self._loop.stop()
            return
        self._is_ending = True
        if self._companion is not None:
            self._companion.stop()
        self.beat.stop(self._loop.stop)
        self._loop.call_later(STOP_SECONDS, self._loop.stop)

    def _fail(self, error: Exception) -> None:
        self.exit_code = EX_FAILURE
        self._on_signal(signal.SIGTERM)
