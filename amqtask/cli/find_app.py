"""Find the application the way Flask does: told, configured, or in the usual places."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from amqtask.app import AmqTask
from amqtask.client.registry import app_of_flask
from amqtask.exceptions import AppNotFound
from amqtask.ground.plugins import load
from amqtask.ground.printable import described
from amqtask.task import Task

USUAL_ATTRIBUTES = ("app", "amqtask_app", "celery", "celery_app", "application")
USUAL_MODULES = ("tasks", "amqtask_app")
USUAL_SUBMODULES = ("amqtask", "celery", "app")


def find_app(app_path: str | None, folder: Path | None = None) -> AmqTask:
    """The application named by `-A`, AMQTASK_APP, `[tool.amqtask] app` in pyproject.toml, or found in `folder`.

    Raises: AppNotFound, saying what was looked for and what to do.
    """
    directory = folder or Path.cwd()
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))
    if app_path:
        return load_app(app_path, "-A")
    if name := os.environ.get("AMQTASK_APP"):
        return load_app(name, "AMQTASK_APP")
    if name := _configured(directory):
        return load_app(name, "[tool.amqtask] app in pyproject.toml")
    return _search(directory)


def load_app(name: str, source: str = "-A") -> AmqTask:
    """`module`, `module:attribute` or `module.attribute`; a package is searched for `.amqtask`, `.celery`, `.app`."""
    module_name, _, attribute = name.partition(":")
    _check_module(module_name, source)
    try:
        module = load(module_name)
    except ModuleNotFoundError as error:
        # Only the named module itself may be missing; a missing import inside it is shown as what it is.
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise
        parent, _, last = module_name.rpartition(".")
        if not attribute and parent and _is_there(parent):
            return load_app(f"{parent}:{last}", source)
        raise AppNotFound(
            f"{source} says {name!r}, but there is no module {error.name!r} (looked in {Path.cwd()} and on the "
            "Python path). Is the name right, and are you in the project's folder?"
        ) from error
    if attribute:
        return _attribute(module, attribute, source)
    app = _app_in(module)
    if app is None and hasattr(module, "__path__"):
        app = _app_in_package(module)
    if app is None:
        raise AppNotFound(
            f"{source} says {name!r}, but that module has no AmqTask application. "
            f"Name it, or a function that makes it: -A {name}:<attribute>; or call it one of {', '.join(USUAL_ATTRIBUTES)}."
        )
    return app


def _check_module(name: str, source: str) -> None:
    """Raises: AppNotFound for what is no module's name, or our own."""
    if "/" in name or os.sep in name or "" in name.split(".") or (name.endswith(".py") and Path(name).is_file()):
        path = Path(name.removesuffix(".py"))
        if path.is_absolute():
            path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else Path(path.name)
        parts = [part.lstrip(".") for part in path.parts if part.strip("./")]
        module_name = ".".join(parts).rstrip(".")
        raise AppNotFound(f"{source} says {name!r}, and wants a module, as `import` does: {module_name or 'tasks'}")
    if name == __package__.partition(".")[0]:
        raise AppNotFound(f"{source} says {name!r}, which is this package. {_SHADOWED}")


def _is_there(module_name: str) -> bool:
    try:
        return importlib.util.find_spec(module_name) is not None
    except ModuleNotFoundError:
        return False  # what stands before the dot is no package


_SHADOWED = (
    "A file amqtask.py of yours cannot be imported beside it, or is imported in its place: give it another name."
)


def _attribute(module: ModuleType, path: str, source: str) -> AmqTask:
    path = path.removesuffix("()")  # as for Flask and gunicorn
    verb = "is"
    value: Any = module
    for part in path.split("."):
        if not hasattr(value, part):
            raise AppNotFound(f"{source}: module {module.__name__!r} has no attribute {path!r}.")
        value = getattr(value, part)
    if isinstance(value, ModuleType):
        app = _app_in(value)
        if app is not None:
            return app
    if not isinstance(value, (AmqTask, Task)) and callable(value) and not hasattr(value, "wsgi_app"):
        verb, value = "makes", _made_by(value, f"{source}: {module.__name__}:{path}")
    if not isinstance(value, AmqTask):
        value = app_of_flask(value) or value
    if not isinstance(value, AmqTask):
        description = "nothing" if value is None else described(value)
        if isinstance(value, Task):
            description = f"the task {value.name}"
        raise AppNotFound(f"{source}: {module.__name__}:{path} {verb} {description}, not an AmqTask application.")
    return value


def _made_by(factory: Callable[..., object], where: str) -> object:
    """What an application factory makes. Raises: AppNotFound for one that wants arguments; what it raises."""
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise AppNotFound(
            f"{where} is called to make the application, and cannot be without arguments: {error}."
        ) from error
    return factory()


def _app_in(module: ModuleType) -> AmqTask | None:
    for name in USUAL_ATTRIBUTES:
        value = getattr(module, name, None)
        candidate = value if isinstance(value, AmqTask) else app_of_flask(value)
        if isinstance(candidate, AmqTask):
            return candidate
    apps = {id(value): value for value in vars(module).values() if isinstance(value, AmqTask)}
    if len(apps) > 1:
        raise AppNotFound(
            f"module {module.__name__!r} has {len(apps)} applications; say which: -A {module.__name__}:name"
        )
    return next(iter(apps.values()), None)


def _app_in_package(package: ModuleType) -> AmqTask | None:
    for name in USUAL_SUBMODULES:
        full = f"{package.__name__}.{name}"
        if importlib.util.find_spec(full) is not None:
            app = _app_in(load(full))
            if app is not None:
                return app
    return None


def _configured(folder: Path) -> str | None:
    file = folder / "pyproject.toml"
    if not file.is_file():
        return None
    # Not imported above: most workers are told their app, and it costs as much as a small module of ours.
    tomllib = load("tomllib" if sys.version_info >= (3, 11) else "tomli")
    with file.open("rb") as stream:
        table = tomllib.load(stream)
    name = table.get("tool", {}).get("amqtask", {}).get("app")
    return str(name) if name else None


def _search(folder: Path) -> AmqTask:
    candidates = [name for name in USUAL_MODULES if _is_module(folder, name)]
    candidates += [
        f"{path.parent.name}.{path.stem}"
        for submodule in ("amqtask", "celery")
        for path in sorted(folder.glob(f"*/{submodule}.py"))
    ]
    failures: list[str] = [_SHADOWED] if (folder / "amqtask.py").is_file() else []
    for name in candidates:
        try:
            app = _app_in(load(name))
        except Exception as error:  # noqa: BLE001 - the user's module; the reason is shown below
            reason = traceback.format_exception_only(type(error), error)[-1].strip()
            failures.append(f"{name} could not be imported: {reason}")
            continue
        if app is not None:
            return app
        failures.append(f"{name} has no AmqTask application")
    looked = "\n".join(f"  - {line}" for line in failures) or "  - none of these is here"
    raise AppNotFound(
        "no application found. Looked for -A, AMQTASK_APP, [tool.amqtask] app in pyproject.toml, and for an app in "
        f"tasks.py, amqtask_app.py or <package>/amqtask.py in {folder}:\n{looked}\n"
        "Say where it is: amqtask -A mymodule:app worker"
    )


def _is_module(folder: Path, name: str) -> bool:
    return (folder / f"{name}.py").is_file() or (folder / name / "__init__.py").is_file()
