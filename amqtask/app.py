"""AmqTask: the application. Settings, tasks, and the publishing of calls; everything else is made from it."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import os
import socket
import sys
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar, cast, overload

from amqtask import current, signals
from amqtask.builtins import BUILTINS
from amqtask.calls import Calls, tell_composed
from amqtask.canvas import maybe_signature, routed, signature
from amqtask.discovery import django_apps, import_related
from amqtask.eager import InlineRunner
from amqtask.exceptions import BackendNotConfigured, ConfigurationError, PublishError
from amqtask.execution.context import Context, current_context
from amqtask.execution.executor import Executor
from amqtask.execution.switch import OFF
from amqtask.message import Message
from amqtask.pipeline import BURST, Pipeline, find_pipeline, flush_open
from amqtask.queues import configured, default_exchange
from amqtask.registry import TaskRegistry
from amqtask.result import AsyncResult, EagerResult, GroupResult
from amqtask.serialization import content_types
from amqtask.settings import Settings
from amqtask.signatures import Signature
from amqtask.task import AsyncTask, Task, make_task
from amqtask.topology.delays import DelayPlan
from amqtask.topology.plan import QueueDefaults
from amqtask.topology.routes import Queues, Router
from amqtask.workflows import Workflows

if TYPE_CHECKING:
    from amqtask.backends.contract import ResultBackend
    from amqtask.control import Control
    from amqtask.entities import Queue
    from amqtask.events import BrokerConnection, Events
    from amqtask.events.receiver import Feed
    from amqtask.events.sent import SentEvents
    from amqtask.execution.contract import ChordStore
    from amqtask.execution.switch import Switch
    from amqtask.freezing import Begun
    from amqtask.message import Delivery
    from amqtask.protocol.result import ResultMessage
    from amqtask.transport.contract import AsyncPublisher, Publisher, Teller
    from amqtask.transport.memory.broker import MemoryBroker
    from amqtask.transport.url import BrokerAddress

logger = logging.getLogger("amqtask.publisher")
MEMORY_URL = "memory://"
P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
_LAZY = (
    "queues",
    "router",
    "delays",
    "queue_defaults",
    "calls",
    "broker_addresses",
    "publisher",
    "async_publisher",
    "backend",
    "control",
    "events",
    "teller",
    "sent_events",
    "_tells_sent",
)


class AmqTask:
    """An application: `app = AmqTask("tasks", broker="amqp://…", backend="rpc://")`.

    Nothing is read, imported or connected until it is needed. Settings are `app.conf`; keyword arguments that name
    settings are taken too. Safe to share between threads and to use after a fork.
    """

    def __init__(
        self,
        main: str | None = None,
        broker: str | Sequence[str] | None = None,
        backend: str | None = None,
        include: Iterable[str] | None = None,
        config_source: Any = None,
        namespace: str | None = None,
        set_as_current: bool = True,
        task_cls: type[Task[..., Any]] | None = None,
        strict_typing: bool = True,
        **settings: Any,
    ) -> None:
        self.main = main
        self.conf = Settings()
        self.tasks = TaskRegistry()
        self.strict_typing = strict_typing
        self.is_finalized = False
        self.on_configure = signals.Signal("on_configure")
        self.on_after_configure = signals.Signal("on_after_configure", ("source",))
        self.on_after_finalize = signals.Signal("on_after_finalize")
        self._task_class: type[Task[..., Any]] = task_cls or Task
        self._memory_broker: MemoryBroker | None = None
        self._opened_backend: tuple[Any, ResultBackend] | None = None
        self._discover: list[tuple[Callable[[], Iterable[str]], str]] = []
        if config_source is not None:
            self.config_from_object(config_source, namespace=namespace)
        given = {"broker_url": broker, "result_backend": backend, "include": list(include) if include else None}
        for name, value in {**given, **settings}.items():
            if value is not None:
                self.conf[name] = value
        self.conf.on_change = self._forget_derived
        current.note_app(self)
        if set_as_current:
            current.set_current(self)

    # -- configuration

    def config_from_object(
        self, source: Any, silent: bool = False, force: bool = False, namespace: str | None = None
    ) -> None:
        """Take settings from a module (or its name), object, class or mapping, when the first setting is looked at.

        With `namespace="CELERY"` (or any other) only names with that prefix count. Raises (then): SettingUnknown.
        """

        def read() -> None:
            try:
                self.conf.read_object(source, namespace=namespace)
            except (ImportError, ConfigurationError):
                if not silent:
                    raise

        self.conf.later(read)
        if force:
            self.conf.is_set("broker_url")

    def config_from_envvar(self, variable_name: str, silent: bool = False, force: bool = False) -> None:
        """Take settings from the module that an environment variable names. Raises: ConfigurationError when it is not set."""
        name = os.environ.get(variable_name)
        if not name:
            if silent:
                return
            raise ConfigurationError(f"the environment variable {variable_name} names no configuration module")
        self.config_from_object(name, silent=silent, force=force)

    def _forget_derived(self) -> None:
        """A setting changed: what was made from settings is made anew (open connections close)."""
        opened = [self.__dict__[name] for name in ("publisher", "teller") if name in self.__dict__]
        for name in _LAZY:
            self.__dict__.pop(name, None)
        if self.is_finalized:
            for task in self.tasks.values():
                task.bind(self)
        for each in opened:
            each.close()

    # -- what is made from settings, once

    @property
    def _broker_urls(self) -> str | Sequence[str] | None:
        # Celery's variable wins over the application, as it does there; ours is for an application that names no broker.
        told = os.environ.get("CELERY_BROKER_URL") or self.conf.broker_url or self.conf.broker_read_url
        return told or os.environ.get("AMQTASK_BROKER_URL")

    @cached_property
    def broker_addresses(self) -> tuple[BrokerAddress, ...]:
        """The hosts to connect to: CELERY_BROKER_URL, else broker_url, else AMQTASK_BROKER_URL, else localhost.

        None of them with the in-memory broker. Raises: ConfigurationError.
        """
        if self.memory_broker is not None:
            return ()
        return self._addresses(self._broker_urls)

    @property
    def _write_addresses(self) -> tuple[BrokerAddress, ...]:
        return self._addresses(self.conf.broker_write_url) if self.conf.broker_write_url else self.broker_addresses

    def _addresses(self, urls: str | Sequence[str] | None) -> tuple[BrokerAddress, ...]:
        transport = importlib.import_module("amqtask.transport.url")
        found: tuple[BrokerAddress, ...] = transport.parse_broker_urls(urls, use_ssl=self.conf.broker_use_ssl)
        return found

    @property
    def broker_name(self) -> str:
        """The broker's URLs for people, without passwords."""
        if self.memory_broker is not None:
            return MEMORY_URL
        return ", ".join(address.safe_url for address in self.broker_addresses)

    @property
    def memory_broker(self) -> MemoryBroker | None:
        """With `broker_url = "memory://"` this app's own broker in this process, for tests; else None."""
        if self._broker_urls not in (MEMORY_URL, [MEMORY_URL], (MEMORY_URL,)):
            return None
        if self._memory_broker is None:
            module = importlib.import_module("amqtask.transport.memory.broker")
            self._memory_broker = module.MemoryBroker()
        return self._memory_broker

    @cached_property
    def queue_defaults(self) -> QueueDefaults:
        """How missing queues are declared."""
        conf = self.conf
        return QueueDefaults(
            queue_type=conf.task_default_queue_type,
            delivery_limit=conf.task_delivery_limit,
            dead_letter=conf.task_dead_letter,
            dead_letter_suffix=conf.task_dead_letter_suffix,
            max_priority=conf.task_queue_max_priority,
        )

    @cached_property
    def queues(self) -> Queues:
        """The queues of `task_queues`, and those created because they were named."""
        conf = self.conf
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
        )

    @cached_property
    def router(self) -> Router:
        """Applies `task_routes`, then the tasks' own queue, exchange and routing_key."""
        return Router([*_route_list(self.conf.task_routes), self._own_route], self.queues)

    def _own_route(self, name: str, args: Any, kwargs: Any, options: Any, task: Any = None, **_: Any) -> Any:
        found = task if task is not None else self.tasks.get(name)
        if found is None:
            return None
        own = {key: getattr(found, key) for key in ("queue", "exchange", "routing_key")}
        return {key: value for key, value in own.items() if value is not None} or None

    @cached_property
    def delays(self) -> DelayPlan:
        """The broker's delay levels."""
        kind = "quorum" if self.conf.task_default_queue_type == "quorum" else "classic"
        return DelayPlan(self.conf.task_delay_prefix, kind)

    @cached_property
    def calls(self) -> Calls:
        """Composes messages."""
        return Calls(self.conf, self.router, self.delays)

    @cached_property
    def workflows(self) -> Workflows:
        """Composes chains, groups and callbacks."""
        return Workflows(self)

    @cached_property
    def publisher(self) -> Publisher:
        """Publishes with confirms; made at the first publish."""
        made: Publisher
        conf = self.conf
        if self.memory_broker is not None:
            module = importlib.import_module("amqtask.transport.memory.publisher")
            made = module.MemoryPublisher(self.memory_broker, on_warning=logger.warning)
            return made
        module = importlib.import_module("amqtask.transport.publisher")
        made = module.PikaPublisher(
            self._write_addresses,
            timeout=conf.broker_publish_timeout,
            pool_limit=conf.broker_pool_limit,
            heartbeat=conf.broker_heartbeat,
            connect_timeout=conf.broker_connection_timeout,
            client_name=self._client_name,
            on_warning=logger.warning,
        )
        return made

    @cached_property
    def async_publisher(self) -> AsyncPublisher:
        """The same over aio-pika, for event loops."""
        made: AsyncPublisher
        conf = self.conf
        if self.memory_broker is not None:
            module = importlib.import_module("amqtask.transport.memory.publisher")
            made = module.MemoryAsyncPublisher(self.memory_broker, on_warning=logger.warning)
            return made
        module = importlib.import_module("amqtask.transport.async_publisher")
        made = module.AioPikaPublisher(
            self._write_addresses,
            timeout=conf.broker_publish_timeout,
            heartbeat=conf.broker_heartbeat,
            connect_timeout=conf.broker_connection_timeout,
            client_name=self._client_name,
            on_warning=logger.warning,
        )
        return made

    @property
    def _client_name(self) -> str:
        return f"{self.main or 'amqtask'} publisher {os.getpid()}@{socket.gethostname()}"

    @property
    def backend_url(self) -> str | None:
        """CELERY_RESULT_BACKEND, else result_backend, else AMQTASK_RESULT_BACKEND; None when results are not kept."""
        told = os.environ.get("CELERY_RESULT_BACKEND") or self.conf.result_backend
        return told or os.environ.get("AMQTASK_RESULT_BACKEND") or None

    @cached_property
    def backend(self) -> ResultBackend | None:
        """The result store, None when results are not kept."""
        conf = self.conf
        url = self.backend_url
        if not url:
            return None
        if self.memory_broker is not None and url.partition("://")[0] == "rpc":
            raise ConfigurationError(
                "results over rpc:// need RabbitMQ; with the broker memory:// say backend='cache+memory://'"
            )
        contract = importlib.import_module("amqtask.backends.contract")
        registry = importlib.import_module("amqtask.backends.registry")
        options = contract.BackendOptions(
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
            transport_options=tuple(sorted(conf.result_backend_transport_options.items())),
        )
        if self._opened_backend is None or self._opened_backend[0] != options:
            self._opened_backend = (options, registry.open_backend(url, options))
        # Settings that do not concern it leave the store as it is: results may be on their way to it.
        return self._opened_backend[1]

    @cached_property
    def control(self) -> Control:
        """Remote control of workers."""
        module = importlib.import_module("amqtask.control")
        made: Control = module.Control(
            self.broker_addresses,
            self.publisher,
            prefix=self.conf.control_exchange,
            accept=content_types(self.conf.accept_content),
            queues=lambda: [queue.name for queue in self.queues.consumed],
        )
        return made

    @cached_property
    def events(self) -> Events:
        """Receive events, and send one's own."""
        module = importlib.import_module("amqtask.events")
        conf = self.conf
        settings = module.EventSettings(
            exchange=conf.event_exchange,
            queue_prefix=conf.event_queue_prefix,
            queue_ttl=conf.event_queue_ttl,
            queue_expires=conf.event_queue_expires,
            serializer=conf.event_serializer,
            accept=content_types({conf.event_serializer, "json"}),
        )
        made: Events = module.Events(
            settings,
            open_feed=self._open_feed,
            publish=lambda message: self.publisher.publish(message),
            wake_workers=lambda: self.control.broadcast("heartbeat"),
        )
        return made

    @cached_property
    def _tells_sent(self) -> bool:
        return bool(self.conf.task_send_sent_event)

    @cached_property
    def teller(self) -> Teller:
        """Publishes events about calls; made with the first one."""
        made: Teller
        if self.memory_broker is not None:
            module = importlib.import_module("amqtask.transport.memory.publisher")
            made = module.MemoryTeller(self.memory_broker, on_warning=logger.warning)
            return made
        module = importlib.import_module("amqtask.transport.teller")
        made = module.PikaTeller(
            self._write_addresses,
            connect_timeout=self.conf.broker_connection_timeout,
            client_name=f"{self._client_name} events",
            on_warning=logger.warning,
        )
        return made

    @cached_property
    def sent_events(self) -> SentEvents:
        """Tells monitors of calls (task_send_sent_event)."""
        module = importlib.import_module("amqtask.events.sent")
        made: SentEvents = module.SentEvents(
            lambda messages: self.teller.tell(messages),
            exchange=self.conf.event_exchange,
            serializer=self.conf.event_serializer,
            clock=self.events.clock,
        )
        return made

    def _open_feed(self, queue: Queue, on_delivery: Callable[[Delivery], None]) -> Feed:
        made: Feed
        if self.memory_broker is not None:
            module = importlib.import_module("amqtask.transport.memory.feed")
            made = module.MemoryFeed(self.memory_broker, queue, on_delivery)
            return made
        module = importlib.import_module("amqtask.transport.replies")
        made = module.ReplyConsumer(
            self.broker_addresses,
            queue,
            on_delivery,
            connect_timeout=self.conf.broker_connection_timeout,
            name="amqtask events",
        )
        return made

    def connection(self) -> BrokerConnection:
        """For `app.events.Receiver(connection)`, which connects by itself: this names the broker and opens nothing."""
        module = importlib.import_module("amqtask.events.connection")
        made: BrokerConnection = module.BrokerConnection(self.broker_name)
        return made

    connection_for_read = connection_for_write = connection

    # -- tasks

    @overload
    def task(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...
    @overload
    def task(self, function: Callable[P, R], /) -> Task[P, R]: ...
    @overload
    def task(
        self, /, *, bind: Literal[True], **options: Any
    ) -> Callable[[Callable[Concatenate[Any, P], R]], Task[P, R]]: ...
    @overload
    def task(self, /, *, bind: Literal[False] = False, **options: Any) -> Callable[[Callable[P, R]], Task[P, R]]: ...
    def task(self, function: Any = None, /, *, bind: bool = False, **options: Any) -> Any:
        """Make a function a task: `@app.task` or `@app.task(name=…, bind=True, max_retries=5, …)`.

        Options are the attributes of Task, and bind, base, name, shared, pydantic. Raises: TypeError for an unknown one.
        """
        if function is None:
            return lambda decorated: self._make(decorated, bind=bind, **options)
        return self._make(function, bind=bind, **options)

    def _make(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        base: type[Task[..., Any]] | None = None,
        bind: bool = False,
        shared: bool = True,
        lazy: bool = True,
        filter: Callable[..., Any] | None = None,
        pydantic: bool = False,
        pydantic_strict: bool = False,
        pydantic_context: dict[str, Any] | None = None,
        pydantic_dump_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> Task[..., Any]:
        task_name = name or self.gen_task_name(function.__name__, function.__module__)
        if task_name in self.tasks:
            return self.tasks[task_name]
        wanted = base or self._task_class
        if base is None and wanted is Task and inspect.iscoroutinefunction(function):
            wanted = AsyncTask
        made = make_task(
            filter(function) if filter else function,
            wanted,
            name=task_name,
            bind=bind,
            pydantic=pydantic,
            pydantic_options={
                "strict": pydantic_strict,
                "context": pydantic_context,
                "dump_kwargs": pydantic_dump_kwargs,
            },
            options=options,
        )
        registered: Task[..., Any] = self.register_task(made)
        return registered

    def register_task(self, task: Any, **options: Any) -> Any:
        """Register a class-based task (an instance or a class)."""
        made = task(**options) if isinstance(task, type) else task
        if not made.name:
            made.name = self.gen_task_name(type(made).__name__, type(made).__module__)
        made.app = self
        self.tasks.register(made)
        if self.is_finalized:
            made.bind(self)
        return made

    def gen_task_name(self, name: str, module: str) -> str:
        """`<module>.<function>`; `main` stands for `__main__`."""
        if module == "__main__" and self.main:
            module = self.main
        elif module == "__main__":
            spec = getattr(sys.modules["__main__"], "__spec__", None)
            path = getattr(sys.modules["__main__"], "__file__", None)
            module = spec.name if spec is not None else os.path.splitext(os.path.basename(path or "__main__"))[0]
        return f"{module}.{name}"

    def autodiscover_tasks(self, packages: Any = None, related_name: str = "tasks", force: bool = False) -> None:
        """Import `<package>.tasks` of each package (a list, a function that returns one, or Django's INSTALLED_APPS),
        when a worker starts or the tasks are finalised."""
        find = packages if callable(packages) else (lambda: list(packages) if packages is not None else django_apps())
        self._discover.append((find, related_name))
        if force:
            self._discover_now()

    def _discover_now(self) -> None:
        waiting, self._discover = self._discover, []
        for find, related_name in waiting:
            for package in find():
                import_related(package, related_name)

    def import_modules(self) -> None:
        """Import what `include`, `imports` and autodiscover_tasks name."""
        if signals.import_modules:
            signals.import_modules.send(sender=self)
        for module in (*self.conf.include, *self.conf.imports):
            importlib.import_module(module)
        self._discover_now()

    def finalize(self, auto: bool = False) -> None:
        """Take shared tasks in and resolve the tasks' options; done once, before the first use."""
        if self.is_finalized:
            return
        self.is_finalized = True
        self.on_configure.send(sender=self)
        for make in (*BUILTINS, *current.shared_tasks()):
            make(self)
        for task in self.tasks.values():
            task.bind(self)
        self.on_after_configure.send(sender=self, source=self.conf)
        self.on_after_finalize.send(sender=self)

    # -- calling

    def send_task(
        self, name: str, args: Iterable[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> AsyncResult[Any]:
        """Publish a task by name; it need not be registered here. Options as in `Task.apply_async`."""
        return self.publish_call(name, tuple(args or ()), dict(kwargs or {}), options)

    async def asend_task(
        self, name: str, args: Iterable[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> AsyncResult[Any]:
        """`send_task` without blocking the event loop."""
        return await self.apublish_call(name, tuple(args or ()), dict(kwargs or {}), options)

    def signature(self, task: Any, *args: Any, **kwargs: Any) -> Signature:
        """A signature that belongs to this app."""
        return signature(task, *args, app=self, **kwargs)

    def publish_call(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], options: Mapping[str, Any], task: Any = None
    ) -> AsyncResult[Any]:
        """Publish one call, or run it here when task_always_eager says so."""
        if self._is_eager:
            return self._eager(name, args, kwargs, options)
        message = self._compose(name, args, kwargs, options, task)
        pipeline = find_pipeline(self)
        if pipeline is not None:
            pipeline.add(message)
        else:
            self._publish(message, options)
        return self._result_of(message)

    def _publish(self, message: Message, options: Mapping[str, Any]) -> None:
        try:
            self.publisher.publish(message, timeout=_timeout(options))
        except BaseException as error:
            self._settled(message, error)
            raise
        self._settled(message)
        if self._tells_sent:
            self.sent_events.sent((message,))

    async def apublish_call(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], options: Mapping[str, Any], task: Any = None
    ) -> AsyncResult[Any]:
        """The same over the async publisher."""
        if self._is_eager:
            return self._eager(name, args, kwargs, options)
        message = self._compose(name, args, kwargs, options, task)
        try:
            await self.async_publisher.publish(message, timeout=_timeout(options))
        except BaseException as error:
            self._settled(message, error)
            raise
        self._settled(message)
        if self._tells_sent:
            await self._atell_sent((message,))
        return self._result_of(message)

    def publish_signature(self, call: Signature) -> AsyncResult[Any]:
        """Publish a plain signature."""
        return self.publish_call(call.task, call.args, call.kwargs, call.options, self.tasks.get(call.task))

    async def apublish_signature(self, call: Signature) -> AsyncResult[Any]:
        """The same over the async publisher."""
        return await self.apublish_call(call.task, call.args, call.kwargs, call.options, self.tasks.get(call.task))

    def pipeline(self, *, timeout: float | None = None) -> Pipeline:
        """A block whose calls are published together, as fast as `publish_many`, and all confirmed at its end.

            with app.pipeline():
                results = [add.delay(n, n) for n in range(5000)]

        `delay()` composes its message, checks its arguments and returns; messages leave by the thousand, or when the first
        has waited 0.1 s at the next call, when a result is asked for, and at the end of the block. `timeout` (seconds)
        is that of each burst, default as in `publish_many`; the calls' own `timeout` does not count.
        Raises, from the call that completed a burst or at the end of the block: the first PublishError; `failed` of the
        pipeline names all calls that were not stored.
        """

        def publish(messages: Sequence[Message]) -> Sequence[PublishError | None]:
            return self._publish_burst(messages, _many_timeout(self.conf, timeout, len(messages)))

        return Pipeline(self, publish, self._settled)

    def publish_many(self, calls: Iterable[Signature], *, timeout: float | None = None) -> list[AsyncResult[Any]]:
        """Publish many calls in one pipelined burst, each confirmed; results in their order.

        Raises: the PublishError of the first that was not stored (its `results` attribute holds what was).
        """
        found = [maybe_signature(call, self) for call in calls]
        if self._is_eager:
            return [self._eager(call.task, call.args, call.kwargs, call.options) for call in found]
        flush_open()  # earlier calls stay earlier in the queue
        results: list[AsyncResult[Any]] = []
        for calls_of_burst in _bursts(found):
            messages = self._compose_many(calls_of_burst)
            limit = _many_timeout(self.conf, timeout, len(messages))
            errors = self._publish_burst(messages, limit)
            self._all_published(messages, errors, results)
        return results

    async def apublish_many(
        self, calls: Iterable[Signature], *, timeout: float | None = None
    ) -> list[AsyncResult[Any]]:
        """The same over the async publisher."""
        found = [maybe_signature(call, self) for call in calls]
        if self._is_eager:
            return [self._eager(call.task, call.args, call.kwargs, call.options) for call in found]
        results: list[AsyncResult[Any]] = []
        for calls_of_burst in _bursts(found):
            messages = self._compose_many(calls_of_burst)
            limit = _many_timeout(self.conf, timeout, len(messages))
            errors = await self._apublish_burst(messages, limit)
            self._all_published(messages, errors, results)
        return results

    def _compose_many(self, found: Sequence[Signature]) -> list[Message]:
        tasks = self.tasks
        return [
            self._compose(call.task, call["args"], call["kwargs"], call["options"], tasks.get(call.task))
            for call in found
        ]

    def _publish_burst(self, messages: Sequence[Message], timeout: float | None) -> Sequence[PublishError | None]:
        errors = self.publisher.publish_many(messages, timeout=timeout)
        if self._tells_sent:
            self.sent_events.sent(_stored(messages, errors))
        return errors

    async def _apublish_burst(
        self, messages: Sequence[Message], timeout: float | None
    ) -> Sequence[PublishError | None]:
        errors = await self.async_publisher.publish_many(messages, timeout=timeout)
        if self._tells_sent:
            await self._atell_sent(_stored(messages, errors))
        return errors

    async def _atell_sent(self, messages: Sequence[Message]) -> None:
        """An event loop must not wait for the connection that events go over."""
        asyncio = importlib.import_module("asyncio")
        await asyncio.to_thread(self.sent_events.sent, messages)

    def _all_announced(self, messages: Sequence[Message], errors: Sequence[PublishError | None]) -> None:
        """Raises: the first error."""
        for message, error in zip(messages, errors, strict=True):
            self._settled(message, error)
        failed = next((error for error in errors if error is not None), None)
        if failed is not None:
            raise failed

    def _all_published(
        self, messages: Sequence[Message], errors: Sequence[PublishError | None], results: list[AsyncResult[Any]]
    ) -> None:
        """Add the results of what is stored. Raises: the first error, with all results so far as `results`."""
        for message, error in zip(messages, errors, strict=True):
            self._settled(message, error)
            if error is None:
                results.append(self._result_of(message))
        failed = next((error for error in errors if error is not None), None)
        if failed is not None:
            failed.results = results  # type: ignore[attr-defined]
            raise failed

    def _compose(self, name: str, args: Any, kwargs: Any, options: Mapping[str, Any], task: Any) -> Message:
        if not self.is_finalized:
            self.finalize()
        if task is None:
            task = self.tasks.get(name) if name in self.tasks else None
        backend = self.backend
        reply_to = ""
        if backend is not None and not _ignores(options, task):
            reply_to = backend.reply_to()
            backend.prepare(())
        message = self.calls.compose(name, args, kwargs, options, task=task, reply_to=reply_to)
        if signals.before_task_publish:
            tell_composed(message)
        return message

    def _settled(self, message: Message, error: BaseException | None = None) -> None:
        """The broker has it, or it has not."""
        if error is None:
            if signals.after_task_publish:
                signals.after_task_publish.send(**_described(message))
        elif signals.task_publish_failed:
            signals.task_publish_failed.send(exception=error, **_described(message))

    def _result_of(self, message: Message) -> AsyncResult[Any]:
        headers = message.properties.headers
        result: AsyncResult[Any] = self._noted(self._result(headers["id"], headers["task"]))
        return result

    def _result(self, task_id: str, name: str | None = None) -> AsyncResult[Any]:
        return AsyncResult(task_id, self.backend, revoke=self.revoke_call, task_name=name)

    def revoke_call(
        self,
        task_id: str | Sequence[str],
        *,
        terminate: bool = False,
        signal: str | None = None,
        wait: bool = False,
        timeout: float | None = None,
        headers: Mapping[str, Any] | None = None,
    ) -> None:
        """For results: tell all workers not to run it (or them; or what has these stamps), after what waits in a pipeline."""
        flush_open()
        how: dict[str, Any] = {"terminate": terminate, "signal": signal or "SIGTERM", "reply": wait}
        seconds = 1.0 if timeout is None else timeout
        if headers is None:
            self.control.revoke(task_id, timeout=seconds, **how)
        else:
            self.control.revoke_by_stamped_headers(headers, timeout=seconds, **how)

    # -- workflows

    def publish_composition(
        self, found: Any, args: tuple[Any, ...], kwargs: dict[str, Any], options: Mapping[str, Any]
    ) -> Any:
        """Publish what a chain, group or chord begins with, in one burst; its result.

        Raises: the PublishError of the first message that was not stored.
        """
        if self._is_eager:
            return self.run_composition(found, args, kwargs, options, propagate=bool(self.conf.task_eager_propagates))
        begun, result = self.workflows.prepared(found, args, kwargs, options)
        messages = self._composition_messages(begun)
        pipeline = find_pipeline(self)
        if pipeline is not None:
            for message in messages:
                pipeline.add(message)
        elif len(messages) == 1:
            self._publish(messages[0], options)
        else:
            timeout = _timeout(options)
            for burst in _bursts(messages):
                limit = _many_timeout(self.conf, timeout, len(burst))
                self._all_announced(burst, self._publish_burst(burst, limit))
        return self._noted(result)

    async def apublish_composition(
        self, found: Any, args: tuple[Any, ...], kwargs: dict[str, Any], options: Mapping[str, Any]
    ) -> Any:
        """The same over the async publisher."""
        if self._is_eager:
            return self.run_composition(found, args, kwargs, options, propagate=bool(self.conf.task_eager_propagates))
        begun, result = self.workflows.prepared(found, args, kwargs, options)
        for burst in _bursts(self._composition_messages(begun)):
            limit = _many_timeout(self.conf, _timeout(options), len(burst))
            self._all_announced(burst, await self._apublish_burst(burst, limit))
        return self._noted(result)

    def _composition_messages(self, begun: Begun) -> list[Message]:
        if not self.is_finalized:
            self.finalize()
        return self.workflows.messages(begun)

    def compose_call(self, call: Signature) -> Message:
        """The message of one plain signature. Raises: TypeError, EncodeError, QueueNotFound."""
        call = routed(call)
        return self._compose(call.task, call["args"], call["kwargs"], call["options"], self.tasks.get(call.task))

    def freeze(self, found: Signature, *, task_id: str | None, **place: Any) -> Any:
        """Fix the ids of a signature and of its parts, in place; the result it will have."""
        options = {"task_id": task_id, **place}
        frozen, result = self.workflows.frozen(found, {k: v for k, v in options.items() if v is not None})
        found.clear()
        found.update(frozen)
        return result

    def add_to_chord(self, group_id: str, found: Signature) -> None:
        """Say that a chord has one more member, before that is published. Raises: PublishError, BackendUnreachable."""
        store, task_id = self.chord_store, str(found.id)
        if store is not None:
            store.add_to_chord(group_id, task_id)
        else:
            self.publisher.publish(importlib.import_module("amqtask.protocol.chord").more_message(group_id, task_id))

    def _noted(self, result: Any) -> Any:
        """What a task published is its child."""
        parent = current_context()
        if parent is not None and parent.id is not None:
            parent.children.append(result.as_tuple())
        return result

    def group_result(self, group_id: str, results: Sequence[Any], parent: Any = None) -> GroupResult:
        """The results of a group."""
        return GroupResult(group_id, results, self.backend, parent)

    @property
    def chord_store(self) -> ChordStore | None:
        """Where the parts of chords are counted: a result store that can, else (None) the broker."""
        if self.memory_broker is not None and not hasattr(self.backend, "add_chord_part"):
            return self._memory_chords
        return cast("ChordStore | None", self.backend if hasattr(self.backend, "add_chord_part") else None)

    @cached_property
    def _memory_chords(self) -> ChordStore:
        """With the in-memory broker and no result store, chords are counted in this process."""
        made: ChordStore = importlib.import_module("amqtask.backends.chords").MemoryChords(self.conf.result_serializer)
        return made

    # -- running here

    def run_inline(
        self, task: Task[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], options: Mapping[str, Any]
    ) -> EagerResult[Any]:
        """Run a task here, retries and callbacks included. Its exception is kept in the result, but for the option `throw`."""
        return InlineRunner(self).run(task, args, kwargs, options)

    @property
    def _is_eager(self) -> bool:
        return bool(self.conf.task_always_eager)

    def run_composition(
        self,
        found: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: Mapping[str, Any],
        *,
        propagate: bool = False,
    ) -> Any:
        """Run a chain, group or chord here, one task after the other."""
        self.finalize()
        propagate = bool(options.get("throw", propagate))
        sig, _ = self.workflows.frozen(
            found.clone(args, kwargs) if args or kwargs else found, {k: v for k, v in options.items() if k != "throw"}
        )
        return InlineRunner(self).run_composition(sig, propagate=propagate)

    def _eager(self, name: str, args: Any, kwargs: Any, options: Mapping[str, Any]) -> EagerResult[Any]:
        return InlineRunner(self).run(
            self.tasks[name], args, kwargs, options, propagate=bool(self.conf.task_eager_propagates)
        )

    # -- for workers and results

    def make_executor(self, hostname: str, *, verbose: Switch = OFF) -> Executor:
        """What runs this app's tasks in a worker."""
        self.finalize()
        return Executor(
            self.tasks,
            accept=content_types(self.conf.accept_content),
            composer=self.workflows,
            store=self.backend,
            chord_store=self.chord_store,
            serializer=self.conf.result_serializer,
            hostname=hostname,
            verbose=verbose,
            extended=bool(self.conf.result_extended),
        )

    def store_state(self, result: ResultMessage, context: Context) -> None:
        """`Task.update_state`: store a state now. Raises: BackendNotConfigured."""
        if self.backend is None:
            raise BackendNotConfigured("update_state() needs a result backend: set result_backend")
        message = self.backend.message_for(result, context.reply_to, context.correlation_id)
        if message is None:
            self.backend.store(result)
        elif message.routing_key:
            self.publisher.publish(message)

    def AsyncResult(self, task_id: str, *, task_name: str | None = None) -> AsyncResult[Any]:
        """The result of an earlier call, by its id."""
        return self._result(task_id, task_name)

    # -- running and closing

    def worker_main(self, argv: Sequence[str] | None = None) -> int:
        """Run `amqtask worker …` with this app; `argv` as on the command line (`["worker", "-l", "INFO"]`)."""
        arguments = list(sys.argv[1:] if argv is None else argv)
        return self.start(arguments if "worker" in arguments else ["worker", *arguments])

    def start(self, argv: Sequence[str] | None = None) -> int:
        """Run the command line with this app; the exit code."""
        from amqtask.assembly import run_command  # noqa: PLC0415 - the one import upwards

        return run_command(self, list(sys.argv[1:] if argv is None else argv))

    def close(self) -> None:
        """Close connections; they open again when they are used again."""
        for name in ("publisher", "teller", "backend", "control"):
            made = self.__dict__.pop(name, None)
            if made is not None:
                made.close()
        self._opened_backend = None

    def __enter__(self) -> AmqTask:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<AmqTask {self.main or '__main__'}>"


def _described(message: Message) -> dict[str, Any]:
    headers = message.properties.headers
    return {
        "sender": headers["task"],
        "body": message.body,
        "exchange": message.exchange,
        "routing_key": message.routing_key,
        "headers": headers,
    }


def _timeout(options: Mapping[str, Any]) -> float | None:
    found: float | None = options.get("timeout") or options.get("confirm_timeout")
    return found


def _many_timeout(conf: Settings, timeout: float | None, count: int) -> float | None:
    """A burst has the deadline of one publish, and a second more for each thousand."""
    if timeout is not None or conf.broker_publish_timeout is None:
        return timeout
    return float(conf.broker_publish_timeout) + count / 1000


def _bursts(calls: Sequence[T]) -> Iterator[Sequence[T]]:
    """So many at once that their round trips do not count, and so few that an `eta` is worked out just before its
    message leaves."""
    for start in range(0, len(calls), BURST):
        yield calls[start : start + BURST]


def _stored(messages: Sequence[Message], errors: Sequence[PublishError | None]) -> Sequence[Message]:
    """Those that the broker has."""
    return [message for message, error in zip(messages, errors, strict=True) if error is None]


def _ignores(options: Mapping[str, Any], task: Any) -> bool:
    ignored = options.get("ignore_result")
    return bool(task.ignore_result if ignored is None and task is not None else ignored)


def _route_list(routes: Any) -> list[Any]:
    if routes is None:
        return []
    if isinstance(routes, (list, tuple)):
        pairs = all(isinstance(entry, tuple) and len(entry) == 2 for entry in routes)
        return [dict(routes)] if pairs else list(routes)
    return [routes]
