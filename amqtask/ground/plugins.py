"""Names that only the running program knows (a user's module, a plug-in), and what lower rows need of upper ones.

Who needs something of a row above neither imports nor names it: `amqtask.plugin_table` answers, and is imported when it is first
asked. The package's root says, as it is imported, where that is: this module is a part of every `import amqtask`, so that the
contract is for type checkers and readers only.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from functools import lru_cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from typing import Protocol

    class Plugins(Protocol):
        """What the core asks for. Types of upper rows are Any: this row does not know them."""

        # -- programs written for Celery

        def celery_name(self, module: str, name: str) -> Any:
            """A name that one of our modules has only for them. Raises: AttributeError."""

        def celery_attribute(self, owner: object, name: str) -> Any:
            """An attribute that one of our objects has only for them, bound to it. Raises: AttributeError."""

        def celery_connection(self, app: Any) -> Any:
            """What `app.connection()` gives."""

        def celery_bootsteps(self, app: Any, worker: Any, options: object) -> Any:
            """A service that runs `app.steps` in a worker."""

        def celery_loader(self, app: Any, loader: object) -> None:
            """Have `app.loader` be of this class, or that of this name. Raises: ConfigurationError."""

        def celery_tracer(self, task: object) -> Any:
            """What a tracing library has put around a task's call, None where none has."""

        # -- the roof

        def default_app(self) -> Any:
            """An application with default settings, which is not made the current one."""

        def run_command_line(self, app: Any, argv: Sequence[str]) -> int:
            """`amqtask …` with this application (None: that which the arguments lead to); the exit code."""

        def load_app(self, name: str, source: str) -> Any:
            """The application under this name, as after -A; `source` says who gave it. Raises: AppNotFound."""

        # -- pools

        def pool(self, name: str) -> Any:
            """The class of one of our own pools, None for another name. Raises: ModuleNotFoundError (a library)."""

        # -- Django; each raises ImportError where it is not installed

        def load_django(self) -> None:
            """Have its applications ready."""

        def django_time_zone(self) -> str:
            """The settings' TIME_ZONE."""

        def django_backend(self, scheme: str) -> Any:
            """The class of result store for `django-db://` and `django-cache://`, None for another scheme."""

        def django_outbox(self, database: str) -> Any:
            """The outbox in a database of Django's."""

        def django_inbox(self, database: str) -> Any:
            """The inbox in a database of Django's."""

        def after_commit(self, call: Callable[[], object], outbox: Any) -> None:
            """Call when the present transaction of Django's is committed."""

        def aafter_commit(self, call: Callable[[], object], outbox: Any) -> Awaitable[None]:
            """The same without blocking the event loop."""

        def follow_django_settings(self, conf: Any, namespace: str | None) -> None:
            """Have changes of Django's settings take effect in `conf`."""

        def around_django_tasks(self) -> Any:
            """What tasks run in, in a Django project."""


_sources: list[Callable[[], Plugins]] = []


def register(source: Callable[[], Plugins]) -> None:
    """Say where the answers are."""
    _sources[:] = [source]


def plugins() -> Plugins:
    """Those who answer."""
    return _sources[0]()


class WithOthersNames:
    """Looks for attributes that an object does not have in `amqtask.compat.attributes`."""

    if not TYPE_CHECKING:  # what is there is for them, not for us

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return plugins().celery_attribute(self, name)


class WithListedNames:
    """As WithOthersNames, for objects that each message has to do with: a class with a `__getattr__` takes five times as long for
    every attribute that it does have (Python 3.11). So the class lists these names (`others_names="pid start"`)."""

    __slots__ = ()

    def __init_subclass__(cls, *, others_names: str = "") -> None:
        super().__init_subclass__()
        for name in others_names.split():
            setattr(cls, name, _Elsewhere(name))


class _Elsewhere:
    """An attribute in `amqtask.compat.attributes`, as a member of the class that has it for others' sake."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, owner: object, owner_class: type) -> Any:
        return self if owner is None else plugins().celery_attribute(owner, self._name)


def others_names(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module that has names for their sake."""

    def find(name: str) -> Any:
        if name.startswith("__"):  # the import system asks each module for a __path__
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return plugins().celery_name(module, name)

    return find


# -- Modules by names that only the running program knows: a user's, a plug-in's. What we know ourselves, a statement imports.


def load(module: str, package: str | None = None) -> Any:
    """The module of that name; in `package` if the name begins with a dot. Raises: ImportError."""
    return importlib.import_module(module, package)


def load_path(path: str) -> Any:
    """What `module:attribute` (or `module:attribute.of.it`), or `module.attribute` names.

    Raises: ImportError, AttributeError, ValueError (there is no module in the path).
    """
    module, separator, attributes = path.partition(":")
    if not separator:
        module, _, attributes = path.rpartition(".")
    return attrgetter(attributes)(load(module))


_ABSENT = object()


@lru_cache
def completed(plugin: Any, defaults: type) -> Any:
    """The class `plugin`; where it lacks members that `defaults` has, a class derived from it that has them.

    So plug-ins need not derive from a class of ours, and go on as they are when a contract gets new members.
    """
    missing = {name: _member(defaults, name) for name in _public(defaults) if _member(plugin, name) is _ABSENT}
    if not missing:
        return plugin
    names = {"__module__": plugin.__module__, "__qualname__": plugin.__qualname__, "__doc__": plugin.__doc__}
    return type(plugin)(plugin.__name__, (plugin,), {**missing, **names})


def misspelt(plugin: type, contract: type) -> dict[str, str]:
    """Members of `plugin` that look like one of the contract that it leaves out: its name by theirs."""
    members = _public(contract)
    left_out = [name for name in members if _member(plugin, name) in (_ABSENT, _member(contract, name))]
    near = {name: near_names(name, left_out, alike=0.85) for name in _public(plugin) if name not in members}
    return {name: matches[0] for name, matches in near.items() if matches}


def _public(of: type) -> list[str]:
    return [name for name in dir(of) if not name.startswith("_")]


def _member(of: type, name: str) -> object:
    """What a class has under a name, as it stands there."""
    return next((vars(base)[name] for base in of.__mro__ if name in vars(base)), _ABSENT)


# -- What a name that does not exist may have meant.

# Characters of a name that is compared with others.
LONGEST_COMPARED = 200


def near_names(name: str, names: Iterable[str], *, most: int = 1, alike: float = 0.6) -> list[str]:
    """Of all names those that are most like one that does not exist; none for a name of more than LONGEST_COMPARED characters."""
    from difflib import get_close_matches

    return get_close_matches(name, list(names), most, alike) if len(name) <= LONGEST_COMPARED else []


def did_you_mean(name: str, names: Iterable[str], *, most: int = 1, alike: float = 0.6) -> str:
    """` Did you mean 'this'?` for the end of an error about a name that does not exist, or nothing."""
    near = near_names(name, names, most=most, alike=alike)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
