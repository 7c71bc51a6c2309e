"""Remote-control commands as the command line and the panel see them: Celery's, and those that users add.

    @control_command(args=[("n", int)], signature="[N=1]")
    def increase_prefetch_count(state, n=1): …

Names, aliases, arguments and default timeouts are Celery's (celery/worker/control.py). What a command of Celery's does
in a worker of ours is in amqtask.services.commands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, overload

from amqtask.exceptions import ConfigurationError
from amqtask.ground.plugins import did_you_mean

if TYPE_CHECKING:
    from amqtask.ground.shapes import KeywordDict

Kind = Literal["control", "inspect"]
# What a pattern of workers' names may be.
MATCHERS = ("glob", "pcre")
Function = TypeVar("Function", bound=Callable[..., Any])
# An argument's name, and what makes its value of a word on the command line (None: the word itself).
Argument = tuple[str, Callable[[str], Any] | None]


class CommandInfo(NamedTuple):
    """What one command is called and takes. `variadic` is the name of the argument that takes all further words."""

    name: str
    kind: Kind
    help: str = ""
    alias: str | None = None
    visible: bool = True
    # Seconds that its answers are waited for, when the caller does not say.
    default_timeout: float = 1.0
    signature: str = ""
    args: tuple[Argument, ...] = ()
    variadic: str | None = None

    def read(self, texts: Sequence[str]) -> KeywordDict:
        """The arguments of the command, from the texts of a command line. Raises: ConfigurationError."""
        # Arguments in angle brackets are required.
        is_short = len(texts) < self.signature.count("<")
        if is_short or (len(texts) > len(self.args) and self.variadic is None):
            raise ConfigurationError(f"{self.name} takes: {self.signature or 'no arguments'}")
        arguments: KeywordDict = {}
        for (name, convert), text in zip(self.args, texts, strict=False):
            try:
                arguments[name] = text if convert is None else convert(text)
            except ValueError as error:
                raise ConfigurationError(f"{self.name} takes: {self.signature} ({error})") from error
        if self.variadic is not None:
            arguments[self.variadic] = list(texts[len(self.args) :])
        return arguments


def boolean(text: str) -> bool:
    """`yes`, `true`, `on`, `1` and their opposites. Raises: ValueError."""
    values = {"1": True, "yes": True, "true": True, "on": True, "0": False, "no": False, "false": False, "off": False}
    try:
        return values[text.strip().lower()]
    except KeyError:
        raise ValueError(f"{text!r} is neither yes nor no") from None


def _ask(name: str, help: str, **options: Any) -> CommandInfo:
    return CommandInfo(name=name, kind="inspect", help=help, **options)


def _tell(name: str, help: str, **options: Any) -> CommandInfo:
    return CommandInfo(name=name, kind="control", help=help, **options)


_IDS = "[id1 [id2 [... [idN]]]]"
_HEADERS = "[key1=value1 [key2=value2 [... [keyN=valueN]]]]"

BUILTIN: Mapping[str, CommandInfo] = {
    info.name: info
    for info in (
        _ask("active", "Tasks that run.", alias="dump_active"),
        _ask("active_queues", "Queues that are consumed."),
        _ask("clock", "The logical clock."),
        _ask("conf", "The configuration, secrets starred out.", alias="dump_conf",
             signature="[include_defaults=False]", args=(("with_defaults", boolean),)),
        _ask("hello", "What a worker that starts asks its neighbours.", visible=False),
        _ask("memdump", "What earlier memsamples said, and the memory after a garbage collection.",
             signature="[n_samples=10]", args=(("samples", int),)),
        _ask("memsample", "Memory that the main process has in use."),
        _ask("objgraph", "Draw what refers to objects of a type (needs objgraph and Graphviz).", default_timeout=60.0,
             signature="[object_type=Request] [num=200 [max_depth=10]]",
             args=(("type", str), ("num", int), ("max_depth", int))),
        _ask("ping", "Who is there.", default_timeout=0.2),
        _ask("query_task", "What is known of tasks, by id.", signature=_IDS, variadic="ids"),
        _ask("registered", "Tasks that can be run.", alias="dump_tasks",
             signature="[attr1 [attr2 [... [attrN]]]]", variadic="taskinfoitems"),
        _ask("report", "Versions and settings for a bug report."),
        _ask("reserved", "Tasks that were delivered and wait for a slot.", alias="dump_reserved"),
        _ask("revoked", "Ids of revoked tasks.", alias="dump_revoked"),
        _ask("scheduled", "Tasks that wait in the worker for their time.", alias="dump_schedule"),
        _ask("stats", "Numbers about the worker."),
        _tell("add_consumer", "Consume a queue, too.", signature="<queue> [exchange [type [routing_key [slots]]]]",
              args=(("queue", str), ("exchange", str), ("exchange_type", str), ("routing_key", str), ("slots", str))),
        _tell("autoscale", "Change the bounds of autoscale.", signature="[max [min]]",
              args=(("max", int), ("min", int))),
        _tell("cancel_consumer", "Stop consuming a queue.", signature="<queue>", args=(("queue", str),)),
        _tell("disable_events", "Send no task events any more."),
        _tell("election", "Have one of the workers call a task.",
              signature="<id> <topic> [action]", args=(("id", str), ("topic", str), ("action", str))),
        _tell("enable_events", "Send task events."),
        _tell("heartbeat", "Send a heartbeat event now."),
        _tell("pause_queue", "Stop consuming a queue; what holds is `amqtask queues pause`.", visible=False,
              signature="<queue>", args=(("queue", str),)),
        _tell("pool_grow", "More slots.", signature="[N=1 [pool]]", args=(("n", int), ("pool", str))),
        _tell("pool_restart", "Replace the pool's processes (needs worker_pool_restarts).",
              signature="[module1 [... [moduleN]]]", variadic="modules"),
        _tell("pool_shrink", "Fewer slots.", signature="[N=1 [pool]]", args=(("n", int), ("pool", str))),
        _tell("purge_delayed", "Delete what is held here until its time.", visible=False),
        _tell("rate_limit", "Another rate limit for a task.",
              signature="<task_name> <rate_limit (e.g., 5/s | 5/m | 5/h)>",
              args=(("task_name", str), ("rate_limit", str))),
        _tell("release_delayed", "Send what is held here until its time now.", visible=False),
        _tell("resume_queue", "Consume a paused queue again.", visible=False, signature="<queue>", args=(("queue", str),)),
        _tell("revoke", "Do not run these tasks.", signature=_IDS, variadic="task_id"),
        _tell("revoke_by_stamped_headers", "Do not run tasks with these stamps.",
              signature=_HEADERS, variadic="headers"),
        _tell("shutdown", "Shut down warmly."),
        _tell("terminate", "Revoke these tasks, and end those that run.", signature=f"<signal> {_IDS}",
              args=(("signal", str),), variadic="task_id"),
        _tell("time_limit", "Other time limits for a task.", signature="<task_name> <soft_secs> [hard_secs]",
              args=(("task_name", str), ("soft", float), ("hard", float))),
    )
}  # fmt: skip

# Filled when users' modules are imported, as shared tasks are noted; a command of theirs wins over one of ours.
_custom: dict[str, tuple[CommandInfo, Callable[..., Any]]] = {}


class CommandDecorator:
    """Adds commands of one kind to workers, as a decorator with or without options: `control_command` and `inspect_command`."""

    def __init__(self, kind: Kind) -> None:
        self._kind = kind

    @overload
    def __call__(self, function: Function, /) -> Function: ...
    @overload
    def __call__(
        self,
        /,
        *,
        name: str | None = None,
        alias: str | None = None,
        visible: bool = True,
        default_timeout: float = 1.0,
        help: str | None = None,
        signature: str | None = None,
        args: Sequence[Argument] | None = None,
        variadic: str | None = None,
    ) -> Callable[[Function], Function]: ...
    def __call__(self, function: Any = None, /, **options: Any) -> Any:
        if function is None:
            return lambda decorated: self(decorated, **options)
        fields = {key: value for key, value in options.items() if value is not None}
        name = fields.pop("name", None) or function.__name__
        fields.setdefault("help", (function.__doc__ or "").strip().split("\n")[0])
        fields["args"] = tuple((str(argument), convert) for argument, convert in fields.get("args", ()))
        info = CommandInfo(name=name, kind=self._kind, **fields)
        for known_as in {name, info.alias or name}:
            _custom[known_as] = (info, function)
        return function


control_command = CommandDecorator("control")
"""Add a command that changes a worker: `function(state, **arguments)`, run on its I/O loop.

`name` is the function's unless given, `args` and `variadic` say what the command line takes. What the function
returns is the reply; what it raises is answered as an error.
"""

inspect_command = CommandDecorator("inspect")
"""Add a command that asks a worker; see `control_command`."""


def find_custom(name: str) -> Callable[..., Any] | None:
    """The user's function for a command (or its alias), if there is one."""
    registered = _custom.get(name)
    return registered[1] if registered is not None else None


def commands_of(kind: Kind) -> dict[str, CommandInfo]:
    """The visible commands of one kind, by name: ours and the users'."""
    commands = {**BUILTIN, **{info.name: info for info, _ in _custom.values()}}
    return {name: info for name, info in sorted(commands.items()) if info.kind == kind and info.visible}


def find_command(kind: Kind, name: str) -> CommandInfo:
    """A command of one kind by its name or alias. Raises: ConfigurationError, with the nearest name."""
    if name in _custom and _custom[name][0].kind == kind:
        return _custom[name][0]
    for info in BUILTIN.values():
        if info.kind == kind and name in (info.name, info.alias):
            return info
    commands = commands_of(kind)
    hint = did_you_mean(name, commands) or f" Available {kind} commands: {', '.join(commands)}."
    raise ConfigurationError(f"Command {name!r} not recognized.{hint}")
