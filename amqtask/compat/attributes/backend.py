"""`app.backend`, `task.backend`, `result.backend`: what Celery's result stores have besides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from amqtask.compat.stores import Asked, Meta, message_of, meta_of
from amqtask.execution.context import current_context
from amqtask.ground.current import current_app
from amqtask.ground.printable import mask_urls

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.protocol.message import Message
    from amqtask.protocol.result import ResultMessage


class OfStore(Asked):
    """Bound to a store of the current application."""

    if TYPE_CHECKING:

        def find(self, task_id: str) -> ResultMessage | None: ...

        def store(self, result: ResultMessage) -> None: ...

        def message_for(
            self, result: ResultMessage, reply_to: str | None, correlation_id: str | None
        ) -> Message | None: ...

    @property
    def app(self) -> AmqTask:  # type: ignore[override]
        """The current application."""
        app: AmqTask = current_app()
        return app

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
