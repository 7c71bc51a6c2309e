"""The tasks of an app by name, whose error for an unknown one lists near names; how they are made of functions; and shared tasks,
for whichever app there is."""

from __future__ import annotations

import inspect
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar, overload

from amqtask.exceptions import ConfigurationError, NotRegistered, UnknownTaskOptionWarning
from amqtask.execution.task_plan import pydantic_wrapper
from amqtask.ground.current import current_app, find_current_app, note_shared
from amqtask.ground.django_project import VARIABLE, uses_django
from amqtask.ground.plugins import did_you_mean, load, load_path, others_names, plugins
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.option_types import near_option

if TYPE_CHECKING:
    from amqtask.ground.shapes import CoroutineOf, OptionDict, Options
    from amqtask.task import AsyncTask, RegisteredTask, Task


P = ParamSpec("P")
R = TypeVar("R")
Bind = TypeVar("Bind", bound=bool, covariant=True)
# What the names of the tasks begin with that every worker has (amqtask.client.workflow_messages).
BUILT_IN = ("celery.", "amqtask.")
logger = bounded_logger("amqtask.worker")


class TaskRegistry(Mapping[str, "RegisteredTask"]):
    """Read it like a dictionary; `register` adds."""

    def __init__(self, complete: Callable[[], None] = lambda: None) -> None:
        """`complete` takes in what is still to come (shared tasks, those that every worker has), when it is first looked for."""
        self._tasks: dict[str, RegisteredTask] = {}
        self._complete = complete

    def __getitem__(self, name: str) -> RegisteredTask:
        try:
            return self._tasks[name]
        except KeyError:
            self._complete()
            if name in self._tasks:
                return self._tasks[name]
            raise NotRegistered(f"no task {name!r} is registered.{did_you_mean(name, self._tasks)}") from None

    def __contains__(self, name: object) -> bool:
        if name not in self._tasks:  # without looking for near names
            self._complete()
        return name in self._tasks

    def has(self, name: str) -> bool:
        """Whether a task of that name was registered so far."""
        return name in self._tasks

    def get(self, name: str, default: object = None) -> Any:
        """The task of that name, or the default."""
        return self._tasks[name] if name in self else default

    @property
    def own(self) -> list[str]:
        """The names of the user's tasks, sorted: without those that every worker has."""
        return sorted(name for name in self if not name.startswith(BUILT_IN))

    def __iter__(self) -> Iterator[str]:
        self._complete()
        return iter(self._tasks)

    def __len__(self) -> int:
        self._complete()
        return len(self._tasks)

    def register(self, task: RegisteredTask) -> None:
        """Add a task under its name; it replaces an earlier one of that name."""
        self._tasks[task.name] = task

    def __setitem__(self, name: str, task: RegisteredTask) -> None:
        self._tasks[name] = task

    def unregister(self, name: str) -> None:
        """Take a task out. Raises: NotRegistered."""
        del self._tasks[self[name].name]


def make_task(
    function: Callable[..., Any],
    base: type[RegisteredTask],
    *,
    name: str,
    bind: bool,
    pydantic: bool,
    pydantic_options: OptionDict,
    options: Options,
) -> RegisteredTask:
    """The task of a function; options that are none of ours are its attributes, as in Celery, and slips are told."""
    if inspect.isasyncgenfunction(function):
        raise TypeError(f"task {name} is an async generator; a task returns one value: use a plain `async def`")
    body = pydantic_wrapper(function, **pydantic_options) if pydantic else function
    attributes: dict[str, object] = {
        "name": name,
        "run": body if bind else staticmethod(body),
        "__doc__": function.__doc__,
        "__module__": function.__module__,
        "__wrapped__": staticmethod(function),
        "abstract": False,
    }
    if pydantic:
        attributes["as_data"] = staticmethod(body.as_data)  # type: ignore[attr-defined]
    attributes.update(options)
    for option in options:
        near = None if hasattr(base, option) else near_option(option)
        if near is not None:
            warnings.warn(
                f"task {name}: {option!r} is not an option of amqtask's; did you mean {near!r}?",
                UnknownTaskOptionWarning,
                stacklevel=4,
            )
    task_class = types.new_class(function.__name__, (base,), exec_body=lambda namespace: namespace.update(attributes))
    task: RegisteredTask = task_class()
    # What decorators above the task copy (functools.wraps), and logs show.
    task.__dict__.update(__name__=function.__name__, __qualname__=function.__qualname__)
    return task


class SharedTask:
    """Stands for the task of the current app and passes everything on to it."""

    def __init__(self, function: Callable[..., object], options: OptionDict) -> None:
        name = options.pop("name", None) or f"{function.__module__}.{function.__name__}"
        own = {"__wrapped__": function, "__name__": function.__name__, "__doc__": function.__doc__}
        self.__dict__.update(own, __module__=function.__module__, _name=name, _options=options)
        note_shared(self._make)

    def _make(self, app: Any) -> object:
        if app.tasks.has(self._name):
            return app.tasks[self._name]
        return app.task(name=self._name, **self._options)(self.__wrapped__)

    @property
    def _task(self) -> Any:
        return self._make(current_app())

    @property  # type: ignore[misc] # nobody sets it
    def __class__(self) -> Any:
        """For `isinstance(shared, Task)`, without making an application for that."""
        return load_path("amqtask.task:Task") if find_current_app() is None else type(self._task)

    def __reduce__(self) -> Any:
        return self._task.__reduce__()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._task(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._task, name)

    def __setattr__(self, name: str, value: object) -> None:
        """An attribute of the task: tests replace its methods, programs set its options. Python's own are for this object."""
        if name.startswith("__"):
            object.__setattr__(self, name, value)
        elif find_current_app() is None:
            self._options[name] = value
        else:
            setattr(self._task, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._task, name)

    def __repr__(self) -> str:
        return f"<@shared_task: {self._name}>"


class TaskMaker(Protocol[Bind]):
    """What `@app.task(…)` is: a function becomes a task, a coroutine function one whose result is what that returns.

    With `bind=True` the function's first parameter is the task."""

    @overload
    def __call__(
        self: TaskMaker[Literal[True]], function: Callable[Concatenate[Any, P], CoroutineOf[R]], /
    ) -> AsyncTask[P, R]: ...
    @overload
    def __call__(self: TaskMaker[Literal[True]], function: Callable[Concatenate[Any, P], R], /) -> Task[P, R]: ...
    @overload
    def __call__(self: TaskMaker[Literal[False]], function: Callable[P, CoroutineOf[R]], /) -> AsyncTask[P, R]: ...
    @overload
    def __call__(self: TaskMaker[Literal[False]], function: Callable[P, R], /) -> Task[P, R]: ...


@overload
def shared_task(function: Callable[P, CoroutineOf[R]], /) -> AsyncTask[P, R]: ...
@overload
def shared_task(function: Callable[P, R], /) -> Task[P, R]: ...
@overload
def shared_task(*, bind: Literal[True], **options: object) -> TaskMaker[Literal[True]]: ...
@overload
def shared_task(*, bind: Literal[False] = False, **options: object) -> TaskMaker[Literal[False]]: ...
def shared_task(function: object = None, /, *, bind: bool = False, **options: object) -> object:
    """`@shared_task` or `@shared_task(bind=True, …)`: options as of `app.task`."""
    if function is None:
        return lambda decorated: SharedTask(decorated, {**options, "bind": bind})
    if not inspect.isroutine(function):
        raise TypeError(f"shared_task wants a function, not {function!r}")
    return SharedTask(function, {})


__getattr__ = others_names(__name__)


# -- the modules that tasks are in: `autodiscover_tasks`, and the program that was started itself


def prepare_django() -> None:
    """Load Django's applications if this is a Django project."""
    if uses_django():
        plugins().load_django()
    elif os.environ.get(VARIABLE):
        logger.warning("%s is %r, and Django is not installed here", VARIABLE, os.environ[VARIABLE])


def django_apps() -> list[str]:
    """Django's applications, when this is a Django project."""
    if not uses_django() and "django.apps" not in sys.modules:
        return []
    plugins().load_django()
    return [config.name for config in sys.modules["django.apps"].apps.get_app_configs()]


def import_related(package: str, related_name: str) -> None:
    """Import `<package>.<related_name>` if there is such a module; errors inside it are shown as they are.

    A package that is not there, in one that is, is told in a warning, and the module is looked for beside it: as in Celery
    (celery/loaders/base.py, find_related_module), where a name may also be that of a Django AppConfig.

    Raises: ConfigurationError where there is no such package at all.
    """
    if not related_name:
        load(package)
        return
    try:
        load(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        text = f"autodiscover_tasks names {package!r}, and there is no such package"
        package = package.rpartition(".")[0]
        if not package:
            raise ConfigurationError(text) from error
        logger.warning("%s", text)
    full = f"{package}.{related_name}"
    try:
        load(full)
    except ModuleNotFoundError as error:
        if error.name != full:
            raise


def name_of_main() -> str:
    """The name under which others import the program that was started (`python -m proj.app`, `python app.py`)."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return str(spec.name)
    return os.path.splitext(os.path.basename(getattr(main, "__file__", None) or "__main__"))[0]


def twin_of_main(value: object, load: Callable[[], None]) -> object | None:
    """The object that `value` of the started program is in the same module as others import it: such a program exists
    twice. None: `value` is not the program's, or nobody imported the program."""
    name = next((name for name, attribute in vars(sys.modules["__main__"]).items() if attribute is value), None)
    if name is None:
        return None
    load()
    return getattr(sys.modules.get(name_of_main()), name, None)


def app_of_flask(value: object) -> Any:
    """The application of a Flask app, in its `extensions` under "amqtask" or, as Flask's documentation teaches, "celery";
    None for what is no Flask app, or has no application."""
    extensions = getattr(value, "extensions", None)
    if not isinstance(extensions, dict):
        return None
    return extensions.get("amqtask") or extensions.get("celery")
