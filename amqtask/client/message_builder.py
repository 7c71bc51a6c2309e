"""From a task's name, arguments and options to the message of a call: routing, times, workflow links; no I/O."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import fields, replace
from datetime import datetime, timedelta, timezone, tzinfo
from typing import TYPE_CHECKING, Any

from amqtask import signals
from amqtask.calls.signature import listed
from amqtask.exceptions import ConfigurationError, EncodeError
from amqtask.execution.context import Context, current
from amqtask.flow.deadline import HEADER as DEADLINE
from amqtask.flow.deadline import bind, deadline_in
from amqtask.flow.keys import TICKETS, UNIQUE
from amqtask.ground.printable import bounded_logger, described
from amqtask.protocol import option_types
from amqtask.protocol.compression import compress
from amqtask.protocol.entities import Exchange, Queue
from amqtask.protocol.message import Message, Properties, strip_transit_headers
from amqtask.protocol.option_types import CALL_NAMES
from amqtask.protocol.serialization import JSON, dumps, is_private
from amqtask.protocol.task import (
    PROTOCOL_HEADERS,
    PUBLISHED_AT,
    RUN_HEADER,
    TaskCall,
    decode_body,
    encode_task,
    limits_in,
)
from amqtask.task import check_names
from amqtask.topology.delays import DelayPlan

if TYPE_CHECKING:
    from amqtask.calls.application import CalledTask
    from amqtask.execution.request import Request
    from amqtask.ground.shapes import HeaderDict, Headers, JsonObject, Keywords, Options, TaskBody
    from amqtask.settings import Settings
    from amqtask.topology.routes import Route, Router

logger = bounded_logger("amqtask.client")
_ROUTING = frozenset({"queue", "exchange", "exchange_type", "routing_key"})
_PROPERTIES = frozenset(
    {"message_id", "timestamp", "type", "user_id", "app_id", "content_type", "content_encoding", "expiration",
     "correlation_id"}
)  # fmt: skip


# A name of so many characters, of at most four bytes, has its room.
_ALWAYS_FITS = 63


class _Unregistered:
    """The options of a task that is not registered here: none."""

    time_limit = soft_time_limit = expires = deadline = flow_plan = priority = ignore_result = delivery_mode = (
        serializer
    ) = compression = None


_UNREGISTERED = _Unregistered()


class Calls:
    """Composes task messages for one app."""

    def __init__(self, conf: Settings, router: Router, delays: DelayPlan, zone: Callable[[], tzinfo]) -> None:
        # The time zone that times without one are in.
        self._zone = zone
        self._router = router
        self._delays = delays
        self._serializer: str = conf.task_serializer
        self._compression: str | None = conf.task_compression
        self._priority: int = conf.task_default_priority or 0
        self._inherits_priority = bool(conf.task_inherit_parent_priority)
        self._delivery_mode: int = conf.task_default_delivery_mode or 2
        self._says_when = bool(conf.task_send_timestamp)

    def compose(
        self,
        name: str,
        args: Sequence[object],
        kwargs: Keywords,
        options: Options,
        *,
        task: CalledTask | None = None,
        reply_to: str = "",
        is_follow_up: bool = False,
    ) -> Message:
        """The message of a call; `is_follow_up`: of one that a task's end brings. Raises: TypeError (unknown option), ValueError,
        EncodeError, QueueNotFound."""
        if task is None:
            if not (name.__class__ is str and 0 < len(name) <= _ALWAYS_FITS) and not is_follow_up:
                name = option_types.convert("the name of a task", option_types.NAME, name)
        elif task.as_data is not None:
            args, kwargs = task.as_data(args, kwargs)
        if options and not CALL_NAMES.issuperset(options):
            self.check_options(name, options, task)
        route = self._router.route(name, args, kwargs, {key: options[key] for key in _ROUTING if key in options}, task)
        if task is not None and task.fair_plan is not None:
            try:
                route = self._router.shared(route, name, args, kwargs, task)
            except Exception as error:  # a user's function, or a key of odd values
                if not is_follow_up:
                    raise
                # The task that has ended is not to blame, and may have had its effects.
                logger.warning(
                    "a call of task %s goes to queue %s: it has no key for fair_by (%r)", name, route.routing_key, error
                )
        if route.options:
            options = {**route.options, **options}
        if not options and task is None:
            call = TaskCall(str(uuid.uuid4()), name, args, kwargs, reply_to=reply_to, priority=self._priority)
            call.delivery_mode = self._delivery_mode
        else:
            call = self._with_options(name, args, kwargs, options, task, reply_to)
        parent = current.get()
        if parent is not None and parent.id is not None and options.get("add_to_parent", True):
            self._adopt(call, parent, options)
        return self._message(call, route, options, task)

    def _with_options(
        self,
        name: str,
        args: Sequence[object],
        kwargs: Keywords,
        options: Options,
        task: CalledTask | None,
        reply_to: str,
    ) -> TaskCall:
        get = options.get
        defaults = _UNREGISTERED if task is None else task
        hard = get("time_limit") or defaults.time_limit
        soft = get("soft_time_limit") or defaults.soft_time_limit
        if hard is not None and soft is not None and soft > hard:
            raise ValueError(
                f"task {name}: soft_time_limit must be less than or equal to time_limit, and {soft:g} is above {hard:g}"
            )
        expires = get("expires")
        if expires is None:
            expires = defaults.expires
        priority = get("priority")
        if priority is None:
            priority = defaults.priority
        ignore = get("ignore_result")
        if ignore is None:
            ignore = defaults.ignore_result
        call = TaskCall(
            get("task_id") or str(uuid.uuid4()),
            name,
            args,
            kwargs,
            reply_to=get("reply_to") or reply_to,
            priority=self._priority if priority is None else priority,
            ignore_result=ignore,
            expires=_expiry(expires, self._zone),
            delivery_mode=get("delivery_mode") or defaults.delivery_mode or self._delivery_mode,
        )
        if options:
            self._add_rare_options(call, options, task, args, kwargs)
        limit = get("deadline")
        if limit is None:
            limit = defaults.deadline
        if limit is not None:
            bind(call, deadline_of(limit, call.eta, self._zone))
        elif call.headers and (inherited := deadline_in(call.headers)) is not None:
            bind(call, inherited)
        plan = defaults.flow_plan
        if plan is not None and plan.unique is not None:
            call.headers = {**(call.headers or {}), UNIQUE: plan.unique_key(args, kwargs)}
        return call

    def _add_rare_options(
        self, call: TaskCall, options: Options, task: CalledTask | None, args: Sequence[object], kwargs: Keywords
    ) -> None:
        """The options that few calls have."""
        get = options.get
        call.eta = eta_of(get("eta"), get("countdown"), self._zone)
        call.retries = get("retries") or 0
        call.time_limit, call.soft_time_limit = get("time_limit"), get("soft_time_limit")
        call.group, call.group_index = get("group_id"), get("group_index")
        call.root_id, call.parent_id = get("root_id"), get("parent_id")
        call.shadow = get("shadow") or (task.shadow_name(args, kwargs, options) if task is not None else None)
        call.callbacks, call.errbacks = listed(get("link")) or None, listed(get("link_error")) or None
        call.chain, call.chord = get("chain"), get("chord")
        call.replaced_task_nesting = get("replaced_task_nesting") or 0
        names = get("stamped_headers")
        if names:
            call.stamped_headers = list(names)
            call.stamps = {
                name: options[name] if name in options else (get("stamps") or {}).get(name) for name in names
            }
        call.origin = get("origin")
        call.argsrepr, call.kwargsrepr = get("argsrepr"), get("kwargsrepr")
        call.headers = get("headers")
        if call.chain and RUN_HEADER not in (call.headers or {}):
            call.headers = {**(call.headers or {}), RUN_HEADER: uuid.uuid4().hex}
        extra = {key: options[key] for key in _PROPERTIES if options.get(key) is not None}
        call.correlation_id = extra.pop("correlation_id", None)
        call.extra_properties = extra or None

    def _adopt(self, call: TaskCall, parent: Context, options: Options) -> None:
        """A call published by a task is its child."""
        if "root_id" not in options:
            call.root_id = parent.root_id or parent.id
        if "parent_id" not in options:
            call.parent_id = parent.id
        if parent.request is not None and DEADLINE in parent.request.headers:
            inherited = deadline_in(parent.request.headers)
            if inherited is not None:
                bind(call, inherited)
        if self._inherits_priority and options.get("priority") is None and parent.request is not None:
            call.priority = parent.request.priority or 0

    def _message(self, call: TaskCall, route: Route, options: Options, task: CalledTask | None) -> Message:
        defaults = _UNREGISTERED if task is None else task
        serializer = options.get("serializer") or defaults.serializer or self._serializer
        compression = options.get("compression") or defaults.compression or self._compression
        body, properties = self._encode(call, serializer, compression)
        message = Message(body, properties, route.exchange, route.routing_key, route.declare, mandatory=route.mandatory)
        if call.eta is not None:
            return self._delays.delayed(message, call.eta.timestamp() - time.time())
        return message

    def _encode(self, call: TaskCall, serializer: str, compression: str | None) -> tuple[bytes, Properties]:
        try:
            body, properties = encode_task(call, serializer=serializer, compression=compression)
        except EncodeError as error:
            raise _naming(call, serializer) or error from error.__cause__
        if self._says_when:
            properties.headers[PUBLISHED_AT] = int(time.time() * 1000)
        return body, properties

    def travelled(
        self, name: str, args: Sequence[object], kwargs: Keywords, options: Options, task: CalledTask
    ) -> tuple[object, object]:
        """The arguments as a worker would get them. Raises: EncodeError."""
        if task.as_data is not None:
            args, kwargs = task.as_data(args, kwargs)
        serializer = options.get("serializer") or task.serializer or self._serializer
        body, properties = self._encode(TaskCall("", name, args, kwargs), serializer, None)
        content_type = str(properties.content_type)
        decoded = decode_body(
            body, content_type, properties.content_encoding, properties.headers, frozenset({content_type})
        )
        return decoded[0], decoded[1]

    def compose_retry(self, request: Request, context: Context, *, when: datetime | float | None, sig: Any) -> Message:
        """The same task again: same id, workflow and place, `retries + 1` (celery-facts 1.8)."""
        changes: Options = sig or {}
        options = dict(changes.get("options") or {})
        headers = strip_transit_headers(request.headers)
        eta = eta_of(when, None, self._zone) if isinstance(when, datetime) else eta_of(None, when)
        expires, deadline = _expiry(options.get("expires"), self._zone), deadline_in(headers)
        if expires is not None and deadline is not None:
            expires = min(expires, deadline)
        hard, soft = limits_in(headers)
        call = TaskCall(
            request.id,
            request.task,
            context.args if changes.get("args") is None else tuple(changes["args"]),
            context.kwargs if changes.get("kwargs") is None else dict(changes["kwargs"]),
            eta=eta,
            expires=expires,
            retries=context.retries + 1,
            time_limit=options.get("time_limit", hard),
            soft_time_limit=options.get("soft_time_limit", soft),
            group=headers.get("group"),
            group_index=headers.get("group_index"),
            root_id=headers.get("root_id"),
            parent_id=headers.get("parent_id"),
            shadow=headers.get("shadow"),
            origin=headers.get("origin"),
            ignore_result=headers.get("ignore_result"),
            reply_to=request.reply_to or "",
            correlation_id=request.correlation_id,
            priority=options.get("priority", request.priority) or 0,
            replaced_task_nesting=headers.get("replaced_task_nesting") or 0,
            stamped_headers=headers.get("stamped_headers"),
            stamps=headers.get("stamps"),
            callbacks=context.callbacks,
            errbacks=context.errbacks,
            chain=context.chain,
            chord=context.chord,
            headers={**_own_headers(headers), **(options.get("headers") or {})} or None,
        )
        message = self._retry_message(call, request, options)
        if expires is None and headers.get("expires"):
            message.properties.headers["expires"] = headers["expires"]
        return message

    def _retry_message(self, call: TaskCall, request: Request, options: Options) -> Message:
        serializer = options.get("serializer") or request.content_type or self._serializer
        compression = options.get("compression") or request.headers.get("compression")
        body, properties = self._encode(call, serializer, compression)
        elsewhere = {key: options[key] for key in ("queue", "exchange", "routing_key") if options.get(key)}
        if elsewhere:
            route = self._router.route(call.task, call.args, call.kwargs, elsewhere)
            message = Message(body, properties, route.exchange, route.routing_key, route.declare)
        elif request.exchange:
            message = Message(body, properties, request.exchange, request.routing_key)
        else:
            message = Message(body, properties, "", request.queue or request.routing_key)
        assert call.eta is not None
        return self._delays.delayed(message, call.eta.timestamp() - time.time())

    def check_options(self, name: str, options: Options, task: CalledTask | None) -> None:
        """Raises: TypeError for an option that no call of the task has."""
        check_names(f"task {name}: apply_async()", options, task)


def _naming(call: TaskCall, serializer: str) -> EncodeError | None:
    """An error that names the argument which cannot be encoded, if it is one."""
    by_name = {f"argument {position}": value for position, value in enumerate(call.args, 1)}
    for argument, value in {**by_name, **{f"argument {name!r}": value for name, value in call.kwargs.items()}}.items():
        try:
            dumps(value, serializer)
        except EncodeError as error:
            text = described(value) if is_private(serializer) else option_types.shown(value)
            return EncodeError(
                f"task {call.task}: {argument} is {text}, and {error}; pass plain data, or choose another serializer"
            )
    return None


def tell_composed(message: Message, *, follow_up: bool = False) -> None:
    """Send before_task_publish; a receiver may change arguments, headers and properties. Callers ask first whether it has any.

    Raises: EncodeError for an argument that a receiver has put in.
    """
    body = body_of(message)
    signals.before_task_publish.send(
        sender=message.properties.headers["task"],
        body=body,
        exchange=message.exchange,
        routing_key=message.routing_key,
        headers=message.properties.headers,
        properties=PropertyMapping(message.properties),
        declare=[_with_exchange(entity) for entity in message.declare if isinstance(entity, Queue)],
        retry_policy=None,
        follow_up=follow_up,
        size=len(message.body),
    )
    _write_body(message, body)


# Bytes that a body of our own may have, which is read again for receivers of signals.
_ANY_SIZE = 1 << 40


def body_of(message: Message) -> tuple[object, object, JsonObject]:
    """The (args, kwargs, embed) of a call's message, as receivers of signals expect them."""
    properties = message.properties
    mime_type, encoding, headers = properties.content_type, properties.content_encoding, properties.headers
    return decode_body(message.body, mime_type, encoding, headers, frozenset({mime_type or JSON}), _ANY_SIZE)


def _write_body(message: Message, body: TaskBody) -> None:
    properties = message.properties
    encoded = dumps(body, properties.content_type or JSON, properties.headers).body
    compression = properties.headers.get("compression")
    message.body = compress(encoded, compression)[0] if compression else encoded


def _with_exchange(queue: Queue) -> Queue:
    """The queue with an exchange, as receivers of before_task_publish expect it: the default exchange if it has none."""
    return queue if queue.exchange is not None else replace(queue, exchange=Exchange("", type="direct"))


def _own_headers(headers: Headers) -> HeaderDict:
    """Those that a retry keeps. Its run has had what its tickets were for."""
    return {key: value for key, value in headers.items() if key not in PROTOCOL_HEADERS and key != TICKETS}


def _expiry(expires: object, zone: Callable[[], tzinfo]) -> datetime | None:
    """The moment of `expires`: seconds from now, a timedelta, a datetime or ISO-8601 text."""
    if expires is None:
        return None
    if isinstance(expires, timedelta):
        expires = expires.total_seconds()
    if isinstance(expires, (int, float)) and not isinstance(expires, bool):
        return datetime.now(timezone.utc) + timedelta(seconds=expires)
    moment = eta_of(expires, None, zone)
    if moment is None:
        raise ConfigurationError(f"expires is {expires!r}: seconds or a datetime is wanted")
    return moment


def eta_of(eta: object, countdown: float | None, zone: Callable[[], tzinfo] = lambda: timezone.utc) -> datetime | None:
    """The aware datetime of an `eta` or `countdown`; a naive one is in the application's time zone, `zone()`, as in Celery.

    Raises: TypeError, ValueError for what is no time."""
    if countdown is not None:
        return datetime.now(timezone.utc) + timedelta(seconds=countdown)
    if eta is None:
        return None
    moment = datetime.fromisoformat(eta.replace("Z", "+00:00")) if isinstance(eta, str) else eta
    if not isinstance(moment, datetime):
        raise TypeError(f"a datetime or an ISO 8601 text is wanted, not {eta!r} (seconds from now: countdown={eta!r})")
    return moment.replace(tzinfo=zone()) if moment.tzinfo is None else moment


def deadline_of(limit: object, eta: datetime | None, zone: Callable[[], tzinfo]) -> datetime:
    """The moment of a deadline: seconds from now (from the `eta`, where there is one), a datetime or ISO 8601 text."""
    if isinstance(limit, timedelta):
        limit = limit.total_seconds()
    if isinstance(limit, (int, float)):
        now = datetime.now(timezone.utc)
        return (now if eta is None else max(now, eta)) + timedelta(seconds=limit)
    moment = eta_of(limit, None, zone)
    assert moment is not None
    return moment


_NAMES = tuple(field.name for field in fields(Properties) if field.name != "headers")


class PropertyMapping(MutableMapping[str, Any]):
    """Reads and writes the properties of one message; `headers` are not among them."""

    __slots__ = ("_properties",)

    def __init__(self, properties: Properties) -> None:
        self._properties = properties

    def __getitem__(self, name: str) -> Any:
        value = getattr(self._properties, name) if name in _NAMES else None
        if value is None:
            raise KeyError(name)
        return value

    def __setitem__(self, name: str, value: object) -> None:
        if name not in _NAMES:
            raise KeyError(f"{name!r} is no property of a message; there are: {', '.join(_NAMES)}")
        setattr(self._properties, name, value)

    def __delitem__(self, name: str) -> None:
        self[name]
        setattr(self._properties, name, None)

    def __iter__(self) -> Iterator[str]:
        return (name for name in _NAMES if getattr(self._properties, name) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))
