"""What a value may be: kinds for settings and for the options of tasks and calls, so that one place says what each takes.

A kind turns what programs write (numbers as text from the environment, timedeltas, one item for a list) into what is used, and
refuses the rest, before anything is sent or run. None means "not given" everywhere and is not converted: it leaves an option to
the task, and then to the settings. Options that are not here are not looked at: they belong to the application or to a library,
which read them from the task, or to a workflow, which has made them itself.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Set
from datetime import datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

from amqtask.exceptions import WrongValue
from amqtask.ground.plugins import near_names
from amqtask.ground.printable import printable
from amqtask.protocol.entities import Exchange, Queue, as_exchange, as_queue
from amqtask.protocol.flow_options import Batch, as_breaker, as_fair, as_limits, as_unique

if TYPE_CHECKING:
    from amqtask.ground.shapes import Arguments, Options, SignatureFields


# Seconds, more than a hundred years: no longer time is meant by anybody, or fits into a datetime.
LONGEST = 4e9
# The broker counts its times to live in milliseconds with 32 bits.
LONGEST_IN_BROKER = (2**32 - 1) / 1000
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_RATE = r"(?i)\s*\d+(\.\d*)?\s*(/\s*[smh])?\s*"
_SHOWN = 100


_REFUSALS = (ValueError, TypeError, ArithmeticError, AttributeError)


class Kind(NamedTuple):
    """`convert` returns the value that is used. It raises ValueError or TypeError for what is not what `wants` says."""

    wants: str
    convert: Callable[[Any], Any]


def convert(subject: str, kind: Kind, value: object) -> Any:
    """The value as it is used; `subject` says whose it is. Raises: WrongValue, which says what is wanted."""
    try:
        return kind.convert(value)
    except _REFUSALS as error:
        raise _refusal(subject, kind, value, error) from None


def _refusal(subject: str, kind: Kind, value: object, error: Exception) -> WrongValue:
    if isinstance(error, _OfOption):
        return WrongValue(f"{subject}: {error}")
    reason = f" ({error})" if isinstance(error, _Because) else ""
    return WrongValue(f"{subject} wants {kind.wants}, not {shown(value)}{reason}")


def shown(value: object) -> str:
    """A value as errors show it: its repr, shortened."""
    try:
        text = repr(value)
    except Exception as error:  # noqa: BLE001 - a user's __repr__
        text = f"<{type(value).__name__}: repr() raised {type(error).__name__}>"
    return printable(text, _SHOWN)


class _Because(ValueError):
    """A value that is refused for a reason of its own, which the error adds to the kind's words."""


class _OfOption(ValueError):
    """One value of a dictionary that is refused. The others are not shown: they may be secrets."""


# -- numbers and times


def _number(value: Any) -> float:
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, (bool, bytes)):
        raise TypeError
    if isinstance(value, (int, float)):
        return value
    return float(value)


def number(wants: str, low: float, high: float, *, integer_only: bool = False) -> Kind:
    """A finite number in a range."""

    def convert(value: object) -> object:
        amount = _number(value)
        if not low <= amount <= high or not math.isfinite(amount):
            raise ValueError
        if amount == int(amount) and (integer_only or not isinstance(value, float)):
            return int(amount)
        if integer_only:
            raise ValueError
        return float(amount)

    return Kind(wants, convert)


def _seconds(wants: str, low: float = 0.0, high: float = LONGEST) -> Kind:
    kind = number(wants, low, high)
    return Kind(wants, lambda value: float(kind.convert(value)))


SECONDS = _seconds("a number of seconds from 0 on, or a timedelta")
PAUSE = _seconds("a number of seconds above 0, or a timedelta", low=0.001)
BROKER_SECONDS = _seconds("a number of seconds from 0.001 to 4,294,967 (49 days)", 0.001, LONGEST_IN_BROKER)
# Of calls: what a program has worked out may lie in the past.
FROM_NOW = _seconds("a number of seconds from now, or a timedelta", low=-LONGEST)
COUNT = number("a whole number from 0 on", 0, 2**53, integer_only=True)
POSITIVE = number("a whole number from 1 on", 1, 2**53, integer_only=True)
FACTOR = number("a number from 0 on", 0, LONGEST)
PRIORITY = number("a whole number from 0 to 255", 0, 255, integer_only=True)
PORT = number("a port number from 1 to 65535", 1, 65535, integer_only=True)
HEARTBEAT = number("a whole number of seconds from 0 (off) to 65535", 0, 65535, integer_only=True)


def _attempts(value: object) -> float:
    return math.inf if value == math.inf else COUNT.convert(value)


ATTEMPTS = Kind("a whole number from 0 on, or float('inf')", _attempts)


def _moment(value: object) -> object:
    if isinstance(value, str):
        return datetime.fromisoformat(value.replace("Z", "+00:00"))
    if isinstance(value, datetime):
        return value
    if isinstance(value, (int, float)):
        raise _Because(f"for seconds from now say countdown={value!r}")
    raise TypeError


MOMENT = Kind("a datetime, or text in ISO 8601", _moment)


def _expiry(value: object) -> object:
    if isinstance(value, (int, float, timedelta)):
        return FROM_NOW.convert(value)
    return _moment(value)


def _lifetime(value: object) -> str:
    """kombu's seconds become what AMQP has, milliseconds as text (kombu/messaging.py, Producer.publish)."""
    if isinstance(value, str):
        return str(int(BROKER_SECONDS.convert(int(value) / 1000) * 1000))
    return str(int(float(BROKER_SECONDS.convert(value)) * 1000))


# The property of AMQP: the broker drops the message then. (`expires` is what workers look at.)
LIFETIME = Kind("a number of seconds, or text of milliseconds", _lifetime)
EXPIRY = Kind("seconds from now, a timedelta, a datetime, or text in ISO 8601", _expiry)


def _rate(value: object) -> object:
    if isinstance(value, str):
        if value and re.fullmatch(_RATE, value) is None:
            raise ValueError
        return value
    return FACTOR.convert(value)


RATE = Kind("a number a second, or text like '10/s', '100/m' or '5/h'", _rate)

# -- text and choices


def _text(value: object) -> str:
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError
    text = os.fspath(value)
    if not isinstance(text, str):
        raise TypeError
    return text


TEXT = Kind("text", _text)


def _name(value: object) -> str:
    if isinstance(value, uuid.UUID):
        return str(value)
    if not isinstance(value, str) or not value:
        raise TypeError
    if len(value.encode()) > 255:
        raise _Because(f"it has {len(value.encode())} bytes")
    return value


# What the broker keeps as a short string: ids, names of queues, routing keys.
NAME = Kind("text of at most 255 bytes", _name)
# A routing key may be empty.
KEY = Kind("text of at most 255 bytes", lambda value: value if value == "" else _name(value))


def _boolean(value: object) -> bool:
    if isinstance(value, str):
        if value.lower() not in _TRUE + _FALSE:
            raise ValueError
        return value.lower() in _TRUE
    if value not in (0, 1):
        raise TypeError
    return bool(value)


BOOLEAN = Kind("True or False", _boolean)


def choice(*names: str) -> Kind:
    """A kind for one of several texts."""

    def convert(value: object) -> str:
        if value not in names:
            raise ValueError
        return str(value)

    return Kind(" or ".join(map(repr, names)), convert)


_MODES = {"persistent": 2, "transient": 1, "1": 1, "2": 2}


def _delivery_mode(value: object) -> int:
    mode = _MODES.get(str(value).lower())
    if mode is None or isinstance(value, bool):
        raise ValueError
    return mode


DELIVERY_MODE = Kind("2 (persistent) or 1 (transient)", _delivery_mode)
QUEUE_TYPE = choice("quorum", "classic", "stream")


def _level(value: object) -> object:
    if isinstance(value, str) and isinstance(logging.getLevelName(value.upper()), int):
        return value
    level = COUNT.convert(value)
    name = logging.getLevelName(level)
    # A number between the named levels stays one: logging takes no "Level 15".
    return name if isinstance(logging.getLevelName(name), int) else level


def _log_format(value: object) -> str:
    text = _text(value)
    try:
        formatter = logging.Formatter(text)
    except ValueError as error:
        raise _Because(str(error)) from error
    with contextlib.suppress(ValueError):  # a field that records have where the application gives it to them
        formatter.format(logging.LogRecord("", logging.INFO, "", 0, "", (), None))
    return text


LOG_FORMAT = Kind("a format of Python's logging, such as '%(levelname)s %(message)s'", _log_format)
LEVEL = Kind("the name of a log level, such as WARNING", _level)
# -- collections


def _list(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, (bytes, Mapping)):
        raise TypeError
    return list(value)


LIST = Kind("a list", _list)


def _texts(value: object) -> list[str]:
    texts = _list(value)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError
    return texts


TEXTS = Kind("a list of texts", _texts)


def _table(value: Any) -> Any:
    table = value if isinstance(value, dict) else dict(value)
    if not all(isinstance(name, str) for name in table):
        raise _Because("its names are text")
    return table


_IN_HEADERS = (str, bytes, bytearray, bool, int, float, Decimal, datetime, type(None))


def _header(value: object, where: str) -> None:
    if isinstance(value, Mapping):
        for name, item in value.items():
            _header(item, f"{where}[{name!r}]")
    elif isinstance(value, (list, tuple)):
        for item in value:
            _header(item, where)
    elif not isinstance(value, _IN_HEADERS):
        raise _Because(
            f"{where} is {shown(value)}: headers hold text, numbers, times, lists and tables; str(…) makes text of it"
        )


def _headers(value: object) -> object:
    headers = _table(value)
    for name, item in headers.items():
        _header(item, repr(name))
    return headers


# What AMQP's headers can hold.
HEADERS = Kind("a dictionary of headers", _headers)
# Of settings: names are the application's business.
MAPPING = Kind("a dictionary", lambda value: value if isinstance(value, dict) else dict(value))
TABLE = Kind("a dictionary", _table)


def with_options(wants: str, kinds: Mapping[str, Kind]) -> Kind:
    """A dictionary; what it has under these names is of these kinds, or None."""

    def convert(value: object) -> object:
        options = MAPPING.convert(value)
        for name, kind in kinds.items():
            if options.get(name) is None:
                continue
            try:
                options = {**options, name: kind.convert(options[name])}
            except (ValueError, TypeError, ArithmeticError):
                raise _OfOption(f"{name} wants {kind.wants}, not {shown(options[name])}") from None
        return options

    return Kind(wants, convert)


def signature_of(value: object) -> SignatureFields:
    """A signature is a mapping, and so is what JSON makes of one; a task stands for `task.s()`. Raises: TypeError."""
    if isinstance(value, Mapping):
        task = value.get("task")
        # `Signature()` gets its task later.
        if not isinstance(task, str) and (task is not None or "subtask_type" not in value):
            raise TypeError(f"a signature is wanted, which has a 'task', not {value!r}")
        return value
    make = getattr(value, "s", None)
    if not callable(make):
        raise TypeError(f"a signature is wanted (task.s(…)), not {value!r}")
    sig: SignatureFields = make()
    return sig


def signatures(value: object) -> object:
    """One signature, or several."""
    if not isinstance(value, (list, tuple)):
        return signature_of(value)
    sigs = [signature_of(entry) for entry in value]
    return value if all(sig is entry for sig, entry in zip(sigs, value, strict=True)) else sigs


def _sequence(value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        raise TypeError
    return value


def _exceptions(value: Any) -> tuple[type[BaseException], ...]:
    exception_types = (value,) if isinstance(value, type) else tuple(value)
    for exception_type in exception_types:
        if not (isinstance(exception_type, type) and issubclass(exception_type, BaseException)):
            raise TypeError
    return exception_types


EXCEPTIONS = Kind("exception classes, such as (ConnectionError, TimeoutError)", _exceptions)


def either(wants: str, *kinds: Kind | type) -> Kind:
    """The first of several that takes it; an instance of a class is left as it is."""

    def convert(value: object) -> object:
        for kind in kinds:
            if isinstance(kind, type):
                if isinstance(value, kind):
                    return value
                continue
            try:
                return kind.convert(value)
            except (ValueError, TypeError, ArithmeticError):
                continue
        raise ValueError

    return Kind(wants, convert)


def instance(wants: str, *classes: type) -> Kind:
    """A value of some classes, as it is."""
    return either(wants, *classes)


def _function(value: object) -> object:
    if not callable(value):
        raise TypeError
    return value


FUNCTION = Kind("a function", _function)
ANY = Kind("anything", lambda value: value)
URLS = either("a URL, or a list of them", TEXT, TEXTS)


def arguments(task: str, args: object, kwargs: object) -> tuple[Arguments, dict[str, Any]]:
    """The arguments of a call. Raises: TypeError, which names the task, for what are none."""
    positional, keywords = args or (), kwargs or {}
    if positional.__class__ is tuple and keywords.__class__ is dict:
        return positional, {**keywords}
    if isinstance(positional, (str, bytes, Mapping, Set)) or not isinstance(positional, Iterable):
        hint = f"; keyword arguments are kwargs={shown(args)}" if isinstance(args, Mapping) else ""
        raise TypeError(f"task {task}: args is a list or a tuple of arguments, not {shown(args)}{hint}")
    if not isinstance(keywords, Mapping):
        raise TypeError(f"task {task}: kwargs is a dictionary of arguments by name, not {shown(kwargs)}")
    return tuple(positional), dict(keywords)


def checked(subject: str, kinds: Mapping[str, Kind], values: Mapping[str, object]) -> Mapping[str, Any]:
    """`values` as they are used; those without a kind are left alone. Raises: WrongValue."""
    converted: dict[str, object] | None = None
    for name, value in values.items():
        kind = kinds.get(name)
        if kind is None or value is None:
            continue
        try:
            valid = kind.convert(value)
        except _REFUSALS as error:
            raise _refusal(f"{subject}: {name}", kind, value, error) from None
        if valid is not value:
            converted = {**values} if converted is None else converted
            converted[name] = valid
    return values if converted is None else converted


# -- the options of tasks and of calls, once for decorators, classes, `apply_async` and signatures

UNIQUE = Kind("a Unique, such as Unique(by=('user_id',)), or True", as_unique)


def _because(convert: Callable[[Any], object]) -> Callable[[Any], object]:
    """A conversion whose own errors are the reason."""

    def converted(value: object) -> object:
        try:
            return convert(value)
        except WrongValue as error:
            raise _Because(str(error)) from error

    return converted


BREAKER = Kind("a Breaker, such as Breaker(failures=20, seconds=60), or True", as_breaker)
LIMITS = Kind("a Concurrency or a Rate, or a list of them", _because(as_limits))
FAIR = Kind("the name of an argument, several, a function, or a Fair", _because(as_fair))
_BACKOFF = either("True, False, or a number of seconds from 0 on", instance("", bool), SECONDS)
_QUEUE = either("the name of a queue, or a Queue", Queue, NAME, Kind("a queue of kombu's", as_queue))
_EXCHANGE = either(
    "the name of an exchange, or an Exchange", Exchange, KEY, Kind("an exchange of kombu's", as_exchange)
)
_TIMESTAMP = either("a datetime, or whole seconds since 1970", datetime, COUNT)
_LINKS = Kind("a signature, or a list of them", signatures)
_FOLLOWERS = Kind("a list of signatures", lambda value: signatures(_sequence(value)))
_CHORD = Kind("the signature of a chord's body", signature_of)
_SERIALIZER = NAME  # a name or content type; the serialization knows which there are

_SWITCHES = (
    "typing", "retry_jitter", "store_errors_even_if_ignored", "store_eager_result", "track_started", "acks_late",
    "acks_on_failure_or_timeout", "acks_on_failure", "acks_on_timeout", "reject_on_worker_lost", "send_events", "trail", "inbox",
)  # fmt: skip
_NAMES = (
    "group_id", "root_id", "parent_id", "message_id", "type", "user_id", "app_id", "content_type", "content_encoding",
    "correlation_id", "origin",
)  # fmt: skip

# Options of a task for its calls, which a call may override.
_BOTH: dict[str, Kind] = {
    "expires": EXPIRY,
    "deadline": EXPIRY,
    "priority": PRIORITY,
    "serializer": _SERIALIZER,
    "compression": NAME,
    "queue": _QUEUE,
    "exchange": _EXCHANGE,
    "routing_key": KEY,
    "delivery_mode": DELIVERY_MODE,
    "time_limit": SECONDS,
    "soft_time_limit": SECONDS,
    "ignore_result": BOOLEAN,
}
# The attributes of Task.
TASK: dict[str, Kind] = {
    **_BOTH,
    "deadline": PAUSE,
    "unique": UNIQUE,
    "limits": LIMITS,
    "fair_by": FAIR,
    "batch": instance("a Batch, such as Batch(size=100, seconds=1)", Batch),
    "breaker": BREAKER,
    "name": NAME,
    "max_retries": ATTEMPTS,
    "default_retry_delay": SECONDS,
    "autoretry_for": EXCEPTIONS,
    "dont_autoretry_for": EXCEPTIONS,
    "throws": EXCEPTIONS,
    "retry_kwargs": TABLE,
    "retry_backoff": _BACKOFF,
    "retry_backoff_max": SECONDS,
    "resultrepr_maxsize": COUNT,
    "rate_limit": RATE,
    **dict.fromkeys(_SWITCHES, BOOLEAN),
}
# Options of `apply_async` and of signatures.
CALL: dict[str, Kind] = {
    **_BOTH,
    "task_id": NAME,
    "eta": MOMENT,
    "countdown": FROM_NOW,
    "retries": COUNT,
    "shadow": TEXT,
    "reply_to": KEY,
    "headers": HEADERS,
    "link": _LINKS,
    "link_error": _LINKS,
    "timeout": SECONDS,
    "confirm_timeout": SECONDS,
    "retry": BOOLEAN,
    "retry_policy": MAPPING,
    "add_to_parent": BOOLEAN,
    "exchange_type": NAME,
    "chain": _FOLLOWERS,
    "chord": _CHORD,
    "stamped_headers": TEXTS,
    "stamps": TABLE,
    "group_index": COUNT,
    "replaced_task_nesting": COUNT,
    "mandatory": BOOLEAN,
    "immediate": BOOLEAN,
    "expiration": LIFETIME,
    "timestamp": _TIMESTAMP,
    "argsrepr": TEXT,
    "kwargsrepr": TEXT,
    **dict.fromkeys(_NAMES, KEY),
}
# All that a call may be given. These are Celery's, or its messaging library's, and have no effect.
CALL_NAMES = frozenset(CALL) | {
    "connection", "declare", "producer", "publisher", "result_cls", "route_name", "router", "task_type",
}  # fmt: skip


def of_call(task: str, options: Options) -> Options:
    """The options of a call as they are used. Raises: WrongValue, which names the task, the option and what is wanted."""
    return checked(f"task {task}", CALL, options)


def of_task(task: str, options: Options) -> Options:
    """The options of a task's definition as they are used. Raises: WrongValue."""
    return checked(f"task {task}", TASK, options)


def near_option(name: str) -> str | None:
    """The option of a task that was meant, if it is one: `max_retries` for `max_retires`."""
    return next(iter(near_names(name, (*TASK, "bind", "base", "pydantic"), alike=0.8)), None)
