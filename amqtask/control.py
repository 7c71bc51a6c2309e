"""Remote control, the client's end: tell workers and ask them, over Celery's pidbox exchanges."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from amqtask.exceptions import ConfigurationError, MessageError
from amqtask.protocol.control import Command, command_message, read_reply, reply_exchange, reply_queue
from amqtask.transport.replies import ReplyConsumer

if TYPE_CHECKING:
    from amqtask.message import Delivery
    from amqtask.transport.contract import Publisher
    from amqtask.transport.url import BrokerAddress


class Control:
    """`app.control`: Celery's names. Times are seconds; `destination` is node names, None for all."""

    def __init__(
        self, addresses: Sequence[BrokerAddress], publisher: Publisher, *, prefix: str, accept: frozenset[str]
    ) -> None:
        self._addresses = addresses
        self._publisher = publisher
        self._prefix = prefix
        self._accept = accept
        self._clock = 0
        self._lock = threading.Lock()

    # -- the two roads

    def broadcast(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        destination: Sequence[str] | None = None,
        reply: bool = False,
        timeout: float = 1.0,
        limit: int | None = None,
        pattern: str | None = None,
        matcher: str | None = None,
        **_: Any,
    ) -> list[dict[str, Any]] | None:
        """Send a command; with `reply` the answers that came within `timeout` seconds, as [{node: answer}, …]."""
        if not reply:
            self._send(command, arguments, destination, pattern=pattern, matcher=matcher)
            return None
        found = self.ask(command, arguments or {}, destination=destination, timeout=timeout, limit=limit)
        return [{node: answer} for node, answer in found.items()]

    def ask(
        self,
        command: str,
        arguments: Mapping[str, Any],
        *,
        destination: Sequence[str] | None = None,
        timeout: float = 1.0,
        limit: int | None = None,
    ) -> dict[str, Any]:
        """Send a command and collect the answers by node, until `timeout` or as many as were asked.

        Raises: PublishError, and ConfigurationError with the in-memory broker, which nobody can be asked over.
        """
        if not self._addresses:
            raise ConfigurationError(
                "workers are asked over RabbitMQ; with the broker memory:// look at the worker itself"
            )
        oid, ticket = str(uuid.uuid4()), str(uuid.uuid4())
        answers: dict[str, Any] = {}
        wanted = limit or (len(destination) if destination else None)

        def on_reply(delivery: Delivery) -> None:
            properties = delivery.properties
            try:
                answer = read_reply(
                    delivery.body,
                    properties.content_type,
                    properties.content_encoding,
                    properties.headers,
                    self._accept,
                )
            except MessageError:
                return  # a node that answers in a serializer that we do not accept
            if answer.ticket == ticket:
                answers[answer.nodename] = answer.payload

        replies = ReplyConsumer(self._addresses, reply_queue(oid, self._prefix), on_reply, name="amqtask control")
        try:
            replies.ensure(timeout=5.0)
            self._send(command, arguments, destination, ticket=ticket, reply_to=oid, expires=timeout)
            deadline = time.monotonic() + timeout
            replies.drive(lambda: wanted is not None and len(answers) >= wanted, deadline)
        finally:
            replies.close()
        return answers

    def _send(
        self,
        command: str,
        arguments: Mapping[str, Any] | None,
        destination: Sequence[str] | None,
        *,
        ticket: str | None = None,
        reply_to: str | None = None,
        expires: float | None = None,
        pattern: str | None = None,
        matcher: str | None = None,
    ) -> None:
        with self._lock:
            self._clock += 1
            clock = self._clock
        message = command_message(
            Command(
                method=command,
                arguments=dict(arguments or {}),
                destination=tuple(destination) if destination else None,
                pattern=pattern,
                matcher=matcher,
                ticket=ticket,
                reply_exchange=reply_exchange(self._prefix).name if reply_to else "",
                reply_key=reply_to or "",
                expires=time.time() + expires if expires is not None else 0.0,
            ),
            self._prefix,
            clock=clock,
        )
        message.mandatory = False  # no worker may be there, and that is an answer too
        self._publisher.publish(message)

    # -- orders

    def revoke(
        self,
        task_id: str | Sequence[str],
        destination: Sequence[str] | None = None,
        terminate: bool = False,
        signal: str = "SIGTERM",
        **kwargs: Any,
    ) -> Any:
        """Tell workers not to run a task (or several); with `terminate` to end it if it runs."""
        ids = task_id if isinstance(task_id, str) else list(task_id)
        arguments = {"task_id": ids, "terminate": terminate, "signal": signal}
        return self.broadcast("revoke", arguments, destination, **kwargs)

    def terminate(
        self, task_id: str, destination: Sequence[str] | None = None, signal: str = "SIGTERM", **kw: Any
    ) -> Any:
        """Revoke, and end it if it runs."""
        return self.revoke(task_id, destination, True, signal, **kw)

    def ping(self, destination: Sequence[str] | None = None, timeout: float = 1.0, **kwargs: Any) -> Any:
        """[{node: {"ok": "pong"}}, …]."""
        return self.broadcast("ping", {}, destination, reply=True, timeout=timeout, **kwargs)

    def shutdown(self, destination: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Warm shutdown of workers."""
        return self.broadcast("shutdown", {}, destination, **kwargs)

    def rate_limit(self, task_name: str, rate_limit: Any, destination: Sequence[str] | None = None, **kw: Any) -> Any:
        """Another rate limit for a task."""
        return self.broadcast("rate_limit", {"task_name": task_name, "rate_limit": rate_limit}, destination, **kw)

    def time_limit(
        self,
        task_name: str,
        soft: float | None = None,
        hard: float | None = None,
        destination: Sequence[str] | None = None,
        **kw: Any,
    ) -> Any:
        """Other time limits for a task."""
        return self.broadcast("time_limit", {"task_name": task_name, "soft": soft, "hard": hard}, destination, **kw)

    def add_consumer(
        self,
        queue: str,
        exchange: str | None = None,
        exchange_type: str = "direct",
        routing_key: str | None = None,
        options: Mapping[str, Any] | None = None,
        destination: Sequence[str] | None = None,
        **kw: Any,
    ) -> Any:
        """Consume a queue too."""
        arguments = {
            "queue": queue,
            "exchange": exchange,
            "exchange_type": exchange_type,
            "routing_key": routing_key,
            **(options or {}),
        }
        return self.broadcast("add_consumer", arguments, destination, **kw)

    def cancel_consumer(self, queue: str, destination: Sequence[str] | None = None, **kw: Any) -> Any:
        """Stop consuming a queue."""
        return self.broadcast("cancel_consumer", {"queue": queue}, destination, **kw)

    def autoscale(self, max: int, min: int, destination: Sequence[str] | None = None, **kw: Any) -> Any:
        """Other bounds for autoscale."""
        return self.broadcast("autoscale", {"max": max, "min": min}, destination, **kw)

    def pool_grow(self, n: int = 1, destination: Sequence[str] | None = None, **kw: Any) -> Any:
        """More slots."""
        return self.broadcast("pool_grow", {"n": n}, destination, **kw)

    def pool_shrink(self, n: int = 1, destination: Sequence[str] | None = None, **kw: Any) -> Any:
        """Fewer slots."""
        return self.broadcast("pool_shrink", {"n": n}, destination, **kw)

    def enable_events(self, destination: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Have workers send task events, as `-E` does."""
        return self.broadcast("enable_events", {}, destination, **kwargs)

    def disable_events(self, destination: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Have workers send no task events any more."""
        return self.broadcast("disable_events", {}, destination, **kwargs)

    def heartbeat(self, destination: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Have workers send a heartbeat event now."""
        return self.broadcast("heartbeat", {}, destination, **kwargs)

    def inspect(self, destination: Sequence[str] | None = None, timeout: float = 1.0, **_: Any) -> Inspect:
        """Questions: `app.control.inspect().active()`."""
        return Inspect(self, destination, timeout)

    def close(self) -> None:
        """Nothing stays open."""


class Inspect:
    """Each question returns {node: answer}, or None when nobody answered (as in Celery)."""

    def __init__(self, control: Control, destination: Sequence[str] | None, timeout: float) -> None:
        self._control = control
        self._destination = [destination] if isinstance(destination, str) else destination
        self._timeout = timeout

    def _ask(self, question: str, **arguments: Any) -> dict[str, Any] | None:
        found = self._control.ask(question, arguments, destination=self._destination, timeout=self._timeout)
        return found or None

    def ping(self) -> dict[str, Any] | None:
        """Who is there."""
        return self._ask("ping")

    def active(self, safe: Any = None) -> dict[str, Any] | None:
        """What runs."""
        return self._ask("active")

    def reserved(self, safe: Any = None) -> dict[str, Any] | None:
        """What was delivered and waits for a slot."""
        return self._ask("reserved")

    def scheduled(self, safe: Any = None) -> dict[str, Any] | None:
        """What waits in workers for its time: nothing, delays are the broker's."""
        return self._ask("scheduled")

    def revoked(self) -> dict[str, Any] | None:
        """Revoked ids."""
        return self._ask("revoked")

    def registered(self, *taskinfoitems: str) -> dict[str, Any] | None:
        """Tasks that workers know."""
        return self._ask("registered", taskinfoitems=list(taskinfoitems))

    def stats(self) -> dict[str, Any] | None:
        """Numbers about workers."""
        return self._ask("stats")

    def active_queues(self) -> dict[str, Any] | None:
        """What workers consume."""
        return self._ask("active_queues")

    def conf(self, with_defaults: bool = False) -> dict[str, Any] | None:
        """Settings, secrets masked."""
        return self._ask("conf", with_defaults=with_defaults)

    def query_task(self, *ids: str) -> dict[str, Any] | None:
        """What workers know of tasks."""
        return self._ask("query_task", ids=list(ids))

    def clock(self) -> dict[str, Any] | None:
        """Logical clocks."""
        return self._ask("clock")

    def report(self) -> dict[str, Any] | None:
        """Versions and settings."""
        return self._ask("report")
