"""What we use of pika's channels and of the methods that they hand out; pika has no types of its own. For type checkers only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from amqtask.ground.shapes import FieldTable
    from amqtask.protocol.message import PropertiesLike

Callback = Callable[..., object]


class PikaMethod(Protocol):
    """The fields of AMQP's methods that are read here; each method has some of them."""

    delivery_tag: int
    multiple: bool
    redelivered: bool
    exchange: str
    routing_key: str
    consumer_tag: str
    message_count: int
    consumer_count: int
    reason: str


class PikaFrame(Protocol):
    """A frame that a callback gets."""

    method: PikaMethod


class PikaChannel(Protocol):
    """A channel that calls back, on a loop."""

    is_open: bool
    is_closed: bool

    def close(self) -> object: ...

    def flow(self, active: bool, callback: Callback | None = None) -> object: ...

    def add_on_close_callback(self, callback: Callback) -> object: ...

    def add_on_cancel_callback(self, callback: Callback) -> object: ...

    def add_on_return_callback(self, callback: Callback) -> object: ...

    def add_callback(self, callback: Callback, replies: Sequence[type], one_shot: bool = True) -> object: ...

    def confirm_delivery(self, ack_nack_callback: Callback, callback: Callback | None = None) -> object: ...

    def basic_publish(
        self,
        exchange: str,
        routing_key: str,
        body: bytes,
        properties: PropertiesLike | None = None,
        mandatory: bool = False,
    ) -> object: ...

    def basic_qos(self, *, prefetch_count: int = 0) -> object: ...

    def basic_consume(
        self,
        queue: str,
        on_message_callback: Callback,
        auto_ack: bool = False,
        exclusive: bool = False,
        consumer_tag: str | None = None,
        arguments: FieldTable | None = None,
        callback: Callback | None = None,
    ) -> str: ...

    def basic_cancel(self, consumer_tag: str = "", callback: Callback | None = None) -> object: ...

    def basic_get(self, queue: str, callback: Callback, auto_ack: bool = False) -> object: ...

    def basic_ack(self, delivery_tag: int = 0, multiple: bool = False) -> object: ...

    def basic_nack(self, delivery_tag: int = 0, multiple: bool = False, requeue: bool = True) -> object: ...

    def basic_reject(self, delivery_tag: int = 0, requeue: bool = True) -> object: ...

    def queue_declare(
        self,
        queue: str,
        passive: bool = False,
        durable: bool = False,
        exclusive: bool = False,
        auto_delete: bool = False,
        arguments: FieldTable | None = None,
        callback: Callback | None = None,
    ) -> object: ...

    def queue_delete(self, queue: str, *, callback: Callback | None = None) -> object: ...

    def queue_bind(
        self,
        queue: str,
        exchange: str,
        routing_key: str | None = None,
        arguments: FieldTable | None = None,
        callback: Callback | None = None,
    ) -> object: ...

    def exchange_declare(
        self,
        exchange: str,
        exchange_type: str = "direct",
        passive: bool = False,
        durable: bool = False,
        auto_delete: bool = False,
        internal: bool = False,
        arguments: FieldTable | None = None,
        callback: Callback | None = None,
    ) -> object: ...

    def exchange_bind(
        self,
        destination: str,
        source: str,
        routing_key: str = "",
        arguments: FieldTable | None = None,
        callback: Callback | None = None,
    ) -> object: ...
