"""`amqtask shell`: Python with the application, its tasks and the words to call them."""

from __future__ import annotations

import code
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from amqtask.canvas import chain, chord, chunks, group, signature, xmap, xstarmap
from amqtask.cli.base import Globals, echo_text
from amqtask.ground import VERSION
from amqtask.ground.plugins import load
from amqtask.result import AsyncResult
from amqtask.task import Task

if TYPE_CHECKING:
    from amqtask.app import AmqTask

# `subtask` is Celery's old name of `signature`.
NAMES = {
    "AsyncResult": AsyncResult,
    "Task": Task,
    "chain": chain,
    "chord": chord,
    "chunks": chunks,
    "group": group,
    "signature": signature,
    "subtask": signature,
    "xmap": xmap,
    "xstarmap": xstarmap,
}


@click.command("shell")
@click.option("-I", "--ipython", "kind", flag_value="ipython", help="IPython, or an error when it is not installed.")
@click.option("-B", "--bpython", "kind", flag_value="bpython", help="bpython, or an error when it is not installed.")
@click.option("--python", "kind", flag_value="python", help="Python's own.")
@click.option("-T", "--without-tasks", is_flag=True, help="Leave the tasks out.")
@click.option("--eventlet", is_flag=True, help="Patch Python for eventlet first.")
@click.option("--gevent", is_flag=True, help="Patch Python for gevent first.")
@click.pass_obj
def command(settings: Globals, kind: str | None, without_tasks: bool, eventlet: bool, gevent: bool) -> None:
    """Start Python with `app`, all tasks by their function's name, chain, group, chord, signature, AsyncResult …

    IPython or bpython is taken if it is installed, unless told.
    """
    del eventlet, gevent  # patched before anything was imported, see amqtask/__main__.py
    app = settings.load()
    names = namespace(app, with_tasks=not without_tasks)
    if kind is not None:
        _SHELLS[kind](names, _greeting(app, names))
        return
    for shell in _SHELLS.values():
        try:
            shell(names, _greeting(app, names))
        except _NotInstalled:
            continue
        return


def namespace(app: AmqTask, *, with_tasks: bool = True) -> dict[str, object]:
    """The names of the shell: tasks, and ours, which a task of that name never hides."""
    names: dict[str, object] = {}
    if with_tasks:
        app.load_tasks()
        # A task's class has its function's name.
        names = {type(app.tasks[name]).__name__: app.tasks[name] for name in app.tasks.own}
    return names | NAMES | {"app": app, "celery": app}


def _greeting(app: AmqTask, names: dict[str, object]) -> str:
    tasks = sorted(name for name, value in names.items() if isinstance(value, Task))
    return f"amqtask {VERSION}: app = {app!r} on {app.broker_name}\ntasks: {', '.join(tasks) or 'none'}"


class _NotInstalled(click.ClickException):
    """A shell's library is missing."""

    def __init__(self, library: str) -> None:
        super().__init__(f"{library} is not installed: pip install {library.lower()}")


def _library(name: str) -> Any:
    try:
        return load(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise _NotInstalled(name) from error


def _ipython(names: dict[str, object], greeting: str) -> None:
    library = _library("IPython")
    echo_text(greeting)
    library.start_ipython(argv=[], user_ns=names)


def _bpython(names: dict[str, object], greeting: str) -> None:
    _library("bpython").embed(names, banner=greeting)


def _python(names: dict[str, object], greeting: str) -> None:
    try:
        import readline
        import rlcompleter
    except ModuleNotFoundError:
        pass  # Python without it: no history, no completion
    else:
        readline.set_completer(rlcompleter.Completer(names).complete)
        readline.parse_and_bind("tab: complete")
    code.interact(banner=greeting, local=names, exitmsg="")


_SHELLS: dict[str, Callable[[dict[str, object], str], None]] = {
    "ipython": _ipython,
    "bpython": _bpython,
    "python": _python,
}
