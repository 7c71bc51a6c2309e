"""chain, group, chord, chunks, map, starmap: several calls as one signature (Celery's canvas; celery-facts 1.4 has the shapes).

A composition is data. What `|` builds is kept in one normal form, whatever it is built of:

    chain   its steps are plain tasks; only the last may be a group or a chord
    group   its members are plain tasks, chains and chords (groups in groups are one group)
    chord   a header of such members, and any of these as its body

A group that is followed by something is a chord with that as its body, and what follows a chord belongs to its body. So
nothing that reads a composition has more than these three cases. What has no task in it (an empty chain or group) is left out of
a chain, and an empty chain has no result: publishing it gives None, as in Celery. Which ids its parts get, and which messages it
begins with, is amqtask.client.workflow_ids's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeGuard, overload

from amqtask.calls.signature import Signature, gathered, listed
from amqtask.exceptions import ConfigurationError, WrongValue
from amqtask.ground.plugins import others_names
from amqtask.protocol.option_types import arguments, signature_of

if TYPE_CHECKING:
    from amqtask.calls.application import Application
    from amqtask.calls.signature import StampingVisitor
    from amqtask.ground.shapes import HeaderDict, KeywordDict, Keywords, SignatureFields, StampDict
    from amqtask.result import UntypedResult
    from amqtask.results import GroupResult

CHAIN, GROUP, CHORD = "celery.chain", "celery.group", "celery.chord"
# Options of a chain that say where its result goes.
_OF_THE_END = frozenset({"chord", "group_id", "group_index", "task_id"})
CHUNKS, MAP, STARMAP, ACCUMULATE = "celery.chunks", "celery.map", "celery.starmap", "celery.accumulate"


class Composition(Signature):
    """What chain, group and chord have in common: the app publishes them, in as many messages as it takes."""

    @property
    def tasks(self) -> list[Signature]:
        """The parts."""
        return [as_signature(part, self.bound_app) for part in self.kwargs["tasks"]]

    @tasks.setter
    def tasks(self, parts: Iterable[Any]) -> None:
        self.kwargs["tasks"] = [as_signature(part, self.bound_app) for part in parts]

    @property
    def app(self) -> Application:
        """The application of the composition, else of its first part that has one, else the current one."""
        if self.bound_app is None:
            self.bound_app = next((part.bound_app for part in self._parts() if part.bound_app is not None), None)
        return super().app

    def _parts(self) -> list[Signature]:
        return self.tasks

    def _change_tasks(self, change: Callable[[Signature], object]) -> None:
        tasks = self.tasks
        for task in tasks:
            change(task)
        self.tasks = tasks

    def _stamp_tasks(
        self, visitor: StampingVisitor | None, append: bool, headers: HeaderDict, visited: StampDict | None
    ) -> StampDict:
        """Stamp callbacks and parts with the stamps handed down and the visitor's for the composition; returns these stamps."""
        stamps = gathered(headers, visited, self.options, append=append)
        self.stamp_links(visitor, append, **stamps)
        self.tasks = [task.stamp(visitor, append, **stamps) for task in self.tasks]
        return stamps

    def apply_async(
        self, args: Iterable[object] | None = None, kwargs: Keywords | None = None, **options: object
    ) -> Any:
        """Publish what it begins with; the rest travels with that. Raises: PublishError."""
        return self.app.publish_composition(self, *arguments(self.task, args, kwargs), options)

    async def aapply_async(
        self, args: Iterable[object] | None = None, kwargs: Keywords | None = None, **options: object
    ) -> Any:
        """The same without blocking the event loop."""
        return await self.app.apublish_composition(self, *arguments(self.task, args, kwargs), options)

    def apply(self, args: Iterable[object] | None = None, kwargs: Keywords | None = None, **options: object) -> Any:
        """Run all of it here, one part after the other."""
        return self.app.run_composition(self, *arguments(self.task, args, kwargs), options)

    def delay(self, *args: object, **kwargs: object) -> Any:
        """Publish with more arguments."""
        return self.apply_async(args, kwargs)

    async def adelay(self, *args: object, **kwargs: object) -> Any:
        """`await` the publish."""
        return await self.aapply_async(args, kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Publish, as Celery's compositions do when they are called."""
        return self.apply_async(args, kwargs)

    def __iter__(self) -> Iterator[Any]:
        return dict.__iter__(self)

    def __len__(self) -> int:
        return len(self.kwargs["tasks"])

    def __bool__(self) -> bool:
        return True


class chain(Composition):
    """Each task gets the result of the one before as its first argument; the last one's result is the chain's."""

    def __init__(self, *tasks: Any, app: Application | None = None, **options: object) -> None:
        steps: list[Signature] = []
        for task in _flattened(tasks):
            _append(steps, as_signature(task, app))
        super().__init__(CHAIN, (), {"tasks": steps}, options, subtask_type="chain", app=app)

    def clone(
        self, args: Iterable[object] | None = None, kwargs: Keywords | None = None, **options: object
    ) -> Signature:
        """A copy whose first step has the arguments put in front."""
        cloned = super().clone(None, None, **options)
        steps = [step.clone() for step in self.tasks]
        if steps and (args or kwargs):
            steps[0] = steps[0].clone(args, kwargs)
        cloned["kwargs"] = {"tasks": steps}
        return cloned

    def stamp(self, visitor: StampingVisitor | None = None, append_stamps: bool = False, **headers: object) -> Any:
        """Stamp the steps and callbacks."""
        visited = visitor.on_chain_start(self, **headers) if visitor is not None else None
        headers = self._stamp_tasks(visitor, append_stamps, headers, visited)
        if visitor is not None:
            visitor.on_chain_end(self, **headers)
        return self

    def unchain_tasks(self) -> list[Signature]:
        """Copies of the steps, with the chain's own options where they belong: callbacks and what says where its result
        goes on the last, errbacks on each, the others on the first."""
        steps = [step.clone() for step in self.tasks]
        if not steps:
            return steps
        for callback in listed(self.options.get("link")):
            steps[-1].link(callback)
        for errback in listed(self.options.get("link_error")):
            for step in steps:
                step.link_error(errback)
        elsewhere = {"link", "link_error", "parent_id", "root_id", *_OF_THE_END}
        steps[0].set(**{key: value for key, value in self.options.items() if key not in elsewhere})
        for key in _OF_THE_END & self.options.keys():
            steps[-1].options.setdefault(key, self.options[key])
        return steps

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.tasks)) or "chain()"


class group(Composition):
    """Tasks that run side by side; all are published in one pipelined burst."""

    def __init__(self, *tasks: Any, app: Application | None = None, **options: object) -> None:
        members = [as_signature(task, app) for task in _flattened(tasks)]
        super().__init__(GROUP, (), {"tasks": members}, options, subtask_type="group", app=app)

    def clone(
        self, args: Iterable[object] | None = None, kwargs: Keywords | None = None, **options: object
    ) -> Signature:
        """A copy whose members have the arguments put in front."""
        cloned = super().clone(None, None, **options)
        cloned["kwargs"] = {"tasks": [member.clone(args, kwargs) for member in self.tasks]}
        return cloned

    def set_immutable(self, immutable: bool) -> None:
        """Whether the members leave a parent's result out."""
        self._change_tasks(lambda member: member.set_immutable(immutable))

    def link(self, callback: Signature) -> Signature:
        """Publish `callback`, without a result, when the first member succeeded (Celery's rule: for all of them use a chord)."""
        members = self.tasks
        members[0].link(as_signature(callback).clone().set(immutable=True))
        self.tasks = members
        return callback

    def link_error(self, errback: Signature) -> Signature:
        """Publish `errback` for each member that failed."""
        self._change_tasks(lambda member: member.link_error(as_signature(errback).clone()))
        return errback

    def stamp(self, visitor: StampingVisitor | None = None, append_stamps: bool = False, **headers: object) -> Any:
        """Stamp the members and callbacks."""
        visited = visitor.on_group_start(self, **headers) if visitor is not None else None
        headers = self._stamp_tasks(visitor, append_stamps, headers, visited)
        if visitor is not None:
            visitor.on_group_end(self, **headers)
        return self

    def skew(self, start: float = 1.0, stop: float | None = None, step: float = 1.0) -> group:
        """Give the members countdowns, `step` seconds apart."""
        members = self.tasks
        for position, member in enumerate(members):
            countdown = start + position * step
            member.set(countdown=countdown if stop is None else min(countdown, stop))
        self.tasks = members
        return self

    def __bool__(self) -> bool:
        return len(self) > 0

    def __repr__(self) -> str:
        return f"group({', '.join(map(repr, self.tasks))})"


class chord(Composition):
    """A group, and a body that is published with the list of its results once all have succeeded.

    When a member of the header fails, the body's result is a FAILURE with ChordError, and its errbacks are called.
    `chord(header)(body)` publishes it as `chord(header, body).apply_async()` does.
    """

    def __init__(self, header: Any, body: Any = None, *, app: Application | None = None, **options: object) -> None:
        kwargs: KeywordDict = {"kwargs": {}, "header": _members(header, app), "body": _body(body, app)}
        super().__init__(CHORD, (), kwargs, options, subtask_type="chord", app=app)

    @property
    def tasks(self) -> list[Signature]:
        """The header's members."""
        return [as_signature(member, self.bound_app) for member in self.kwargs["header"]]

    @tasks.setter
    def tasks(self, parts: Iterable[Any]) -> None:
        self.kwargs["header"] = _members(parts, self.bound_app)

    @property
    def body(self) -> Signature | None:
        """What is published with the header's results."""
        return _body(self.kwargs.get("body"), self.bound_app)

    @body.setter
    def body(self, body: Any) -> None:
        self.kwargs["body"] = _body(body, self.bound_app)

    def _parts(self) -> list[Signature]:
        body = self.body
        return self.tasks if body is None else [*self.tasks, body]

    def clone(
        self, args: Iterable[object] | None = None, kwargs: Keywords | None = None, **options: object
    ) -> Signature:
        """A copy whose header's members have the arguments put in front."""
        extra_kwargs = dict(kwargs or {})
        given = _body(extra_kwargs.pop("body", None), self.bound_app)
        body = self.body if given is None else given
        cloned = super().clone(None, None, **options)
        if self.immutable:
            args, extra_kwargs = (), {}
        cloned["kwargs"] = {
            "kwargs": {},
            "header": [
                member.clone(args, {**(self.kwargs.get("kwargs") or {}), **extra_kwargs}) for member in self.tasks
            ],
            "body": None if body is None else body.clone(),
        }
        return cloned

    def set_immutable(self, immutable: bool) -> None:
        """Whether the header's members leave a parent's result out."""
        self._change_tasks(lambda member: member.set_immutable(immutable))

    def link(self, callback: Signature) -> Signature:
        """Publish `callback` with the body's result."""
        body = self._with_body()
        body.link(callback)
        self.body = body
        return callback

    def link_error(self, errback: Signature) -> Signature:
        """Publish `errback` when the body failed, or could not run because a member of the header failed.

        With `task_allow_error_cb_on_chord_header` also for each member of the header that failed.
        """
        if self.app.conf.task_allow_error_cb_on_chord_header:
            self._change_tasks(lambda member: member.link_error(as_signature(errback).clone()))
        body = self._with_body()
        body.link_error(errback)
        self.body = body
        return errback

    def stamp(self, visitor: StampingVisitor | None = None, append_stamps: bool = False, **headers: object) -> Any:
        """Stamp the header's members, the body and callbacks."""
        visited = visitor.on_chord_header_start(self, **headers) if visitor is not None else None
        headers = self._stamp_tasks(visitor, append_stamps, headers, visited)
        if visitor is not None:
            visitor.on_chord_header_end(self, **headers)
        body = self.body
        if body is not None:
            visited = visitor.on_chord_body(self, **headers) if visitor is not None else None
            self.body = body.stamp(visitor, append_stamps, **gathered(headers, visited, {}, append=append_stamps))
        return self

    def _with_body(self) -> Signature:
        body = self.body
        if body is None:
            raise ConfigurationError(f"a chord needs a body before it can have callbacks: {self!r}")
        return body

    def __call__(self, body: Any = None, *args: object, **options: object) -> Any:
        """Publish; with `body` if it has none yet."""
        return self.apply_async(args, {"body": body} if body is not None else None, **options)

    def __len__(self) -> int:
        return len(self.kwargs["header"])

    def __repr__(self) -> str:
        return f"{self.body!r}([{', '.join(map(repr, self.tasks))}])" if self.body is not None else "chord(…)"


class chunks(Signature):
    """Calls with many arguments, cut into tasks of `n` calls each."""

    def __init__(
        self, task: Any, it: Iterable[object], n: int, *, app: Application | None = None, **options: object
    ) -> None:
        if n < 1:
            raise WrongValue(f"chunks of {n} calls: each task takes at least one")
        kwargs = {"task": as_signature(task, app), "it": list(it), "n": n}
        super().__init__(CHUNKS, (), kwargs, options, subtask_type="chunks", immutable=True, app=app)

    def group(self) -> group:
        """The same as a group of `starmap`."""
        task, items, size = self.kwargs["task"], iter(self.kwargs["it"]), self.kwargs["n"]
        parts: list[Signature] = []
        while part := list(islice(items, size)):
            parts.append(xstarmap(task, part, app=self.bound_app, **self.options))
        return group(parts, app=self.bound_app)

    def apply_async(  # type: ignore[override]
        self, args: Iterable[object] | None = None, kwargs: Keywords | None = None, **options: Any
    ) -> GroupResult:
        """Publish the chunks. Raises: PublishError."""
        result: GroupResult = self.group().apply_async(**options)
        return result

    def apply(self, args: Iterable[object] | None = None, kwargs: Keywords | None = None, **options: Any) -> Any:
        """Run the chunks here."""
        return self.group().apply(**options)

    def __call__(self, *args: Any, **options: Any) -> GroupResult:
        """Publish the chunks."""
        return self.apply_async(**options)


class _Mapped(Signature):
    """One task that calls another for each item of a list."""

    name_of_task = ""
    mapped_type = ""

    def __init__(self, task: Any, it: Iterable[object], *, app: Application | None = None, **options: object) -> None:
        inner = as_signature(task, app)
        super().__init__(
            self.name_of_task,
            (),
            {"task": inner, "it": list(it)},
            options,
            subtask_type=self.mapped_type,
            immutable=True,
            app=app or inner.bound_app,
        )

    def apply_async(
        self, args: Iterable[object] | None = None, kwargs: Keywords | None = None, **options: object
    ) -> UntypedResult:
        """Publish, to where the inner task goes."""
        return self.app.publish_signature(routed(self.clone(None, None, **options)))

    def __repr__(self) -> str:
        star = "*" if self.mapped_type == "xstarmap" else ""
        return f"[{self.kwargs['task']['task']}({star}x) for x in {str(self.kwargs['it'])[:100]}]"


class xmap(_Mapped):
    """`task(item)` for each item, in one task; its result is the list of results."""

    name_of_task, mapped_type = MAP, "xmap"


class xstarmap(_Mapped):
    """`task(*item)` for each item, in one task."""

    name_of_task, mapped_type = STARMAP, "xstarmap"


def routed(call: Signature) -> Signature:
    """Give a map the route of the task that it calls, not that of `celery.map`."""
    options = call.options
    if call.task in (MAP, STARMAP) and not options.keys() & {"queue", "exchange", "routing_key"}:
        inner = call.kwargs["task"]
        route = call.app.router.route(inner["task"], (), {}, {}, call.app.tasks.get(inner["task"]))
        return call.set(exchange=route.exchange, routing_key=route.routing_key)
    return call


# -- putting together


def _flattened(tasks: tuple[object, ...]) -> Iterable[object]:
    """`group(a, b)`, `group([a, b])` and `group(generator)` mean the same."""
    if len(tasks) == 1 and not isinstance(tasks[0], Mapping) and isinstance(tasks[0], Iterable):
        return tasks[0]
    return tasks


def _members(header: Any, app: Application | None) -> list[Signature]:
    """The header of a chord: a list, a group, a chain (its steps) or one signature; dictionaries that came over the wire too."""
    if isinstance(header, Iterable) and not isinstance(header, Mapping):
        return [as_signature(member, app) for member in header]
    sig = as_signature(header, app)
    return sig.tasks if isinstance(sig, (group, chain)) else [sig]


def _body(body: Any, app: Application | None) -> Signature | None:
    return None if body is None else as_signature(body, app)


def _is_nothing(sig: Signature) -> bool:
    """An empty chain or group, or one of only such a one: no task gets a result from it (a group of two gives a list)."""
    return isinstance(sig, (chain, group)) and len(sig) < 2 and all(map(_is_nothing, sig.tasks))


def _append(steps: list[Signature], other: Signature) -> None:
    """Append a step to a chain's steps and keep them in normal form."""
    if isinstance(other, chain):
        for step in other.unchain_tasks():
            _append(steps, step)
        return
    if isinstance(other, group):
        if not len(other) and steps:
            return  # nothing runs, nothing changes
        if len(other) == 1 and steps:
            _append(steps, other.tasks[0])
            return
    last = steps[-1] if steps else None
    if last is not None and _is_nothing(last):
        steps[-1] = other
    elif isinstance(last, group):
        steps[-1] = chord(last, other, app=last.bound_app)
    elif isinstance(last, chord) and last.body is not None:
        longer = last.clone()
        assert isinstance(longer, chord)
        longer.body = piped(longer.body, other)
        steps[-1] = longer
    else:
        steps.append(other)


def piped(left: object, right: object) -> Any:
    """`left | right`."""
    try:
        first, second = as_signature(left), as_signature(right)
    except TypeError:
        return NotImplemented
    if isinstance(second, (group, chain)) and not len(second):
        return first
    if isinstance(first, group):
        return chord(first, second, app=first.bound_app)
    if isinstance(first, chord):
        steps: list[Signature] = [first]
        _append(steps, second)
        return steps[0] if len(steps) == 1 else chain(steps, app=first.bound_app)
    return chain([first, second], app=first.bound_app)


# -- from data

_KINDS: dict[str, Callable[[dict[str, Any], Application | None], Signature]] = {
    CHAIN: lambda kwargs, app: chain(list(kwargs["tasks"]), app=app),
    GROUP: lambda kwargs, app: group(_rebuilt_members(kwargs["tasks"]), app=app),
    CHORD: lambda kwargs, app: chord(kwargs["header"], kwargs.get("body"), app=app),
    CHUNKS: lambda kwargs, app: chunks(kwargs["task"], kwargs["it"], kwargs["n"], app=app),
    MAP: lambda kwargs, app: xmap(kwargs["task"], kwargs["it"], app=app),
    STARMAP: lambda kwargs, app: xstarmap(kwargs["task"], kwargs["it"], app=app),
}


def _rebuilt_members(header: Any) -> list[object]:
    # Celery writes the members of a group in a chord's header as one more group.
    if isinstance(header, Mapping):
        return list(header["kwargs"]["tasks"]) if header.get("task") == GROUP else [header]
    return list(header)


def from_dict(fields: SignatureFields, app: Application | None = None) -> Signature:
    """The chain, group, chord … or plain signature that a dictionary describes, ours or Celery's."""
    if _is_made(fields):
        return fields
    make = _KINDS.get(fields["task"])
    if make is None:
        return Signature(fields, app=app)
    sig = make(dict(fields.get("kwargs") or {}), app)
    sig["options"] = dict(fields.get("options") or {})
    if fields["task"] == CHORD:
        sig["args"] = tuple(fields.get("args") or ())
        sig["kwargs"]["kwargs"] = dict((fields.get("kwargs") or {}).get("kwargs") or {})
    sig["immutable"] = bool(fields.get("immutable"))
    return sig


def as_signature(sig: Any, app: Application | None = None) -> Signature:
    """The signature of a dictionary that came over the wire, or the one that it is already; of a task, `task.s()`.

    Raises: TypeError for something else.
    """
    # Compositions ask this of each of their parts, again and again.
    return sig if _is_made(sig) else from_dict(signature_of(sig), app)


def _is_made(sig: object) -> TypeGuard[Signature]:
    """Whether it is of the class that its data say."""
    return isinstance(sig, Signature) and (sig.__class__ is not Signature or sig["task"] not in _KINDS)


@overload
def maybe_signature(d: None, app: Application | None = None, clone: bool = False) -> None: ...


@overload
def maybe_signature(
    d: SignatureFields | Callable[..., Any], app: Application | None = None, clone: bool = False
) -> Signature: ...


def maybe_signature(d: Any, app: Application | None = None, clone: bool = False) -> Signature | None:
    """The signature of a dictionary or a task, a signature itself (with `clone` a copy), and None for None: as in Celery.

    Raises: TypeError for something else.
    """
    if d is None:
        return None
    sig = as_signature(d, app)
    return sig.clone() if clone else sig


def signature(
    task: Any,
    args: Iterable[Any] | None = None,
    kwargs: Keywords | None = None,
    *,
    app: Application | None = None,
    immutable: bool = False,
    **options: Any,
) -> Signature:
    """A signature of a task, a name, or a dictionary that came over the wire."""
    if isinstance(task, Mapping):
        return from_dict(task, app).clone(args, kwargs, **options)
    bound_app = app or getattr(task, "app", None)
    return Signature(getattr(task, "name", task), args, kwargs, options, immutable=immutable, app=bound_app)


Signature.piped = staticmethod(piped)
Signature.from_dict = staticmethod(from_dict)

__getattr__ = others_names(__name__)
