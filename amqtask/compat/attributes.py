"""What Celery's requests, results, signals, settings and tasks have besides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar

from amqtask import states
from amqtask.compat.stores import Asked, Meta, message_of, meta_of
from amqtask.exceptions import TimeoutError
from amqtask.execution.context import Context, current, current_context
from amqtask.execution.request import Request
from amqtask.ground.current import current_app
from amqtask.ground.printable import mask_urls
from amqtask.result import AsyncResult
from amqtask.results import ResultSet
from amqtask.settings import Settings
from amqtask.settings.table import SETTINGS
from amqtask.signals import Signal
from amqtask.task import Task

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.calls.application import Application
    from amqtask.ground.shapes import SettingValues
    from amqtask.protocol.message import Message
    from amqtask.protocol.result import ResultMessage


def _header(name: str, default: object = None) -> property:
    def header(request: Request) -> object:
        value = request.headers.get(name)
        return default if value is None else value

    return property(header)


class OfRequest(Request):
    """Bound to a request."""

    __slots__ = ()

    argsrepr = _header("argsrepr", "")
    kwargsrepr = _header("kwargsrepr", "")
    eta = _header("eta")
    expires = _header("expires")
    group = _header("group")
    group_index = _header("group_index")
    ignore_result = _header("ignore_result", False)
    origin = _header("origin")
    parent_id = _header("parent_id")
    replaced_task_nesting = _header("replaced_task_nesting", 0)
    retries = _header("retries", 0)
    root_id = _header("root_id")
    shadow = _header("shadow")
    stamped_headers = _header("stamped_headers", [])
    stamps = _header("stamps", {})

    name = task_name = property(attrgetter("task"))
    task_id = property(attrgetter("id"))
    request_dict = property(attrgetter("headers"))
    time_limit = property(attrgetter("hard_limit"))
    soft_time_limit = property(attrgetter("soft_limit"))


class OfCurrent:
    """What belongs to the current application."""

    @property
    def app(self) -> AmqTask:
        """The current application."""
        app: AmqTask = current_app()
        return app


class Joined(OfCurrent):
    """One result, or several."""

    TimeoutError: ClassVar[type[Exception]] = TimeoutError
    supports_native_join = False


class OfResult(Joined, AsyncResult[Any]):
    """Bound to a result."""

    def _get_task_meta(self) -> Meta:
        stored = self.latest_meta()
        return meta_of(self.id, None if stored.status == states.PENDING else stored)

    def exists(self) -> bool:
        """Whether the store knows anything of the task."""
        return self.state != states.PENDING

    def throw(self, *args: Any, **kwargs: Any) -> Any:
        """Raise the error of a task that failed."""
        return self.maybe_throw(*args, **kwargs)


class OfResults(Joined, ResultSet):
    """Bound to several."""

    def _failed_join_report(self) -> Iterator[object]:
        return (result for result in self.results if result.state in states.PROPAGATE_STATES)


class OfSignal(Signal):
    """Bound to a signal."""

    def send_robust(self, sender: object = None, **arguments: object) -> list[tuple[Callable[..., Any], Any]]:
        """`send` under Django's name."""
        return self.send(sender, **arguments)

    @property
    def providing_args(self) -> set[str]:
        """Names of the arguments that receivers get."""
        return set(self.arguments)

    @property
    def receivers(self) -> list[tuple[Any, Callable[[], Any]]]:
        """Those that are connected: ((what it is known by, the sender's key), a function that gives the receiver)."""
        return [(key, reference) for key, (_, reference) in self.connected.items()]


class Option:
    """Where a setting belongs: `namespace`, `key`, and its default."""

    def __init__(self, namespace: str, key: str, default: Any) -> None:
        self.namespace = namespace
        self.key = key
        self.default = default


def _is_set(conf: Settings, name: str) -> bool:
    return name in conf and conf[name] is not None


class OfSettings(Settings):
    """Bound to `app.conf`."""

    def first(self, *keys: str) -> Any:
        """The first of these settings that has a value."""
        return next((self[key] for key in keys if _is_set(self, key)), None)

    def get_by_parts(self, *parts: str) -> Any:
        """`get_by_parts("task", "default", "queue")`."""
        return self["_".join(part for part in parts if part)]

    def find_option(self, name: str, namespace: str = "") -> Option:
        """The setting of that name, in the namespace or any other. Raises: KeyError."""
        by_name = {setting.name: setting for setting in SETTINGS}
        full_name = f"{namespace}_{name}" if namespace else name
        match = by_name.get(full_name) or next((by_name[key] for key in by_name if key.endswith(f"_{name}")), None)
        if match is None:
            raise KeyError(name)
        space, _, key = match.name.partition("_")
        return Option(space, key, match.default)

    def find_value_for_key(self, name: str, namespace: str = "celery") -> Any:
        """The value of the setting that ends so: `find_value_for_key("default_queue", "task")`."""
        if namespace and f"{namespace}_{name}" in self:
            return self[f"{namespace}_{name}"]
        if name in self:
            return self[name]
        option = OfSettings.find_option(self, name)
        return self[f"{option.namespace}_{option.key}"]

    def value_set_for(self, key: str) -> bool:
        """Whether the setting has been set."""
        return self.is_set(key)

    def without_defaults(self) -> dict[str, Any]:
        """The settings that have been set."""
        return {name: self[name] for name in self if self.is_set(name)}

    def add_defaults(self, fun: Any) -> None:
        """Values (or a function that returns them) for what is not set."""
        values: SettingValues = fun() if callable(fun) else fun
        for name, value in values.items():
            if not self.is_set(name):
                self[name] = value

    @property
    def changes(self) -> dict[str, Any]:
        """The settings that have been set."""
        return OfSettings.without_defaults(self)

    @property
    def defaults(self) -> list[dict[str, Any]]:
        """The values of what is not set."""
        return [{setting.name: setting.default for setting in SETTINGS}]


_BELOW = "request_below"


class RequestStack:
    """`task.request_stack`."""

    def __init__(self, task: Task[..., Any]) -> None:
        self._task = task

    @property
    def top(self) -> Context | None:
        """The request that runs."""
        context = current.get()
        return context if context is not None and context.task == self._task.name else None

    @property
    def stack(self) -> list[Context]:
        """All requests of the task, the last one on top."""
        contexts: list[Context] = []
        context = current.get()
        while context is not None:
            if context.task == self._task.name:
                contexts.insert(0, context)
            context = context.__dict__.get(_BELOW)
        return contexts

    def push(self, context: Any) -> None:
        """Make a context `task.request` in this thread or coroutine."""
        context.__dict__[_BELOW] = current.get()
        context.__dict__.setdefault("task", self._task.name)
        current.set(context)

    def pop(self) -> Context | None:
        """Undo `push`; returns the request that ended."""
        context = current.get()
        if context is not None:
            current.set(context.__dict__.get(_BELOW))
        return context

    def __len__(self) -> int:
        return len(self.stack)


class OfTask(Task[..., Any]):
    """Bound to a task."""

    def _get_app(self) -> Application:
        return self.app

    def _get_request(self) -> Context:
        return self.request

    def push_request(self, *args: object, **kwargs: object) -> None:
        """Have `task.request` be one with these fields."""
        RequestStack(self).push(Context(**dict(*args, **kwargs)))

    def pop_request(self) -> Context | None:
        """End what `push_request` began."""
        return RequestStack(self).pop()

    @property
    def request_stack(self) -> RequestStack:
        """The requests that run, here the task's own."""
        return RequestStack(self)

    def start_strategy(self, app: object, consumer: object, **kwargs: object) -> Any:
        """Do nothing: our workers need no strategy per task."""
        return None

    def on_bound(self, app: object) -> None:
        """Do nothing: for `super().on_bound(app)`."""

    def on_replace(self, sig: Any) -> Any:
        """Replace the task, for `super().on_replace(sig)`."""
        return self.replace(sig)

    def signature_from_request(
        self, request: Any = None, args: Any = None, kwargs: Any = None, queue: str | None = None, **extra: object
    ) -> Any:
        """A signature that calls the task as `request` does, with one retry more."""
        context = self.request if request is None else request
        options = {
            "task_id": context.id,
            "retries": (context.retries or 0) + 1,
            "group_id": context.group,
            **({"queue": queue} if queue else {}),
            **extra,
        }
        return self.signature(
            context.args if args is None else args,
            context.kwargs if kwargs is None else kwargs,
            **{name: value for name, value in options.items() if value is not None},
        )

    subtask_from_request = signature_from_request


# -- `app.backend`, `task.backend`, `result.backend`: what Celery's result stores have besides.


class OfStore(OfCurrent, Asked):  # type: ignore[override] # Asked has it as an attribute
    """Bound to a store of the current application."""

    if TYPE_CHECKING:

        def find(self, task_id: str) -> ResultMessage | None: ...

        def store(self, result: ResultMessage) -> None: ...

        def message_for(
            self, result: ResultMessage, reply_to: str | None, correlation_id: str | None
        ) -> Message | None: ...

    @property
    def serializer(self) -> Any:
        """The serializer of results."""
        return self.app.conf.result_serializer

    @property
    def expires(self) -> Any:
        """Seconds that results are kept; None for ever."""
        return self.app.conf.result_expires

    @property
    def url(self) -> str | None:
        """The store's URL."""
        return self.app.backend_url

    def as_uri(self, include_password: bool = False) -> str:
        """The store's URL for people; without password unless that is asked for."""
        return (self.url or "") if include_password else mask_urls(self.url or "")

    def get_task_meta(self, task_id: str, cache: bool = True) -> Meta:
        """The stored meta of a task; PENDING where nothing is stored. Raises: BackendUnreachable."""
        return meta_of(task_id, self.find(task_id))

    def reload_task_result(self, task_id: str) -> None:
        """Do nothing: the store caches no results."""

    def store_result(
        self, task_id: str, result: Any, state: str, traceback: object = None, request: Any = None, **kwargs: object
    ) -> Any:
        """Store a value, an exception or a meta; over `rpc://` it goes to who has called `request`, or the task that runs here.

        Raises: EncodeError, BackendUnreachable, PublishError.
        """
        result_message = message_of(task_id, result, state, traceback, request, self.serializer)
        of_call = current_context() if request is None else request
        correlation_id = getattr(of_call, "correlation_id", None) or task_id
        message = self.message_for(result_message, getattr(of_call, "reply_to", None), correlation_id)
        if message is None:
            self.store(result_message)
        elif message.routing_key:
            self.app.publisher.publish(message)
        return result_message.result


class OfRedis:
    """Bound to a store in Redis."""

    _connections: Any

    @property
    def client(self) -> Any:
        """redis-py's client, as the store uses it in this process: for locks, counters, health checks."""
        return self._connections.get()[0].client
