"""`task`: a request of one's own on top, as tests and locks make them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from amqtask.execution.context import Context, current
from amqtask.task import Task

if TYPE_CHECKING:
    from amqtask.calls.application import Application

_BELOW = "request_below"


def push(task: Task[..., Any], context: Context) -> None:
    """Make a context `task.request` in this thread or coroutine."""
    context.__dict__[_BELOW] = current.get()
    context.__dict__.setdefault("task", task.name)
    current.set(context)


def pop() -> Context | None:
    """Undo `push`; returns the request that ended."""
    context = current.get()
    if context is not None:
        current.set(context.__dict__.get(_BELOW))
    return context


class RequestStack:
    """`task.request_stack`."""

    def __init__(self, task: Task[..., Any]) -> None:
        self._task = task

    @property
    def top(self) -> Context | None:
        """The request that runs."""
        context = current.get()
        return context if context is not None and context.task == self._task.name else None

    @property
    def stack(self) -> list[Context]:
        """All requests of the task, the last one on top."""
        contexts: list[Context] = []
        context = current.get()
        while context is not None:
            if context.task == self._task.name:
                contexts.insert(0, context)
            context = context.__dict__.get(_BELOW)
        return contexts

    def push(self, context: Any) -> None:
        """Push a request."""
        push(self._task, context)

    def pop(self) -> Context | None:
        """Pop the last request."""
        return pop()

    def __len__(self) -> int:
        return len(self.stack)


class OfTask(Task[..., Any]):
    """Bound to a task."""

    def _get_app(self) -> Application:
        return self.app

    def _get_request(self) -> Context:
        return self.request

    def push_request(self, *args: object, **kwargs: object) -> None:
        """Have `task.request` be one with these fields."""
        push(self, Context(**dict(*args, **kwargs)))

    def pop_request(self) -> Context | None:
        """End what `push_request` began."""
        return pop()

    @property
    def request_stack(self) -> RequestStack:
        """The requests that run, here the task's own."""
        return RequestStack(self)

    def start_strategy(self, app: object, consumer: object, **kwargs: object) -> Any:
        """Do nothing: our workers need no strategy per task."""
        return None

    def on_bound(self, app: object) -> None:
        """Do nothing: for `super().on_bound(app)`."""

    def on_replace(self, sig: Any) -> Any:
        """Replace the task, for `super().on_replace(sig)`."""
        return self.replace(sig)

    def signature_from_request(
        self, request: Any = None, args: Any = None, kwargs: Any = None, queue: str | None = None, **extra: object
    ) -> Any:
        """A signature that calls the task as `request` does, with one retry more."""
        context = self.request if request is None else request
        options = {
            "task_id": context.id,
            "retries": (context.retries or 0) + 1,
            "group_id": context.group,
            **({"queue": queue} if queue else {}),
            **extra,
        }
        return self.signature(
            context.args if args is None else args,
            context.kwargs if kwargs is None else kwargs,
            **{name: value for name, value in options.items() if value is not None},
        )

    subtask_from_request = signature_from_request
