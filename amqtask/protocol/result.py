"""Result messages: Celery's result meta, written and read; exceptions as data and back (celery/backends/base.py)."""

from __future__ import annotations

import fnmatch
import re
import sys
from asyncio import CancelledError
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import lru_cache
from inspect import getattr_static
from typing import TYPE_CHECKING, Any
from uuid import UUID

from amqtask import states
from amqtask.exceptions import EncodeError, Undecodable
from amqtask.ground.printable import described
from amqtask.protocol.serialization import Encoded, dumps, loads
from amqtask.protocol.task import saferepr

if TYPE_CHECKING:
    from amqtask.ground.shapes import Arguments, JsonFields, JsonObject, StampDict

_FIELDS = ("status", "result", "traceback", "children", "date_done", "task_id", "group_id", "parent_id")
# The types that these fields may have in a result.
_EXPECTED_TYPES: dict[str, tuple[type, ...]] = {
    "task_id": (str,),
    "status": (str, type(None)),
    "children": (list, tuple, type(None)),
    "traceback": (str, type(None)),
    "date_done": (str, datetime, type(None)),
}


@dataclass(slots=True)
class ResultMessage:
    """A task's state and result. For FAILURE and RETRY `result` is the exception as data (`exception_as_dict`).

    `children` are `AsyncResult.as_tuple()` values; `date_done` is ISO-8601 UTC or None; `extra` holds the fields of
    `result_extended` (name, args, kwargs, worker, retries, queue).
    """

    task_id: str
    status: str = states.PENDING
    result: Any = None
    traceback: str | None = None
    children: list[Any] = field(default_factory=list)
    date_done: str | None = None
    group_id: str | None = None
    parent_id: str | None = None
    extra: JsonObject = field(default_factory=dict)

    @property
    def is_ready(self) -> bool:
        """Whether the state is final."""
        return self.status in states.READY_STATES

    @property
    def child_tuples(self) -> Sequence[Any]:
        """The children, if they are a list: who writes to a store may write what he likes."""
        return self.children if isinstance(self.children, (list, tuple)) else ()

    def as_meta(self) -> JsonObject:
        """The mapping that goes on the wire and into key/value stores."""
        meta: JsonObject = {
            "status": self.status,
            "result": self.result,
            "traceback": self.traceback,
            "children": self.children,
            "date_done": self.date_done,
        }
        if self.group_id:
            meta["group_id"] = self.group_id
        if self.parent_id:
            meta["parent_id"] = self.parent_id
        meta.update(self.extra)
        meta["task_id"] = self.task_id  # last, as Celery writes it
        return meta

    @classmethod
    def from_meta(cls, meta: JsonFields) -> ResultMessage:
        """The result of a mapping as `as_meta` writes it (Celery's has the same fields). Raises: Undecodable."""
        task_id, status, children = meta["task_id"], meta.get("status", states.PENDING), meta.get("children") or ()
        if not isinstance(task_id, (str, int, UUID)):
            raise Undecodable(f"the task_id of the result is {described(task_id)}, not a text")
        if not isinstance(status, str) or not isinstance(children, (list, tuple)):
            raise Undecodable("the status of the result is not text, or its children are not a list")
        return cls(
            task_id=str(task_id),
            status=status,
            result=meta.get("result"),
            traceback=meta.get("traceback"),
            children=list(children),
            date_done=meta.get("date_done"),
            group_id=meta.get("group_id"),
            parent_id=meta.get("parent_id"),
            extra={name: value for name, value in meta.items() if name not in _FIELDS},
        )


# Names that a stamp may not have in a result: the result's own fields, and the fields by which readers recognise other messages
# (a control command, a task of protocol v1, an event), so that a result is never mistaken for one of them.
_TAKEN = frozenset(
    {
        *_FIELDS, "name", "args", "kwargs", "worker", "retries", "queue",
        "method", "arguments", "destination", "pattern", "matcher", "ticket", "reply_to",
        "task", "id", "type", "hostname", "uuid", "exc_type", "stamped_headers", "stamps",
    }
)  # fmt: skip


def stamps_in_result(names: object, stamps: object) -> StampDict:
    """A task's stamps as fields of its result, where Celery's readers look for them, without names that are taken."""
    if not isinstance(names, (list, tuple)) or not isinstance(stamps, Mapping):
        return {}
    kept = [name for name in names if isinstance(name, str) and name not in _TAKEN]
    return {"stamped_headers": kept, **{name: stamps.get(name) for name in kept}} if kept else {}


# Celery and amqtask name the reply queue of a process by a UUID; the other patterns are of names that a broker makes.
_REPLY_QUEUE = re.compile(
    r"[0-9a-f]{8}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{12}|amq\.gen-[\w-]+|amq\.rabbitmq\.reply-to\.[\w+/=.-]+",
    re.IGNORECASE,
)


def is_reply_queue(name: object, globs: Iterable[str] = ()) -> bool:
    """Whether results may be sent to a queue of that name, which only the message says; `globs` allow more names."""
    # A follow-up's reply_to comes from JSON and may be of any type.
    return isinstance(name, str) and (
        _REPLY_QUEUE.fullmatch(name) is not None or any(fnmatch.fnmatchcase(name, glob) for glob in globs)
    )


def parts_of(encoded: Any) -> tuple[str, Any, Sequence[Any] | None]:
    """Id, parent and members (of a group) of a result as `as_tuple` describes it, or JSON. Raises: ValueError."""
    try:
        told, members = encoded
        task_id, parent = (told, None) if isinstance(told, str) else told
    except (TypeError, ValueError):
        task_id = members = None
    if not isinstance(task_id, (str, UUID)) or not isinstance(members, (list, tuple, type(None))):
        raise ValueError(f"this is no result as as_tuple() describes it: {saferepr(encoded, 200)}")
    return str(task_id), parent, members


def time_of(done: object) -> datetime | None:
    """A `date_done` as a time, which some serializers have a type for; None for what is none."""
    if isinstance(done, str):
        try:
            return datetime.fromisoformat(done)
        except ValueError:
            return None
    return done if isinstance(done, datetime) else None


def now_iso() -> str:
    """The present time in the format of `date_done`."""
    return datetime.now(timezone.utc).isoformat()


def encode_result(result: ResultMessage, serializer: str = "json") -> Encoded:
    """The body of a result message. Raises: EncodeError naming the task's value."""
    try:
        return dumps(result.as_meta(), serializer)
    except EncodeError as error:
        reason = error.__cause__ or error
        raise EncodeError(
            f"the result of task {result.task_id}, {described(result.result)}, cannot be written as {serializer} ({reason}); "
            "return plain data, or choose another result_serializer"
        ) from error


def decode_result(
    body: bytes, content_type: str | None, content_encoding: str | None, accept: frozenset[str]
) -> ResultMessage:
    """Read a result message. Raises: ContentDisallowed, Undecodable."""
    meta = loads(body, content_type, content_encoding, accept)
    if not isinstance(meta, Mapping) or "task_id" not in meta:
        raise Undecodable(f"the body is {described(meta)}, not a result message")
    for name, expected_type in _EXPECTED_TYPES.items():
        if not isinstance(meta.get(name), expected_type):
            raise Undecodable(f"the body is not a result message: its {name} is {described(meta.get(name))}")
    return ResultMessage.from_meta(meta)


# -- exceptions


# What ends a process, a generator, a coroutine: a task's must not end who asks for its result, nor a hook's the slot.
ENDS = (SystemExit, KeyboardInterrupt, GeneratorExit, CancelledError)
# Ends a greenlet, of gevent or eventlet; imported only by who has them.
_GREENLETS_END = "GreenletExit"


class RemoteTraceback(Exception):
    """The cause of an exception that came from a worker; its text is the worker's traceback."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"\n\n{self.text}"


_LONGEST_NAME = 200
OURS = "amqtask.exceptions"
# Exceptions that celery.exceptions has under the same names.
TWINS = frozenset(
    {
        "Ignore", "InvalidTaskError", "MaxRetriesExceededError", "NotRegistered", "OperationalError", "QueueNotFound",
        "Reject", "Retry", "SecurityError", "SoftTimeLimitExceeded", "TaskPredicate", "TaskRevokedError", "Terminated",
        "TimeLimitExceeded", "TimeoutError", "WorkerLostError",
    }
)  # fmt: skip


class RemoteError(Exception):
    """An exception whose class is not known in this process; subclasses carry the original's name."""


def exception_as_dict(error: BaseException, serializer: str = "json") -> JsonObject:
    """Type, module and arguments; an argument that the serializer can't write is replaced by its repr."""
    exception_type = type(error)
    return {
        "exc_type": exception_type.__qualname__,
        "exc_message": [_writable(argument, serializer) for argument in _arguments(error)],
        "exc_module": _module_of(exception_type),
    }


def _module_of(exception_type: type[BaseException]) -> str:
    """The module of the class. Our exceptions with a twin in Celery are sent as the twin, which a Celery client knows."""
    is_twin = exception_type.__module__ == OURS and exception_type.__qualname__ in TWINS
    return "celery.exceptions" if is_twin else exception_type.__module__


def _arguments(error: BaseException) -> tuple[object, ...]:
    """The exception's arguments; its text where it has none (pydantic's ValidationError)."""
    if error.args:
        return error.args
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - a user's __str__
        return ()
    return (text,) if text else ()


def _writable(value: object, serializer: str) -> object:
    if isinstance(value, str):
        # Lone surrogates, which os.fsdecode makes, cannot be encoded as UTF-8.
        return value.encode("utf-8", "backslashreplace").decode()
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    try:
        dumps(value, serializer)
        return value
    except EncodeError:
        return saferepr(value)


def exception_from_dict(exception_dict: object, traceback: str | None = None) -> BaseException:
    """The exception that `exception_as_dict` (ours or Celery's) described, with the traceback as its cause.

    Only classes that this process has imported already are used (nothing is imported because a message says so), and
    only exceptions; for others a class of the same name is made, derived from RemoteError.
    """
    if isinstance(exception_dict, BaseException):  # a pickled result
        error = exception_dict
    elif isinstance(exception_dict, Mapping) and "exc_type" in exception_dict:
        error = _rebuild(exception_dict)
    else:
        error = RemoteError(exception_dict)
    if traceback:
        error.__cause__ = RemoteTraceback(traceback)
    return error


def _rebuild(exception_dict: JsonFields) -> BaseException:
    name, module = str(exception_dict["exc_type"]), exception_dict.get("exc_module")
    message = exception_dict.get("exc_message")
    arguments = tuple(message) if isinstance(message, (list, tuple)) else (message,)
    exception_type = _find(name, module)
    rebuilt = _construct(exception_type, arguments) if exception_type is not None else None
    class_name = name.rpartition(".")[2].encode("ascii", "replace").decode().replace("\0", "?")[:_LONGEST_NAME]
    return rebuilt or _stand_in(class_name or "RemoteError", str(module or __name__)[:_LONGEST_NAME])(*arguments)


def _construct(exception_type: type[BaseException], arguments: Arguments) -> BaseException | None:
    try:
        return exception_type(*arguments)
    except Exception:  # noqa: BLE001 - a constructor with other parameters; keep the type if it can be shown
        pass
    try:
        error: BaseException = exception_type.__new__(exception_type)
        error.args = arguments
        str(error)
        return error
    except Exception:  # noqa: BLE001 - its __str__ needs what only __init__ sets
        return None


# One class per name, so that two such errors are of one type.
@lru_cache(maxsize=256)
def _stand_in(name: str, module: str) -> type[RemoteError]:
    return type(name, (RemoteError,), {"__module__": module})


def _find(qualified: str, module: object) -> type[BaseException] | None:
    # A module's own __getattr__ would import what the message says.
    # Celery's own exceptions have twins here under the same names.
    is_celerys = str(module).startswith(("celery.", "billiard."))
    for module_name in (OURS if is_celerys else None, module, "builtins"):
        value: Any = sys.modules.get(str(module_name)) if module_name else None
        for part in qualified.split("."):
            value = getattr_static(value, part, None)
        if isinstance(value, type) and issubclass(value, BaseException) and not _is_end(value):
            return value
    return None


def _is_end(exception_type: type[BaseException]) -> bool:
    return issubclass(exception_type, ENDS) or any(base.__name__ == _GREENLETS_END for base in exception_type.__mro__)
