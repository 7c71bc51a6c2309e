"""The first argument of custom commands: Celery's names for the parts of a worker that they may use.

    state.app, state.hostname
    state.consumer.controller         the worker (amqtask.worker.worker.Worker)
    state.consumer.pool               its pool
    state.consumer.qos                value, increment_eventually(n), decrement_eventually(n)
    state.consumer.add_task_queue(…), cancel_task_queue(name)

Commands run on the worker's I/O loop: they must not wait for anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amqtask.services.command_context import Control


class Qos:
    """The prefetch windows; a change applies to the window of each queue, and adaptive windows keep adapting around it."""

    def __init__(self, control: Control) -> None:
        self._windows = control.worker.windows

    @property
    def value(self) -> int:
        """How many deliveries the worker may hold, all queues together."""
        return sum(window.current for window in self._windows.by_queue.values())

    def increment_eventually(self, n: int = 1) -> int:
        """Hold `n` more of each queue; the new `value`."""
        self._windows.shift(n)
        return self.value

    def decrement_eventually(self, n: int = 1) -> int:
        """Hold `n` fewer of each queue, but at least one."""
        return self.increment_eventually(-n)


class ConsumerView:
    """`state.consumer`."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self.app = control.app
        self.hostname = control.worker.setup.hostname
        self.controller = control.worker
        self.qos = Qos(control)

    @property
    def pool(self) -> Any:
        """The worker's pool."""
        return self.controller.pool

    def add_task_queue(
        self,
        queue: str,
        exchange: str | None = None,
        exchange_type: str | None = None,
        routing_key: str | None = None,
        **options: object,
    ) -> None:
        """Consume one more queue; for the options see amqtask.services.asked_queue."""
        queue_options = {
            "queue": queue,
            "exchange": exchange,
            "exchange_type": exchange_type,
            "routing_key": routing_key,
        }
        self._control.operations.consume(*self._control.make_queue({**queue_options, **options}))

    def cancel_task_queue(self, queue: str) -> None:
        """Stop consuming a queue."""
        self._control.operations.cancel(queue)


class PanelState:
    """`state`."""

    def __init__(self, control: Control) -> None:
        self.app = control.app
        self.hostname = control.worker.setup.hostname
        self.consumer = ConsumerView(control)

    @staticmethod
    def tset(values: Iterable[object]) -> set[object]:
        """A copy that does not change while a command iterates over it (Celery's commands use this name)."""
        return set(values)
