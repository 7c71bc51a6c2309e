"""Runtime: what an application is made of (queues, routes, publisher, result store …), each made from its settings once."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import tzinfo
from functools import wraps
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast, overload
from urllib.parse import quote

from amqtask.calls.application import Application
from amqtask.client.message_builder import Calls
from amqtask.client.workflow_messages import Workflows
from amqtask.exceptions import BrokerUnreachable
from amqtask.execution.inbox import runs_of
from amqtask.ground.django_project import uses_django
from amqtask.ground.lazy import lazy
from amqtask.ground.plugins import plugins
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.entities import Exchange, Queue
from amqtask.protocol.event import Keeping, keeping
from amqtask.protocol.serialization import LARGEST_BODY, content_types, control_serializer, is_protected
from amqtask.settings import Settings
from amqtask.topology.declarations import QueueDefaults
from amqtask.topology.delays import DelayPlan
from amqtask.topology.routes import Queues, Router, configured

if TYPE_CHECKING:
    from amqtask.backends.contract import BackendOptions, ResultBackend, RetryPolicy
    from amqtask.client.flow_store import Limits
    from amqtask.events import Events
    from amqtask.events.client import Feed
    from amqtask.events.dispatcher import SentEvents
    from amqtask.execution.contract import ChordStore
    from amqtask.execution.inbox import Inbox, InboxRuns
    from amqtask.flow.claims import Claims
    from amqtask.flow.contract import FlowStore
    from amqtask.flow.gate import Gate
    from amqtask.flow.keys import FlowPlan
    from amqtask.history.client import History
    from amqtask.outbox.contract import Outbox
    from amqtask.protocol.message import Delivery
    from amqtask.remote.control import Control
    from amqtask.remote.kept import KeptRevokes
    from amqtask.transport.broker import Broker
    from amqtask.transport.contract import AsyncPublisher, EventPublisher, Publisher
    from amqtask.transport.memory.broker import MemoryBroker
    from amqtask.transport.url import BrokerAddress


T = TypeVar("T")
logger = bounded_logger("amqtask.publisher")
# What only one kind of result store has.
_STORE_SETTINGS = (
    "cache_backend", "cache_backend_options", "database_create_tables_at_setup", "database_engine_callback",
    "database_engine_options", "database_short_lived_sessions", "database_table_names", "database_table_schemas",
    "mongodb_backend_settings", "redis_backend_use_ssl", "redis_db", "redis_host", "redis_max_connections",
    "redis_password", "result_reply_queues", "redis_port", "redis_socket_connect_timeout", "redis_socket_timeout",
    "redis_username",
)  # fmt: skip


def default_exchange(conf: Settings) -> Exchange | None:
    """The exchange of the default queue; None (the default exchange) when nothing is configured."""
    name, exchange_type = conf.task_default_exchange, conf.task_default_exchange_type
    if not name and exchange_type == "direct":
        return None
    return Exchange(name or conf.task_default_queue, type=exchange_type)


def importing(make: Callable[[Any], T]) -> Callable[[Any], T]:
    """What imports, for `lazy`: in a finalizer, once Python shuts down, nothing can be imported any more."""

    @wraps(make)
    def call(runtime: Any) -> T:
        try:
            return make(runtime)
        except ImportError as error:
            if not sys.is_finalizing():
                raise
            raise BrokerUnreachable(
                f"Python is shutting down, and this process has not published before: what that needs cannot be imported any "
                f"more ({error}). Publish in a function that atexit calls"
            ) from error

    return call


class made(Generic[T]):
    """A part of an application's runtime, as an attribute of the application. One's own may be put in its place (for tests): it
    stays until a setting changes."""

    def __init__(self, part: lazy[T]) -> None:
        self._name = part.name
        self._get: Callable[[Runtime], T] = attrgetter(part.name)
        self.__doc__ = part.__doc__

    @overload
    def __get__(self, app: None, owner: type) -> made[T]: ...

    @overload
    def __get__(self, app: object, owner: type) -> T: ...

    def __get__(self, app: Any, owner: type) -> made[T] | T:
        return self if app is None else self._get(app.runtime)

    def __set__(self, app: Any, part: T) -> None:
        app.runtime.__dict__[self._name] = part

    def __delete__(self, app: Any) -> None:
        app.runtime.__dict__.pop(self._name, None)


@dataclass(slots=True, eq=False)
class Kept:
    """What outlives a change of settings: results are on their way to the store, and queues in this process have messages."""

    backend: tuple[BackendOptions, ResultBackend | None] | None = None
    installed_outbox: Outbox | None = None
    installed_inbox: Inbox | None = None
    # What a broker in this process keeps.
    broker: dict[str, object] = field(default_factory=dict)
    # The keys and places of `memory://`.
    flow_store: FlowStore | None = None


class Runtime:
    """What an application is made of; a change of settings makes a new one. Nothing is imported or connected before it is asked
    for."""

    def __init__(self, app: Application, kept: Kept) -> None:
        self._app = app
        self._conf = app.conf
        self._kept = kept

    def renewed(self) -> Runtime:
        """One for settings that have changed, in place of this one; open connections of this one close."""
        runtime = Runtime(self._app, self._kept)
        for name in ("publisher", "event_publisher", "history"):
            if name in self.__dict__:
                self.__dict__[name].close()
        return runtime

    @property
    def _broker_urls(self) -> str | Sequence[str] | None:
        # Celery's variable wins over the application, as it does there; ours is for an application that names no broker.
        conf = self._conf
        urls = os.environ.get("CELERY_BROKER_URL") or conf.broker_url or conf.broker_read_url
        return urls or _url_of_parts(conf) or os.environ.get("AMQTASK_BROKER_URL")

    @lazy
    @importing
    def broker(self) -> Broker:
        """The broker, and the doors to it: of CELERY_BROKER_URL, else broker_url, else AMQTASK_BROKER_URL, else RabbitMQ here."""
        from amqtask.transport.broker import open_broker
        from amqtask.transport.contract import BrokerOptions

        conf = self._conf
        options = BrokerOptions(
            urls=self._broker_urls,
            write_urls=conf.broker_write_url,
            use_ssl=conf.broker_use_ssl,
            login_method=conf.broker_login_method,
            publish_timeout=conf.broker_publish_timeout,
            connect_timeout=conf.broker_connection_timeout,
            heartbeat=conf.broker_heartbeat,
            pool_limit=conf.broker_pool_limit,
            transport_options=conf.broker_transport_options or {},
            event_exchange=conf.event_exchange,
        )
        return open_broker(options, self._kept.broker)

    @lazy
    def broker_addresses(self) -> tuple[BrokerAddress, ...]:
        """The hosts of RabbitMQ to connect to; none of another broker. Raises: ConfigurationError."""
        return self.broker.addresses

    @lazy
    def broker_name(self) -> str:
        """The broker's URLs for people, without passwords."""
        return self.broker.safe_url

    @lazy
    def memory_broker(self) -> MemoryBroker | None:
        """With `broker_url = "memory://"` this app's own broker in this process, for tests; else None."""
        return self.broker.memory

    @property
    def timezone(self) -> tzinfo:
        """The time zone of schedules: `timezone`, else Django's TIME_ZONE in its projects, else UTC.

        Raises: ConfigurationError for one that is not known.
        """
        name = self._conf.timezone or "UTC"
        if isinstance(name, tzinfo):
            return name
        from amqtask.schedules import zone_named

        return zone_named(name)

    @lazy
    def queue_defaults(self) -> QueueDefaults:
        """How missing queues are declared."""
        conf = self._conf
        return QueueDefaults(
            queue_type=conf.task_default_queue_type,
            delivery_limit=conf.task_delivery_limit,
            dead_letter=conf.task_dead_letter,
            dead_letter_suffix=conf.task_dead_letter_suffix,
            max_priority=conf.task_queue_max_priority,
        )

    @lazy
    def queues(self) -> Queues:
        """The queues of `task_queues`, and those created because they were named."""
        conf = self._conf
        exchange = default_exchange(conf)
        return Queues(
            configured(conf.task_queues, exchange),
            defaults=self.queue_defaults,
            default_queue=conf.task_default_queue,
            default_exchange=exchange,
            default_routing_key=conf.task_default_routing_key or "",
            create_missing=conf.task_create_missing_queues,
            create_missing_type=conf.task_create_missing_queue_type,
            create_missing_exchange_type=conf.task_create_missing_queue_exchange_type,
            shards=conf.task_fair_shards,
            fair_queues=self._fair_queues,
        )

    def _fair_queues(self) -> frozenset[str]:
        """The queues of tasks with `fair_by`."""
        fair = [task for task in self._app.tasks.values() if task.fair_plan is not None]
        return frozenset(queue for task in fair if (queue := self.router.fair_queue(task.name, task)) is not None)

    @lazy
    def router(self) -> Router:
        """Applies `task_routes`, then the tasks' own queue, exchange and routing_key."""
        return Router(self._conf.task_routes, self.queues, self._app.tasks.get)

    @lazy
    def delays(self) -> DelayPlan:
        """The broker's delay levels."""
        queue_type = "quorum" if self._conf.task_default_queue_type == "quorum" else "classic"
        return DelayPlan(self._conf.task_delay_prefix, queue_type)

    @lazy
    def calls(self) -> Calls:
        """Composes messages."""
        return Calls(self._conf, self.router, self.delays, lambda: self.timezone)

    @lazy
    def workflows(self) -> Workflows:
        """Composes chains, groups and callbacks."""
        return Workflows(self._app)

    @lazy
    @importing
    def publisher(self) -> Publisher:
        """Publishes with confirms; made at the first publish."""
        return self.broker.publisher(name=self._client_name, on_warning=logger.warning)

    @lazy
    def async_publisher(self) -> AsyncPublisher:
        """Publishes with confirms, for event loops."""
        return self.broker.async_publisher(name=self._client_name, on_warning=logger.warning)

    @property
    def _client_name(self) -> str:
        return f"{self._app.main or 'amqtask'} publisher {os.getpid()}@{socket.gethostname()}"

    @lazy
    def backend_url(self) -> str | None:
        """CELERY_RESULT_BACKEND, else result_backend, else AMQTASK_RESULT_BACKEND; None when results are not kept."""
        url = os.environ.get("CELERY_RESULT_BACKEND") or self._conf.result_backend
        return url or os.environ.get("AMQTASK_RESULT_BACKEND") or None

    @lazy
    @importing
    def backend(self) -> ResultBackend | None:
        """The result store, None when results are not kept."""
        conf = self._conf
        url = self.backend_url
        if not url:
            return None
        url = self.broker.results_url(url)
        from amqtask.backends.contract import BackendOptions
        from amqtask.backends.registry import open_backend

        options = BackendOptions(
            url=url,
            serializer=conf.result_serializer,
            accept=content_types(conf.result_accept_content or conf.accept_content),
            compression=conf.result_compression,
            expires=conf.result_expires,
            chord_expires=conf.result_chord_expires,
            persistent=conf.result_persistent is not False,
            extended=bool(conf.result_extended),
            brokers=self.broker_addresses,
            connect_timeout=conf.broker_connection_timeout,
            publish_timeout=conf.broker_publish_timeout,
            transport_options=tuple(sorted(conf.result_backend_transport_options.items())),
            always_retry=self._always_retry(),
            largest_body=conf.worker_max_body_size or LARGEST_BODY,
            settings={name: conf[name] for name in _STORE_SETTINGS},
        )
        opened = self._kept.backend
        if opened is None or opened[0] != options:
            opened = self._kept.backend = (options, open_backend(url, options, self._app))
        # Settings that do not concern it leave the store as it is: results may be on their way to it.
        return opened[1]

    def _always_retry(self) -> RetryPolicy | None:
        conf = self._conf
        if not conf.result_backend_always_retry:
            return None
        from amqtask.backends.contract import RetryPolicy

        return RetryPolicy(
            seconds=None,
            retries=conf.result_backend_max_retries,
            first_pause=conf.result_backend_base_sleep_between_retries_ms / 1000,
            longest_pause=conf.result_backend_max_sleep_between_retries_ms / 1000,
            jitter=True,
        )

    @lazy
    def outbox(self) -> Outbox | None:
        """Where calls go that are made in a database transaction: what was installed, else what the setting names."""
        installed = self._kept.installed_outbox
        if installed is not None or not self._conf.outbox:
            return installed
        from amqtask.outbox.contract import find_outbox

        return find_outbox(self._conf.outbox, self._conf.outbox_database)

    def install_outbox(self, outbox: Outbox | None) -> None:
        """Let calls that are made in one of its transactions wait there for the commit; None: no more."""
        self._kept.installed_outbox = outbox
        self.__dict__.pop("outbox", None)

    @lazy
    def inbox(self) -> Inbox | None:
        """Where tasks with inbox=True have their transactions: what was installed, else Django's in its projects.

        Raises: ConfigurationError."""
        if self._kept.installed_inbox is None and uses_django():
            inbox: Inbox = plugins().django_inbox(self._conf.inbox_database)
            return inbox
        return self._kept.installed_inbox

    def install_inbox(self, inbox: Inbox | None) -> None:
        """Let tasks with inbox=True have their transactions there."""
        self._kept.installed_inbox = inbox
        self.__dict__.pop("inbox", None)

    def make_inbox_runs(self, names: Iterable[str]) -> InboxRuns | None:
        """For an executor of these tasks; None when none of them asks for it. Raises: ConfigurationError (there is no inbox, or
        it is none for such a task)."""
        tasks = [task for name in names if (task := self._app.tasks.get(name)) is not None and task.inbox]
        if not tasks:
            return None
        conf = self._conf
        accept = content_types(conf.result_accept_content or conf.accept_content)
        return runs_of(tasks, self.inbox, conf.result_serializer, accept)

    @lazy
    def flow_store(self) -> FlowStore:
        """The locks and places of unique tasks and limits: what flow_store names, else the broker where that can keep them.

        Raises: ConfigurationError."""
        from amqtask.client.flow_store import flow_store_of

        return flow_store_of(self._conf, self.broker, self._flow_store_in_process)

    def _flow_store_in_process(self) -> FlowStore:
        if self._kept.flow_store is None:
            from amqtask.flow.memory import MemoryStore

            self._kept.flow_store = MemoryStore()
        return self._kept.flow_store

    def _plans(self) -> dict[str, FlowPlan]:
        return {name: task.flow_plan for name, task in self._app.tasks.items() if task.flow_plan is not None}

    def make_gate(self) -> Gate | None:
        """What a worker's slots ask for unique and limited tasks; None when no task is. Raises: ConfigurationError (no store)."""
        plans = self._plans()
        if not plans:
            return None
        from amqtask.flow.gate import Gate

        conf = self._conf
        return Gate(plans, self.flow_store, lease=conf.flow_lease, runs_on_error=conf.flow_on_error == "run")

    @lazy
    def limits(self) -> Limits:
        """The limits of tasks, as they are and as operators have set them."""
        from amqtask.client.flow_store import Limits

        return Limits(self._plans, lambda: self.flow_store)

    @lazy
    def claims(self) -> Claims:
        """The keys of unique calls."""
        from amqtask.flow.claims import Claims

        conf = self._conf
        return Claims(
            self.flow_store,
            publish_timeout=conf.broker_publish_timeout,
            runs_on_error=conf.flow_on_error == "run",
        )

    @lazy
    def control(self) -> Control:
        """Remote control of workers."""
        from amqtask.remote.control import Control

        return Control(
            self.broker,
            self.publisher,
            prefix=self._conf.control_exchange,
            accept=content_types(self._conf.accept_content),
            serializer=control_serializer(self._conf.task_serializer),
            queues=lambda: [queue.name for queue in self.queues.consumed],
            keep_revokes=lambda: self.kept_revokes(self.publisher),
        )

    def kept_revokes(self, publisher: Publisher) -> KeptRevokes | None:
        """The revokes that the broker keeps, written with this publisher; None: none are kept."""
        from amqtask.remote.kept import JOURNAL, KeptRevokes

        conf = self._conf
        if not conf.revoke_max_age:
            return None
        return KeptRevokes(
            self.broker.journal(JOURNAL, publisher, max_age=conf.revoke_max_age),
            serializer=control_serializer(conf.task_serializer),
            accept=content_types(conf.accept_content),
        )

    @lazy
    def events(self) -> Events:
        """Receive events, and send one's own."""
        from amqtask.events.client import Events, EventSettings

        conf = self._conf
        settings = EventSettings(
            exchange=conf.event_exchange,
            queue_prefix=conf.event_queue_prefix,
            queue_ttl=conf.event_queue_ttl,
            queue_expires=conf.event_queue_expires,
            serializer=conf.event_serializer,
            accept=self.accepted_events,
        )
        return Events(
            settings,
            open_feed=self._open_feed,
            publish=lambda message: self.publisher.publish(message),
            wake_workers=lambda: self.control.broadcast("heartbeat"),
        )

    @lazy
    def is_eager(self) -> bool:
        """Whether calls run where they are made (task_always_eager)."""
        return bool(self._conf.task_always_eager)

    @lazy
    def tells_sent(self) -> bool:
        """Whether monitors are told of calls (task_send_sent_event, task_history)."""
        return bool(self._conf.task_send_sent_event or self._conf.task_history)

    @property
    def accepted_events(self) -> frozenset[str]:
        """The content types in which events are read: that of the setting, and JSON unless that one is signed or encrypted."""
        serializer = self._conf.event_serializer
        return content_types({serializer, *(() if is_protected(serializer) else ("json",))})

    @lazy
    def keeping(self) -> Keeping | None:
        """How events are kept; None without task_history."""
        conf = self._conf
        if not conf.task_history:
            return None
        return self.history_queue

    @lazy
    def history_queue(self) -> Keeping:
        """The queue of history, whether this process keeps events or reads what others kept."""
        conf = self._conf
        return keeping(
            conf.history_queue,
            conf.event_exchange,
            queue_type=conf.history_queue_type,
            max_age=conf.history_max_age,
            max_bytes=conf.history_max_bytes,
            is_bound=self.broker.binds_events,
            with_arguments=bool(conf.task_history_arguments),
        )

    @lazy
    def history(self) -> History:
        """What happened to tasks, as `amqtask history` has indexed it."""
        from amqtask.history.client import History

        return History(self._conf.history_url)

    @lazy
    def event_publisher(self) -> EventPublisher:
        """Publishes events about calls; made with the first one."""
        return self.broker.event_publisher(name=f"{self._client_name} events", on_warning=logger.warning)

    @lazy
    def sent_events(self) -> SentEvents:
        """Tells monitors of calls (task_send_sent_event)."""
        from amqtask.events.dispatcher import SentEvents

        return SentEvents(
            lambda messages: self.event_publisher.publish(messages),
            exchange=self._conf.event_exchange,
            serializer=self._conf.event_serializer,
            clock=self.events.clock,
            keeping=self.keeping,
        )

    def _open_feed(self, queue: Queue, on_delivery: Callable[[Delivery], None]) -> Feed:
        return self.broker.queue_reader(queue, on_delivery, name="amqtask events")

    @property
    def chord_store(self) -> ChordStore | None:
        """Where the parts of chords are counted: a result store that can, else (None) the broker."""
        backend = self.backend
        if backend is not None and backend.counts_chords:
            return cast("ChordStore", backend)
        return None if self.broker.chords_url is None else self._chords_beside_broker

    @lazy
    def _chords_beside_broker(self) -> ChordStore:
        """Where the broker joins no chords and no result store counts them, they are counted where the broker says."""
        from amqtask.backends.contract import BackendOptions
        from amqtask.backends.registry import open_backend
        from amqtask.transport.redis import tls_settings

        conf = self._conf
        options = BackendOptions(
            url=self.broker.chords_url or "",
            serializer=conf.result_serializer,
            accept=content_types(conf.result_accept_content or conf.accept_content),
            expires=conf.result_expires,
            chord_expires=conf.result_chord_expires,
            connect_timeout=conf.broker_connection_timeout,
            transport_options=tuple((conf.broker_transport_options or {}).items()),
            settings=tls_settings(conf.broker_use_ssl),
        )
        return cast("ChordStore", open_backend(options.url, options))

    def close(self) -> None:
        """Close connections; they open again when they are used again."""
        for name in ("publisher", "event_publisher", "backend", "control", "history", "flow_store"):
            resource = self.__dict__.pop(name, None)
            if resource is not None:
                resource.close()
        self._kept.backend = None

    async def aclose(self) -> None:
        """Close this event loop's connection, and what `close` closes, without blocking the loop."""
        publisher = self.__dict__.pop("async_publisher", None)
        if publisher is not None:
            await publisher.close()
        await asyncio.to_thread(self.close)

    def emptied(self) -> Runtime:
        """One without the broker in this process, in place of this one; for the next test."""
        return Runtime(self._app, Kept(installed_outbox=self._kept.installed_outbox))


class Roof(Application, Protocol):
    """The application, as those know it who work with its runtime."""

    @property
    def runtime(self) -> Runtime:
        """What it is made of by its present settings."""


def _url_of_parts(conf: Settings) -> str | None:
    """The broker's URL from Celery 2's settings, BROKER_HOST and the like."""
    if not any(conf.is_set(f"broker_{part}") for part in ("host", "port", "user", "password", "vhost", "transport")):
        return None
    user, password = (quote(credential or "guest", safe="") for credential in (conf.broker_user, conf.broker_password))
    host_and_port = f"{conf.broker_host or 'localhost'}:{conf.broker_port or 5672}"
    return f"{conf.broker_transport or 'amqp'}://{user}:{password}@{host_and_port}/{quote(conf.broker_vhost or '/', safe='')}"
