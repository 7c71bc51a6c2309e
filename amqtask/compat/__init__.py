"""Names that only Celery's users look for, at Celery's places: nothing of ours imports what is in here.

`amqtask.utils.time` is `compat/utils/time.py`: a module of that name which is nowhere else is looked for here (see `Finder`),
unless it only names what is elsewhere (`MODULES`). A module that is there already asks `lookup` for the names that it has not, an
object `attribute`.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from amqtask.ground.plugins import load, load_path

FOLDER = Path(__file__).parent
PACKAGE = "amqtask."


def _in(module: str, names: str) -> dict[str, str]:
    """Names that are in this module, each under its own."""
    return {name: f"{module}:{name}" for name in names.split()}


# Names of modules that exist: module → name → where it is.
NAMES: dict[str, dict[str, str]] = {
    "amqtask.app": {
        "app_or_default": "amqtask.compat.names:app_or_default",
        "bugreport": "amqtask.compat.names:bugreport",
        "default_app": "amqtask.ground.current:current_app",
        "shared_task": "amqtask.client.registry:shared_task",
    },
    "amqtask.backends.redis": {"SentinelBackend": "amqtask.backends.redis:RedisBackend"},
    "amqtask.beat": _in(
        "amqtask.compat.beat",
        "DEFAULT_MAX_INTERVAL PersistentScheduler ScheduleEntry Scheduler SchedulingError Service event_t",
    ),
    "amqtask.canvas": {
        "StampingVisitor": "amqtask.calls.signature:StampingVisitor",
        "_chain": "amqtask.canvas:chain",
        "_chord": "amqtask.canvas:chord",
        "maybe_subtask": "amqtask.canvas:maybe_signature",
        "subtask": "amqtask.canvas:signature",
    },
    "amqtask.contrib.pytest": _in(
        "amqtask.testing.celery_fixtures",
        "celery_app celery_config celery_enable_logging celery_includes celery_parameters celery_worker celery_session_app "
        "celery_session_worker celery_worker_parameters celery_worker_pool depends_on_current_app use_celery_app_trap",
    ),
    "amqtask.exceptions": {
        "BackendError": "amqtask.exceptions:ResultError",
        "BackendGetMetaError": "amqtask.exceptions:BackendUnreachable",
        "BackendStoreError": "amqtask.exceptions:BackendUnreachable",
        "CeleryError": "amqtask.exceptions:AmqTaskError",
        "ImproperlyConfigured": "amqtask.exceptions:ConfigurationError",
        **_in(
            "amqtask.compat.errors",
            "AlreadyRegistered AlwaysEagerIgnored CDeprecationWarning CPendingDeprecationWarning CeleryCommandException "
            "CeleryWarning FixupWarning IncompleteStream NotConfigured SecurityWarning TaskError WorkerShutdown "
            "WorkerTerminate reraise",
        ),
    },
    "amqtask.result": {"ResultBase": "amqtask.compat.names:ResultBase"},
    "amqtask.states": _in("amqtask.compat.names", "precedence state"),
    "amqtask.utils.log": _in("amqtask.compat.names", "LOG_LEVELS mlevel base_logger"),
    "amqtask.worker": {"WorkController": "amqtask.worker.worker:Worker"},
    "amqtask.worker.strategy": _in("amqtask.compat.app.amqp", "hybrid_to_proto2 proto1_to_proto2"),
    "amqtask.events": _in("amqtask.compat.names", "Event event_exchange get_exchange group_from"),
    "amqtask.utils": {
        "cached_property": "functools:cached_property",
        **_in("amqtask.compat.utils.functional", "chunks memoize noop"),
        **_in("amqtask.compat.utils.imports", "gen_task_name import_from_cwd instantiate"),
        **_in("amqtask.compat.utils.nodenames", "nodename nodesplit worker_direct"),
        "gen_unique_id": "amqtask.utils:uuid",
        "get_cls_by_name": "amqtask.compat.utils.imports:symbol_by_name",
        "get_full_cls_name": "amqtask.compat.utils.imports:qualname",
    },
}


# Modules that only name what is elsewhere: module → name → where it is.
MODULES: dict[str, dict[str, str]] = {
    "amqtask.app.backends": _in("amqtask.compat.names", "by_name by_url"),
    "amqtask.app.base": {"AmqTask": "amqtask.app:AmqTask", "Celery": "amqtask.app:AmqTask"},
    "amqtask.app.events": {"Events": "amqtask.events.client:Events"},
    "amqtask.app.log": {"TaskFormatter": "amqtask.log:TaskFormatter"},
    "amqtask.app.registry": {"TaskRegistry": "amqtask.client.registry:TaskRegistry"},
    "amqtask.app.task": {"Context": "amqtask.execution.context:Context", "Task": "amqtask.task:Task"},
    "amqtask.bin": {},
    "amqtask.bin.base": {
        "CLIContext": "amqtask.cli.base:Globals",
        **_in(
            "amqtask.compat.commands",
            "COMMA_SEPARATED_LIST LOG_LEVEL CeleryCommand CeleryDaemonCommand CeleryOption handle_preload_options",
        ),
    },
    "amqtask.bin.beat": {"beat": "amqtask.cli.beat:command"},
    "amqtask.bin.celery": {"celery": "amqtask.cli.main:cli", "main": "amqtask.compat.commands:main"},
    "amqtask.bin.worker": {"worker": "amqtask.cli.worker:command"},
    "amqtask.events.event": NAMES["amqtask.events"],
    "amqtask.events.receiver": _in("amqtask.events.client", "EventReceiver"),
    "amqtask.fixups": {},
    "amqtask.fixups.django": {"FixupWarning": "amqtask.compat.errors:FixupWarning"},
    "amqtask.platforms": _in(
        "amqtask.compat.names", "EX_FAILURE EX_OK EX_UNAVAILABLE EX_USAGE IS_WINDOWS IS_macOS SYSTEM isatty signal_name"
    ),
    "amqtask.registry": {"tasks": "amqtask.compat.names:tasks"},
    # Ours, where programs for Celery ask kombu: serializers and JSON types of one's own.
    "amqtask.serialization": _in("amqtask.protocol.serialization", "register register_type"),
    "amqtask.utils.collections": {
        "AttributeDict": "amqtask.compat.names:AttributeDict",
        "ChainMap": "collections:ChainMap",
        "OrderedDict": "collections:OrderedDict",
    },
    "amqtask.utils.dispatch": {"Signal": "amqtask.compat.names:Signal"},
    "amqtask.utils.dispatch.signal": {"Signal": "amqtask.compat.names:Signal"},
    "amqtask.utils.graph": {"DependencyGraph": "amqtask.ground.graph:DependencyGraph"},
    "amqtask.utils.iso8601": {"parse_iso8601": "amqtask.compat.utils.time:parse_iso8601"},
    "amqtask.utils.objects": {"Bunch": "types:SimpleNamespace", "mro_lookup": "amqtask.compat.names:mro_lookup"},
    "amqtask.utils.saferepr": {"saferepr": "amqtask.protocol.task:saferepr"},
    "amqtask.worker.control": _in("amqtask.remote.commands", "control_command inspect_command"),
}


def lookup(module: str, name: str) -> Any:
    """A name that the module has only for others' sake. Raises: AttributeError."""
    where = NAMES.get(module, {}).get(name)
    if where is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    return load_path(where)


# Attributes that objects have only for others' sake: class → the class in whose place theirs are.
ATTRIBUTES = {
    "amqtask.app.AmqTask": "amqtask.compat.app_attributes:OfApp",
    "amqtask.backends.contract.KnownStore": "amqtask.compat.attributes:OfStore",
    "amqtask.backends.redis.RedisBackend": "amqtask.compat.attributes:OfRedis",
    "amqtask.execution.request.Request": "amqtask.compat.attributes:OfRequest",
    "amqtask.result.AsyncResult": "amqtask.compat.attributes:OfResult",
    "amqtask.results.ResultSet": "amqtask.compat.attributes:OfResults",
    "amqtask.settings.Settings": "amqtask.compat.attributes:OfSettings",
    "amqtask.signals.Signal": "amqtask.compat.attributes:OfSignal",
    "amqtask.task.Task": "amqtask.compat.attributes:OfTask",
    "amqtask.worker.worker.Worker": "amqtask.compat.bootsteps:OfWorker",
}


def attribute(owner: object, name: str) -> Any:
    """An attribute that an object has only for others' sake, bound to it. Raises: AttributeError."""
    ours = type(owner).__mro__
    for owner_class in ours:
        where = ATTRIBUTES.get(f"{owner_class.__module__}.{owner_class.__qualname__}")
        if where is not None:
            for theirs in load_path(where).__mro__:
                if theirs not in ours and name in vars(theirs):
                    member = vars(theirs)[name]
                    return member.__get__(owner, type(owner)) if hasattr(member, "__get__") else member
    raise AttributeError(f"{type(owner).__name__!r} object has no attribute {name!r}")


class Finder:
    """Finds `amqtask.<place>` in this folder, where the package itself has no such module: it is the module of that place here,
    not a copy of it."""

    @staticmethod
    def find_spec(fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """As the import system asks."""
        if fullname in MODULES:
            has_parts = any(name.startswith(f"{fullname}.") for name in MODULES)
            return ModuleSpec(fullname, Listed(), is_package=has_parts)
        relative_name = fullname.removeprefix(PACKAGE)
        folder = FOLDER.joinpath(*relative_name.split("."))
        is_package = (folder / "__init__.py").is_file()
        if not is_package and not folder.with_suffix(".py").is_file():
            return None
        if is_package:
            Inside.packages.add(fullname)
            if Inside not in sys.meta_path:
                sys.meta_path.insert(0, Inside)
        return ModuleSpec(fullname, Same(load(f"{__name__}.{relative_name}")), is_package=is_package)


class Inside:
    """What is in a package that was found here is found here too, before Python makes copies of the files in its folder."""

    packages: ClassVar[set[str]] = set()

    @classmethod
    def find_spec(cls, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """As the import system asks."""
        return Finder.find_spec(fullname) if fullname.rpartition(".")[0] in cls.packages else None


class Same(Loader):
    """Loads the module that is there already, under another name."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self._spec = module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """That module."""
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        """It has been run."""
        module.__spec__ = self._spec  # the import system has put its own there


class Listed(Loader):
    """Makes a module of MODULES, whose names are looked up when they are asked for."""

    def exec_module(self, module: ModuleType) -> None:
        """Give it its names."""
        names = MODULES[module.__name__]

        def find(name: str) -> Any:
            if name not in names:
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            return load_path(names[name])

        module.__dict__.update(__all__=list(names), __getattr__=find)
