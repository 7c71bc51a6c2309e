"""How the parts of a stored result are written and read: the same for all stores that keep bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from amqtask import states
from amqtask.backends.contract import BackendOptions
from amqtask.exceptions import EncodeError, MessageError
from amqtask.ground.printable import described
from amqtask.protocol.result import ResultMessage, decode_result, encode_result, exception_as_dict
from amqtask.protocol.serialization import content_type, content_types, dumps, loads

if TYPE_CHECKING:
    from amqtask.ground.shapes import Options


class Codec:
    """Writes with `result_serializer`; reads that and what `result_accept_content` names."""

    def __init__(self, options: BackendOptions) -> None:
        self.serializer = options.serializer
        mime_type = content_type(options.serializer)
        # Whether what is written is text.
        self.is_text = mime_type.endswith(("json", "yaml"))
        self._format = (mime_type, "utf-8" if self.is_text else "binary")
        self._accept = content_types(options.accept) | {mime_type}

    def result(self, result: ResultMessage) -> bytes:
        """Write a whole result. Raises: EncodeError."""
        return encode_result(result, self.serializer).body

    def read_result(self, task_id: str, value: bytes) -> ResultMessage:
        """The result that was written; one that cannot be read has failed with the reason, so that its reader gets it."""
        try:
            return decode_result(value, *self._format, self._accept)
        except MessageError as error:
            return unreadable(task_id, error)

    def value(self, value: object, label: str) -> bytes:
        """Write a part of a result; `label` names it in the error. Raises: EncodeError."""
        try:
            return dumps(value, self.serializer).body
        except EncodeError as error:
            reason = error.__cause__ or error
            raise EncodeError(
                f"{label}, {described(value)}, cannot be written as {self.serializer} ({reason}); return plain data, "
                "or choose another result_serializer"
            ) from error

    def read(self, value: bytes | str) -> Any:
        """Read what `value` wrote. Raises: ContentDisallowed, Undecodable."""
        return loads(value.encode() if isinstance(value, str) else value, *self._format, self._accept)


def unreadable(task_id: str, error: Exception) -> ResultMessage:
    """The failure that stands for a stored value that is no result, or must not be read."""
    return ResultMessage(task_id, states.FAILURE, exception_as_dict(error))


def key_prefix(transport_options: Options) -> str:
    """`global_keyprefix` as it stands before Celery's keys (celery/backends/base.py)."""
    prefix = str(transport_options.get("global_keyprefix") or "")
    return f"{prefix}_" if prefix and prefix[-1] not in ":_-." else prefix
