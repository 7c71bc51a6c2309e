"""shared_task: a task for whichever app there is, for reusable packages that know none."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar, overload

from amqtask.ground.current import current_app, note_shared

if TYPE_CHECKING:
    from amqtask.ground.shapes import CoroutineOf, OptionDict
    from amqtask.task import AsyncTask, Task

P = ParamSpec("P")
R = TypeVar("R")


class SharedTask:
    """Stands for the task of the current app and passes everything on to it."""

    def __init__(self, function: Callable[..., object], options: OptionDict) -> None:
        self.__wrapped__ = function
        self.__name__ = function.__name__
        self.__doc__ = function.__doc__
        self.__module__ = function.__module__
        self._name = options.pop("name", None) or f"{function.__module__}.{function.__name__}"
        self._options = options
        note_shared(self._make)

    def _make(self, app: Any) -> object:
        if app.tasks.has(self._name):
            return app.tasks[self._name]
        return app.task(name=self._name, **self._options)(self.__wrapped__)

    @property
    def _task(self) -> Any:
        return self._make(current_app())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._task(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._task, name)

    def __repr__(self) -> str:
        return f"<@shared_task: {self._name}>"


@overload
def shared_task(function: Callable[P, CoroutineOf[R]], /) -> AsyncTask[P, R]: ...
@overload
def shared_task(function: Callable[P, R], /) -> Task[P, R]: ...
@overload
def shared_task(
    *, bind: Literal[True], **options: object
) -> Callable[[Callable[Concatenate[Any, P], R]], Task[P, R]]: ...
@overload
def shared_task(*, bind: Literal[False] = False, **options: object) -> Callable[[Callable[P, R]], Task[P, R]]: ...
def shared_task(function: object = None, /, *, bind: bool = False, **options: object) -> object:
    """`@shared_task` or `@shared_task(bind=True, …)`: options as of `app.task`."""
    if function is None:
        return lambda decorated: SharedTask(decorated, {**options, "bind": bind})
    if not inspect.isroutine(function):
        raise TypeError(f"shared_task wants a function, not {function!r}")
    return SharedTask(function, {})
