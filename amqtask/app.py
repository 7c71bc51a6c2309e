"""AmqTask: the application. Settings, tasks, and the publishing of calls; everything else is made from it."""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, tzinfo
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, overload

from amqtask import signals
from amqtask.calls.signature import Signature
from amqtask.client.bursts import Bursts
from amqtask.client.caller import Caller, delegated
from amqtask.client.registry import (
    TaskRegistry,
    django_apps,
    import_related,
    make_task,
    name_of_main,
    prepare_django,
    twin_of_main,
)
from amqtask.client.runtime import Kept, Runtime, made
from amqtask.client.workflow_messages import BUILTINS
from amqtask.exceptions import ConfigurationError, DuplicateTaskNameWarning
from amqtask.execution.chain_steps import OFF
from amqtask.execution.executor import Executor
from amqtask.execution.gated import BatchedExecutor, GatedExecutor
from amqtask.execution.no_run import Bounds
from amqtask.ground import current
from amqtask.ground.plugins import WithOthersNames, load, others_names, plugins
from amqtask.ground.printable import bounded_logger
from amqtask.protocol import option_types
from amqtask.protocol.serialization import LARGEST_BODY, content_types
from amqtask.results import GroupResult, ResultSet
from amqtask.settings import Settings
from amqtask.task import AsyncTask
from amqtask.task import Task as TaskBase

if TYPE_CHECKING:
    from amqtask.client.registry import TaskMaker
    from amqtask.events import BrokerConnection
    from amqtask.execution.chain_steps import Flag
    from amqtask.execution.contract import ChordStore
    from amqtask.execution.task_plan import Wrapper
    from amqtask.flow.gate import Gate
    from amqtask.ground.shapes import CoroutineOf, KeywordDict, Keywords
    from amqtask.task import RegisteredTask

# `amqtask.app.task` and the like are found in amqtask.compat, as if this were a package.
__path__: list[str] = []
logger = bounded_logger("amqtask.publisher")
P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


# What Celery's application may be told to be made of; here it makes them itself.
_PARTS_OF_CELERY = ("amqp", "autofinalize", "control", "events", "fixups", "log", "tasks")


_bursts: Callable[[AmqTask], Bursts] = attrgetter("bursts")
_runtime: Callable[[AmqTask], Runtime] = attrgetter("runtime")


class AmqTask(WithOthersNames):
    """An application: `app = AmqTask("tasks", broker="amqp://…", backend="rpc://")`.

    Nothing is read, imported or connected until it is needed. Settings are `app.conf`; keyword arguments that name
    settings are taken too. Safe to share between threads and to use after a fork.
    """

    # The class of `loader`, or its name: what programs for Celery read their settings by.
    loader_cls: Any = None

    def __init__(
        self,
        main: str | None = None,
        broker: str | Sequence[str] | None = None,
        backend: str | None = None,
        include: Iterable[str] | None = None,
        config_source: object = None,
        namespace: str | None = None,
        set_as_current: bool = True,
        task_cls: type[RegisteredTask] | None = None,
        strict_typing: bool = True,
        **settings: Any,
    ) -> None:
        self.main = main
        # Of the settings; None where their names have no beginning.
        self.namespace = namespace
        self.conf = Settings()
        self.tasks = TaskRegistry(self.finalize)
        self.runtime: Runtime = Runtime(self, Kept())
        self.caller = Caller(self)
        self.bursts = Bursts(self, self.caller)
        self.strict_typing = strict_typing
        self.is_finalized = False
        self.on_configure = signals.Signal("on_configure")
        self.on_after_configure = signals.Signal("on_after_configure", ("source",))
        self.on_after_finalize = signals.Signal("on_after_finalize")
        self._task_class: type[RegisteredTask] = task_cls or TaskBase
        self._discover: list[tuple[Callable[[], Iterable[str]], str]] = []
        self._new_periodic: list[tuple[str, bool, dict[str, object]]] = []
        self._is_configured = False
        self.conf.later(self._read_loader)
        loader = settings.pop("loader", None) or self.loader_cls or os.environ.get("CELERY_LOADER")
        if loader:
            plugins().celery_loader(self, loader)
        if config_source is not None:
            self.config_from_object(config_source, namespace=namespace)
        for part in _PARTS_OF_CELERY:
            settings.pop(part, None)
        settings.update(settings.pop("changes", None) or {})
        named_settings = {
            "broker_url": broker,
            "result_backend": backend,
            "include": list(include) if include else None,
        }
        self.conf.begin_with({**named_settings, **settings})
        self.conf.on_change = self._settings_changed
        current.note_app(self)
        if set_as_current:
            current.set_current(self)

    # -- calling

    send_task = delegated(Caller.send_task)
    asend_task = delegated(Caller.asend_task)
    signature = delegated(Caller.signature)
    publish_call = delegated(Caller.publish_call)
    apublish_call = delegated(Caller.apublish_call)
    publish_signature = delegated(Caller.publish_signature)
    apublish_signature = delegated(Caller.apublish_signature)
    publish_many = delegated(Bursts.publish_many, _bursts)
    apublish_many = delegated(Bursts.apublish_many, _bursts)
    publish_composition = delegated(Bursts.publish_composition, _bursts)
    apublish_composition = delegated(Bursts.apublish_composition, _bursts)
    pipeline = delegated(Caller.pipeline)
    compose_call = delegated(Caller.compose_call)
    compose_periodic = delegated(Caller.compose_periodic)
    periodic_settled = delegated(Caller.periodic_settled)
    freeze = delegated(Bursts.freeze, _bursts)
    add_to_chord = delegated(Bursts.add_to_chord, _bursts)
    run_inline = delegated(Caller.run_inline)
    run_composition = delegated(Bursts.run_composition, _bursts)
    aconnect = delegated(Caller.aconnect)

    # -- results

    AsyncResult = delegated(Caller.AsyncResult)
    group_result = delegated(Bursts.group_result, _bursts)
    store_state = delegated(Caller.store_state)
    revoke_call = delegated(Caller.revoke_call)
    # For `app.GroupResult.restore(id)`, as in Celery.
    GroupResult = GroupResult
    ResultSet = ResultSet

    # -- what its settings make

    broker = made(Runtime.broker)
    broker_addresses = made(Runtime.broker_addresses)
    broker_name = made(Runtime.broker_name)
    memory_broker = made(Runtime.memory_broker)
    queue_defaults = made(Runtime.queue_defaults)
    queues = made(Runtime.queues)
    router = made(Runtime.router)
    delays = made(Runtime.delays)
    calls = made(Runtime.calls)
    workflows = made(Runtime.workflows)
    publisher = made(Runtime.publisher)
    async_publisher = made(Runtime.async_publisher)
    backend_url = made(Runtime.backend_url)
    backend = made(Runtime.backend)
    outbox = made(Runtime.outbox)
    inbox = made(Runtime.inbox)
    control = made(Runtime.control)
    events = made(Runtime.events)
    event_publisher = made(Runtime.event_publisher)
    sent_events = made(Runtime.sent_events)
    history = made(Runtime.history)
    limits = made(Runtime.limits)

    @property
    def chord_store(self) -> ChordStore | None:
        """Where the parts of chords are counted: a result store that can, else (None) the broker."""
        return self.runtime.chord_store

    @property
    def timezone(self) -> tzinfo:
        """The time zone of schedules: `timezone`, else Django's TIME_ZONE in its projects, else UTC.

        Raises: ConfigurationError for one that is not known.
        """
        return self.runtime.timezone

    def now(self) -> datetime:
        """The present time in the application's time zone."""
        return datetime.now(self.timezone)

    install_outbox = delegated(Runtime.install_outbox, _runtime)
    install_inbox = delegated(Runtime.install_inbox, _runtime)
    # What puts runs of those with inbox=True into the inbox; None when none of these is one. Raises: ConfigurationError.
    make_inbox_runs = delegated(Runtime.make_inbox_runs, _runtime)

    def connection(self, *_: object, **__: object) -> BrokerConnection:
        """For `app.events.Receiver(connection)`, which connects by itself, and health checks: opened when it is used."""
        connection: BrokerConnection = plugins().celery_connection(self)
        return connection

    connection_for_read = connection_for_write = connection

    # -- configuration

    def config_from_object(
        self, source: object, silent: bool = False, force: bool = False, namespace: str | None = None
    ) -> None:
        """Take settings from a module (or its name), object, class or mapping, when the first setting is looked at.

        They take the place of those of an earlier call. What the application was made with, or was set before the first look at
        a setting, counts more. With `namespace="CELERY"` (or any other) only names with that prefix count.

        Raises (then): SettingUnknown.
        """

        self.namespace = namespace or self.namespace
        self._is_configured = True

        def read() -> None:
            try:
                self.conf.configure(source, namespace=namespace)
            except (ImportError, ConfigurationError):
                if not silent:
                    raise

        self.conf.later(read)
        if force:
            self.conf.is_set("broker_url")

    def _read_loader(self) -> None:
        """Take the settings of an application that was told none."""
        if self._is_configured:
            return
        loader = self.__dict__.get("loader")
        source = os.environ.get("CELERY_CONFIG_MODULE") if loader is None else loader.read_configuration()
        if source:
            self.conf.configure(source, namespace=self.namespace)

    def config_from_envvar(self, variable_name: str, silent: bool = False, force: bool = False) -> None:
        """Take settings from the module that an environment variable names. Raises: ConfigurationError when it is not set."""
        name = os.environ.get(variable_name)
        if not name:
            if silent:
                return
            raise ConfigurationError(f"the environment variable {variable_name} names no configuration module")
        self.config_from_object(name, silent=silent, force=force)

    def setup_security(
        self,
        allowed_serializers: Iterable[str] | None = None,
        key: str | os.PathLike[str] | None = None,
        key_password: bytes | str | None = None,
        cert: str | os.PathLike[str] | None = None,
        store: str | os.PathLike[str] | None = None,
        digest: str | None = None,
        serializer: str = "json",
    ) -> None:
        """Sign and verify messages in this process (the serializer `auth`): for all its applications, as Celery does.

        What is None is taken from the settings `security_key` and so on. `serializer` writes what is signed; JSON, it and
        `allowed_serializers` are read. Raises: ConfigurationError.
        """
        from amqtask.security import setup_security

        setup_security(allowed_serializers, key, key_password, cert, store, digest, serializer, app=self)

    def _settings_changed(self) -> None:
        """Drop what was made from settings; it is made again when it is asked for."""
        self.runtime = self.runtime.renewed()
        if self.is_finalized:
            for task in self.tasks.values():
                task.bind(self)

    # -- tasks

    @overload
    def task(self, function: Callable[P, CoroutineOf[R]], /) -> AsyncTask[P, R]: ...
    @overload
    def task(self, function: Callable[P, R], /) -> TaskBase[P, R]: ...
    @overload
    def task(self, /, *, bind: Literal[True], **options: object) -> TaskMaker[Literal[True]]: ...
    @overload
    def task(self, /, *, bind: Literal[False] = False, **options: object) -> TaskMaker[Literal[False]]: ...
    def task(self, function: Any = None, /, *, bind: bool = False, **options: Any) -> Any:
        """Make a function a task: `@app.task` or `@app.task(name=…, bind=True, max_retries=5, …)`.

        Options are the attributes of Task, and bind, base, name, shared, pydantic. Others become attributes of the task, for
        whoever reads them; a near miss is warned of.
        """
        if function is None:
            return lambda decorated: self._make(decorated, bind=bind, **options)
        return self._make(function, bind=bind, **options)

    def _make(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        base: type[RegisteredTask] | None = None,
        bind: bool = False,
        shared: bool = True,
        lazy: bool = True,
        filter: Callable[..., Any] | None = None,
        pydantic: bool = False,
        pydantic_strict: bool = False,
        pydantic_context: KeywordDict | None = None,
        pydantic_dump_kwargs: KeywordDict | None = None,
        **options: object,
    ) -> RegisteredTask:
        if name is not None:
            name = option_types.convert(
                f"task {function.__module__}.{function.__name__}: name", option_types.NAME, name
            )
        task_name = name or self.gen_task_name(function.__name__, function.__module__)
        if self.tasks.has(task_name):
            return _registered_before(self.tasks[task_name], function)
        task_class = base or self._task_class
        if base is None and task_class is TaskBase and inspect.iscoroutinefunction(function):
            task_class = AsyncTask
        new_task = make_task(
            filter(function) if filter else function,
            task_class,
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
        registered: RegisteredTask = self.register_task(new_task)
        return registered

    def register_task(self, task: Any, **options: object) -> Any:
        """Register a class-based task (an instance or a class)."""
        instance = task(**options) if isinstance(task, type) else task
        if not instance.name:
            instance.name = self.gen_task_name(type(instance).__name__, type(instance).__module__)
        instance.__dict__.setdefault("__name__", type(instance).__name__)
        instance.check_options()
        instance.app = self
        self.tasks.register(instance)
        if self.is_finalized:
            instance.bind(self)
        return instance

    def gen_task_name(self, name: str, module: str) -> str:
        """`<module>.<function>`; `main` stands for `__main__`."""
        if module == "__main__" and self.main:
            module = self.main
        elif module == "__main__":
            module = name_of_main()
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
        """Import what `include`, `imports` and autodiscover_tasks name; Django's applications first, in a Django project."""
        prepare_django()
        if signals.import_modules:
            signals.import_modules.send(sender=self)
        for module in (*self.conf.include, *self.conf.imports):
            load(module)
        self._discover_now()

    def load_tasks(self) -> None:
        """Have all tasks: import the modules that are named, then `finalize`."""
        self.import_modules()
        self.finalize()

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

    # -- periodic tasks

    def add_periodic_task(
        self,
        schedule: Any,
        sig: Any,
        args: Iterable[object] = (),
        kwargs: Keywords | None = None,
        name: str | None = None,
        **options: object,
    ) -> str:
        """Have beat send a task (or a signature) by a schedule: seconds, a timedelta, crontab() …; the entry's name.

        An entry of the same name is replaced; without `name` that is the call as text. `options` are those of `apply_async`.
        """
        call = sig.clone(args, kwargs) if isinstance(sig, Signature) else self.signature(sig.name, args, kwargs)
        key = name or repr(call)
        entry = {
            "schedule": schedule,
            "task": call.task,
            "args": tuple(call["args"]),
            "kwargs": dict(call["kwargs"]),
            "options": {**call["options"], **options},
        }
        if not self._new_periodic:
            self.conf.later(self._add_new_periodic)
        self._new_periodic.append((key, name is not None, entry))
        return key

    def _add_new_periodic(self) -> None:
        """With the first look at a setting, after the configuration was read."""
        schedule = self.conf.beat_schedule
        new, self._new_periodic = self._new_periodic, []
        for key, is_named, entry in new:
            if key in schedule and not is_named:
                logger.warning("the periodic task %s replaces another one: give each its own name=", key)
            schedule[key] = entry

    # -- for workers

    @property
    def Task(self) -> type[RegisteredTask]:
        """The class of tasks that name no `base=`, for `class Mine(app.Task)`; `app.Task = Mine` makes it another one."""
        return self._task_class

    @Task.setter
    def Task(self, task_class: type[RegisteredTask]) -> None:
        self._task_class = task_class

    def make_executor(
        self,
        hostname: str,
        *,
        verbose: Flag = OFF,
        wrapper: Wrapper | None = None,
        gate: Gate | None = None,
        later: Callable[..., object] | None = None,
    ) -> Executor:
        """Makes the executor that runs this app's tasks in a worker; `wrapper` wraps the coroutines of tasks. `gate` lets unique
        and limited tasks in, and `later` calls a function with arguments in a thread."""
        self.finalize()
        make: Callable[..., Executor] = Executor if gate is None else partial(GatedExecutor, gate=gate, later=later)
        if any(task.batch is not None for task in self.tasks.values()):
            make = partial(BatchedExecutor, gate=gate, later=later)
        return make(
            self.tasks,
            accept=content_types(self.conf.accept_content),
            composer=self.workflows,
            store=self.backend,
            chord_store=self.chord_store,
            serializer=self.conf.result_serializer,
            hostname=hostname,
            verbose=verbose,
            extended=bool(self.conf.result_extended),
            wrapper=wrapper,
            largest_body=self.conf.worker_max_body_size or LARGEST_BODY,
            bounds=Bounds(self.conf.worker_max_follow_ups, self.conf.worker_max_new_queues, self.queues),
            inbox=self.make_inbox_runs(self.tasks),
        )

    # -- running and closing

    def set_current(self) -> None:
        """Be the application of shared tasks and of results that name none."""
        current.set_current(self)

    set_default = set_current

    def worker_main(self, argv: Sequence[str] | None = None) -> int:
        """Run `amqtask worker …` with this app; `argv` as on the command line (`["worker", "-l", "INFO"]`)."""
        arguments = list(sys.argv[1:] if argv is None else argv)
        return self.start(arguments if "worker" in arguments else ["worker", *arguments])

    def start(self, argv: Sequence[str] | None = None) -> int:
        """Run the command line with this app; the exit code.

        In a program that other modules import as well (`python -m proj.app`, whose tasks import `proj.app`), their app runs:
        it has their tasks.
        """
        twin = twin_of_main(self, self.import_modules)
        app = twin if isinstance(twin, AmqTask) else self
        return plugins().run_command_line(app, list(sys.argv[1:] if argv is None else argv))

    close = delegated(Runtime.close, _runtime)
    aclose = delegated(Runtime.aclose, _runtime)

    def clear_memory(self) -> None:
        """With `memory://` forget the broker and all that is in it, and stored results; for the next test."""
        self.close()
        self.runtime = self.runtime.emptied()

    def __enter__(self) -> AmqTask:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<AmqTask {self.main or '__main__'}>"


# Under Celery's name, for programs that only change what they import.
Celery = AmqTask


def _registered_before(task: RegisteredTask, function: Callable[..., object]) -> RegisteredTask:
    """The task that has the name already. A module that is imported twice makes the same task again; another function's task
    would never run, so that is said."""
    first, second = _source_of(getattr(type(task), "__wrapped__", type(task).run)), _source_of(function)
    if first != second:
        warnings.warn(
            f"two tasks are named {task.name!r}: that of {first} is used, that of {second} never runs. Give one of them a name "
            "of its own (name=…)",
            DuplicateTaskNameWarning,
            stacklevel=4,
        )
    return task


def _source_of(function: Callable[..., object]) -> str:
    wrapped = inspect.unwrap(function)
    code = getattr(wrapped, "__code__", None)
    if code is None:
        return f"{getattr(wrapped, '__module__', '?')}.{getattr(wrapped, '__qualname__', wrapped)}"
    return f"{wrapped.__qualname__} in {os.path.realpath(code.co_filename)}, line {code.co_firstlineno}"


__getattr__ = others_names(__name__)
