"""Results: what Celery's have besides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from amqtask import states
from amqtask.compat.stores import Meta, meta_of
from amqtask.exceptions import TimeoutError
from amqtask.ground.current import current_app
from amqtask.result import AsyncResult
from amqtask.results import ResultSet

if TYPE_CHECKING:
    from amqtask.app import AmqTask


class OfResult(AsyncResult[Any]):
    """Bound to a result."""

    TimeoutError: ClassVar[type[Exception]] = TimeoutError
    supports_native_join = False

    @property
    def app(self) -> AmqTask:
        """The current application."""
        app: AmqTask = current_app()
        return app

    def _get_task_meta(self) -> Meta:
        stored = self.latest_meta()
        return meta_of(self.id, None if stored.status == states.PENDING else stored)

    def exists(self) -> bool:
        """Whether the store knows anything of the task."""
        return self.state != states.PENDING

    def throw(self, *args: Any, **kwargs: Any) -> Any:
        """Raise the error of a task that failed."""
        return self.maybe_throw(*args, **kwargs)


class OfResults(ResultSet):
    """Bound to several."""

    TimeoutError: ClassVar[type[Exception]] = TimeoutError
    supports_native_join = False

    @property
    def app(self) -> AmqTask:
        """The current application."""
        app: AmqTask = current_app()
        return app

    def _failed_join_report(self) -> Iterator[object]:
        return (result for result in self.results if result.state in states.PROPAGATE_STATES)
