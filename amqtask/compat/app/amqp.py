"""`celery.app.amqp`: queues and routes, as `app.amqp` shows them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from amqtask.client.message_builder import eta_of
from amqtask.exceptions import InvalidTaskError
from amqtask.protocol.entities import Exchange, Queue
from amqtask.protocol.task import TaskCall, saferepr, task_headers

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.ground.shapes import JsonObject, Keywords, OptionDict, Options

__all__ = ["AMQP", "Queues", "task_message"]


# -- Task messages as Celery's parts hand them around: made by `app.amqp`, read by `worker.strategy`; not what is published here.

# Options of calls that TaskCall has under other names; and those that are no part of a message.
_RENAMED = {"group_id": "group"}
_NOT_WRITTEN = frozenset({"countdown", "eta", "expires", "create_sent_event", "now", "timezone", "stamped_headers"})


class task_message(NamedTuple):
    """The four parts of a message; the body is what would be encoded."""

    headers: dict[str, Any]
    properties: dict[str, Any]
    body: Any
    sent_event: dict[str, Any] | None


def as_task_v2(task_id: str, name: str, args: Any = None, kwargs: Any = None, **options: Any) -> task_message:
    """Protocol 2. Raises: TypeError."""
    args, kwargs = _checked(args, kwargs)
    stamps = options.get("stamped_headers")
    call = TaskCall(
        task_id,
        name,
        args,
        kwargs,
        eta=eta_of(options.get("eta"), options.get("countdown")),
        expires=_expiry(options.get("expires")),
        argsrepr=options.pop("argsrepr", None) or saferepr(args),
        kwargsrepr=options.pop("kwargsrepr", None) or saferepr(kwargs),
        stamped_headers=stamps,
        stamps={header: options.pop(header) for header in stamps or ()},
        **{_RENAMED.get(key, key): value for key, value in options.items() if key not in _NOT_WRITTEN},
    )
    headers = task_headers(call)
    event = {key: headers[key] for key in ("root_id", "parent_id", "retries", "eta", "expires")}
    event |= {"uuid": task_id, "name": name, "args": headers["argsrepr"], "kwargs": headers["kwargsrepr"]}
    return task_message(
        headers,
        _properties(task_id, call.reply_to),
        (args, kwargs, call.embed),
        event if options.get("create_sent_event") else None,
    )


def as_task_v1(task_id: str, name: str, args: object = None, kwargs: object = None, **options: Any) -> task_message:
    """Protocol 1: all of it is in the body. Raises: TypeError."""
    args, kwargs = _checked(args, kwargs)
    eta, expires = eta_of(options.get("eta"), options.get("countdown")), _expiry(options.get("expires"))
    group = options.get("group_id")
    body = {
        "task": name,
        "id": task_id,
        "args": args,
        "kwargs": kwargs,
        "group": group,
        "group_index": options.get("group_index"),
        "retries": options.get("retries") or 0,
        "eta": eta and eta.isoformat(),
        "expires": expires and expires.isoformat(),
        "utc": True,
        "callbacks": options.get("callbacks"),
        "errbacks": options.get("errbacks"),
        "timelimit": (options.get("time_limit"), options.get("soft_time_limit")),
        "taskset": group,
        "chord": options.get("chord"),
    }
    event = {key: body[key] for key in ("retries", "eta", "expires")}
    event |= {"uuid": task_id, "name": name, "args": saferepr(args), "kwargs": saferepr(kwargs)}
    properties = _properties(task_id, options.get("reply_to"))
    return task_message({}, properties, body, event if options.get("create_sent_event") else None)


def _checked(args: object, kwargs: object) -> tuple[object, object]:
    args, kwargs = args or (), kwargs or {}
    if not isinstance(args, (list, tuple)):
        raise TypeError("task args must be a list or tuple")
    if not isinstance(kwargs, Mapping):
        raise TypeError("task keyword arguments must be a mapping")
    return args, kwargs


def _properties(task_id: str, reply_to: str | None) -> JsonObject:
    return {"correlation_id": task_id, "reply_to": reply_to or ""}


def _expiry(expires: object) -> datetime | None:
    """Seconds from now, or a time."""
    return eta_of(None, expires) if isinstance(expires, (int, float)) else eta_of(expires, None)


# -- reading protocol 1, as (body, headers, whether the body is decoded, whether times are UTC)

Read = tuple[tuple[Any, Any, dict[str, Any]], dict[str, Any], bool, bool]
_IN_HEADERS = (
    "lang", "task", "id", "root_id", "parent_id", "group", "meth", "shadow", "eta", "expires", "argsrepr", "kwargsrepr", "origin",
)  # fmt: skip


def hybrid_to_proto2(message: Any, body: dict[str, Any]) -> Read:
    """Of a message with everything in its body, and perhaps headers that say more. Raises: InvalidTaskError."""
    headers = {name: body.get(name) for name in _IN_HEADERS}
    headers |= {"retries": body.get("retries", 0), "timelimit": body.get("timelimit", (None, None))}
    return _embedded(body), {**headers, **(message.headers or {})}, True, body.get("utc", True)


def proto1_to_proto2(message: Any, body: dict[str, Any]) -> Read:
    """The same; the body becomes the headers. Raises: InvalidTaskError."""
    embedded = _embedded(body)
    body.update(argsrepr=saferepr(embedded[0]), kwargsrepr=saferepr(embedded[1]), headers=message.headers)
    if "taskset" in body:
        body["group"] = body["taskset"]
    return embedded, body, True, body.get("utc", True)


def _embedded(body: Any) -> tuple[object, object, dict[str, object]]:
    if not isinstance(body, Mapping):
        raise InvalidTaskError("Message does not have args/kwargs")
    kwargs = body.get("kwargs", {})
    if not isinstance(kwargs, Mapping):
        raise InvalidTaskError("Task keyword arguments must be a mapping")
    embed = {name: body.get(name) for name in ("callbacks", "errbacks", "chord")} | {"chain": None}
    return body.get("args", ()), kwargs, embed


# -- app.amqp


class Queues(Mapping[str, Queue]):
    """`app.amqp.queues`: the queues by name. A name that is asked for and not there is made, if the settings allow it."""

    def __init__(self, app: AmqTask) -> None:
        self._app = app

    def __getitem__(self, name: str) -> Queue:
        queue = self._app.queues[name]
        return queue if queue.exchange is not None else replace(queue, exchange=Exchange())

    def __contains__(self, name: object) -> bool:
        return name in self._app.queues

    def __iter__(self) -> Iterator[str]:
        return iter(self._app.queues)

    def __len__(self) -> int:
        return len(self._app.queues)

    @property
    def consume_from(self) -> dict[str, Queue]:
        """The queues that a worker consumes."""
        return {queue.name: queue for queue in self._app.queues.consumed}

    def add(self, queue: Queue | str, **options: Any) -> Queue:
        """Add a queue."""
        return self._app.queues.add(Queue(queue, **options) if isinstance(queue, str) else queue)

    def select(self, include: str | Iterable[str]) -> None:
        """Consume these queues only."""
        self._app.queues.select([include] if isinstance(include, str) else include)

    def deselect(self, exclude: str | Iterable[str]) -> None:
        """Consume all queues but these."""
        self._app.queues.deselect([exclude] if isinstance(exclude, str) else exclude)

    def select_add(self, queue: str, **options: object) -> Queue:
        """Add a queue and consume it, too."""
        added = self.add(queue, **options)
        self._app.queues.select([*self.consume_from, added.name])
        return added

    def format(self, indent: int = 0, indent_first: bool = True) -> str:
        """The queues as text, for people."""
        lines = [
            f".> {queue.name:<16} exchange={queue.exchange.name if queue.exchange else ''} key={queue.routing_key}"
            for queue in self.consume_from.values()
        ]
        return "\n".join(" " * (indent if number or indent_first else 0) + line for number, line in enumerate(lines))


class Router:
    """`app.amqp.router`."""

    def __init__(self, app: AmqTask) -> None:
        self.app = app

    def route(
        self,
        options: Options,
        name: str,
        args: Sequence[object] = (),
        kwargs: Keywords | None = None,
        task_type: object = None,
    ) -> OptionDict:
        """The options of a call, with those of its route, and the Queue under "queue".

        Raises: QueueNotFound, ConfigurationError.
        """
        route = self.app.router.route(name, args, kwargs, options, task_type)
        if route.queue is None:
            return {**route.options, "exchange": route.exchange, "routing_key": route.routing_key}
        return {**route.options, "queue": self.app.amqp.queues[route.queue.name]}  # type: ignore[attr-defined] # of app_attributes


class AMQP:
    """`app.amqp`."""

    as_task_v1, as_task_v2 = staticmethod(as_task_v1), staticmethod(as_task_v2)

    def __init__(self, app: AmqTask) -> None:
        self.app = app
        self.queues = Queues(app)
        self.task_protocols = {1: as_task_v1, 2: as_task_v2}

    @property
    def create_task_message(self) -> Any:
        """What makes the parts of a message."""
        return self.task_protocols[self.app.conf.task_protocol]

    @property
    def router(self) -> Router:
        """The router, which finds the queue of a call."""
        return Router(self.app)

    @property
    def routes(self) -> Any:
        """The setting task_routes, as a list."""
        routes = self.app.conf.task_routes or []
        return list(routes) if isinstance(routes, (list, tuple)) else [routes]

    @property
    def default_queue(self) -> Queue:
        """The queue of calls that no route names."""
        return self.queues[self.app.conf.task_default_queue]

    @property
    def default_exchange(self) -> Any:
        """The exchange of the default queue."""
        return self.default_queue.exchange

    @property
    def producer_pool(self) -> Any:
        """Producers to acquire."""
        return self.app.producer_pool  # type: ignore[attr-defined] # of amqtask.compat.app_attributes

    def flush_routes(self) -> None:
        """Do nothing: routes are read again when settings change."""
