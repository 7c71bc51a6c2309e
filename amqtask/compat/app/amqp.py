"""`celery.app.amqp`: queues and routes, as `app.amqp` shows them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from amqtask.compat.messages import as_task_v1, as_task_v2, task_message
from amqtask.protocol.entities import Exchange, Queue

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.ground.shapes import Keywords, OptionDict, Options

__all__ = ["AMQP", "Queues", "task_message"]


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
        return {**route.options, "queue": self.app.amqp.queues[route.queue.name]}  # type: ignore[attr-defined] # of attributes.app


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
        return self.app.producer_pool  # type: ignore[attr-defined] # of amqtask.compat.attributes.app

    def flush_routes(self) -> None:
        """Do nothing: routes are read again when settings change."""
