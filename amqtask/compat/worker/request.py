"""`celery.worker.request`."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from amqtask.execution import request
from amqtask.protocol.serialization import content_types, loads

if TYPE_CHECKING:
    from amqtask.ground.shapes import HeaderDict

__all__ = ["Request"]


class _OursToo(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, request.Request) if cls is Request else super().__instancecheck__(instance)


class Request(request.Request, metaclass=_OursToo):
    """A request that is made by hand of a message, as Celery's is; those of a worker are instances of it, too."""

    def __init__(
        self,
        message: Any,
        on_ack: object = None,
        hostname: str | None = None,
        eventer: object = None,
        app: Any = None,
        connection_errors: object = None,
        request_dict: object = None,
        task: object = None,
        on_reject: object = None,
        body: Any = None,
        headers: HeaderDict | None = None,
        decoded: bool = False,
        utc: bool = True,
        **opts: object,
    ) -> None:
        fields = dict(message.headers if headers is None else headers)
        content = message.body if body is None else body
        if not decoded:
            accept = content_types({"json"} if app is None else app.conf.accept_content)
            content = loads(content, message.content_type, message.content_encoding, accept, fields)
        properties = getattr(message, "properties", None) or {}
        super().__init__(
            number=0,
            id=fields["id"],
            task=fields["task"],
            headers=fields,
            decoded=tuple(content),  # args, kwargs, embed
            correlation_id=properties.get("correlation_id"),
            reply_to=properties.get("reply_to"),
        )
        self.hostname = hostname or socket.gethostname()

    @property
    def args(self) -> Any:
        """The arguments."""
        return (self.decoded or ((),))[0]

    @property
    def kwargs(self) -> Any:
        """The keyword arguments."""
        return (self.decoded or ((), {}))[1]

    @property
    def chord(self) -> Any:
        """The body of the chord that it is a part of."""
        return self._embedded("chord")

    @property
    def chain(self) -> Any:
        """What follows it."""
        return self._embedded("chain")

    @property
    def errbacks(self) -> Any:
        """What is called when it fails."""
        return self._embedded("errbacks")

    @property
    def delivery_info(self) -> dict[str, Any]:
        """Where it came from."""
        return {
            "exchange": self.exchange,
            "routing_key": self.routing_key,
            "priority": self.priority,
            "redelivered": self.redelivered,
        }

    def _embedded(self, name: str) -> object:
        return (self.decoded or ((), {}, {}))[2].get(name)
