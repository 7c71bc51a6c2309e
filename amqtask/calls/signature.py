"""Signature: a call as data, dict-shaped as Celery writes it, that can travel and be changed before it is published."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, overload

from amqtask.ground.current import current_app
from amqtask.protocol.option_types import arguments as _arguments
from amqtask.protocol.option_types import of_call, signature_of

if TYPE_CHECKING:
    from amqtask.calls.application import Application
    from amqtask.ground.shapes import Arguments, Keywords, OptionDict, Options, SignatureFields, StampDict, Stamps
    from amqtask.result import UntypedEagerResult, UntypedResult


T = TypeVar("T")
NAMES = "stamped_headers"


# -- stamps: headers that a caller puts on every task of a composition, to find, count or revoke them by (Celery's canvas
# stamping)
#
# `sig.stamp(customer="7")` stamps all tasks of a signature alike; `sig.stamp(visitor)` calls a StampingVisitor for each part.
# Stamps of the composition around a part win over those of the visitor, and both over the part's earlier stamps; with
# `append_stamps` all of them are kept, as a list.


class StampingVisitor(ABC):
    """Chooses the stamps for the parts of a composition. Each method returns stamps by name; with the key `stamped_headers` only
    the names listed there are stamps."""

    @abstractmethod
    def on_signature(self, sig: Any, **headers: object) -> StampDict:
        """For each task."""

    def on_group_start(self, group: Any, **headers: object) -> StampDict:
        """For all members of a group."""
        return {}

    def on_group_end(self, group: Any, **headers: object) -> None:  # noqa: B027 - a hook
        """Its members are stamped."""

    def on_chain_start(self, chain: Any, **headers: object) -> StampDict:
        """For all steps of a chain."""
        return {}

    def on_chain_end(self, chain: Any, **headers: object) -> None:  # noqa: B027 - a hook
        """Its steps are stamped."""

    def on_chord_header_start(self, chord: Any, **headers: object) -> StampDict:
        """For all members of a chord's header; as for a group unless it is overridden."""
        return self.on_group_start(chord, **headers)

    def on_chord_header_end(self, chord: Any, **headers: object) -> None:
        """Its header is stamped."""
        self.on_group_end(chord, **headers)

    def on_chord_body(self, chord: Any, **headers: object) -> StampDict:
        """For a chord's body."""
        return {}

    def on_callback(self, callback: Any, **headers: object) -> StampDict:
        """For a callback (`link`)."""
        return {}

    def on_errback(self, errback: Any, **headers: object) -> StampDict:
        """For an errback (`link_error`)."""
        return {}


def gathered(
    handed_down: Stamps,
    visited: Stamps | None,
    options: Options,
    *,
    append: bool,
) -> StampDict:
    """The stamps of one part, with their names under `stamped_headers`. `options` are its own."""
    stamps = _named(handed_down)
    if visited:
        _add(stamps, _named(visited), append)
    if options.get(NAMES):
        names = list(options[NAMES])
        _add(stamps, {NAMES: names, **{name: options[name] for name in names if name in options}}, append)
    stamps[NAMES] = list(dict.fromkeys(stamps[NAMES]))
    return stamps


def _named(stamps: Stamps) -> StampDict:
    names = list(stamps[NAMES]) if NAMES in stamps else list(stamps)
    return {**stamps, NAMES: names}


def _add(stamps: StampDict, added: Stamps, append: bool) -> None:
    for name, value in added.items():
        current = stamps.get(name)
        if name not in stamps:
            stamps[name] = value
        elif isinstance(current, list) and isinstance(value, list):
            stamps[name] = [*current, *value]
        elif append:
            stamps[name] = [*(current if isinstance(current, (list, tuple)) else [current]), value]


# -- signatures


class _Field(Generic[T]):
    """A field of the dictionary, as an attribute."""

    def __init__(self, key: str, doc: str) -> None:
        self._key = key
        self.__doc__ = doc

    @overload
    def __get__(self, signature: None, owner: type) -> _Field[T]: ...
    @overload
    def __get__(self, signature: Signature, owner: type) -> T: ...
    def __get__(self, signature: Signature | None, owner: type) -> Any:
        return self if signature is None else signature[self._key]

    def __set__(self, signature: Signature, value: T) -> None:
        signature[self._key] = value


class Signature(dict[str, Any]):
    """`task`, `args`, `kwargs`, `options`, `subtask_type`, `immutable`: Celery's canvas dictionary (celery/canvas.py).

    `app` decides where it is published; without one it is the current app.
    """

    # `a | b`, and the signature of any kind that a dictionary describes: set by amqtask.canvas, which stands above this module.
    piped: ClassVar[Any]
    from_dict: ClassVar[Any]

    def __or__(self, other: object) -> Any:
        """This signature, then another: a chain, or a chord where this is a group."""
        return self.piped(self, other)

    def __ror__(self, other: object) -> Any:
        """Another that came over the wire, then this signature."""
        return self.piped(other, self)

    def __ior__(self, other: object) -> Any:
        """`sig |= other`, not a merge of dictionaries."""
        return self.piped(self, other)

    def __init__(
        self,
        task: str | SignatureFields | None = None,
        args: Iterable[object] | None = None,
        kwargs: Keywords | None = None,
        options: Options | None = None,
        *,
        subtask_type: str | None = None,
        immutable: bool = False,
        app: Application | None = None,
        **more_options: object,
    ) -> None:
        # Where it was made for an application; else it belongs to the current one when it is published.
        self.bound_app = app
        if isinstance(task, Mapping):
            super().__init__(task)
            self.setdefault("subtask_type", None)
            self.setdefault("immutable", False)
            return
        name = getattr(task, "name", task)
        arguments, keywords = _arguments(str(name), args, kwargs)
        super().__init__(
            task=name,
            args=arguments,
            kwargs=keywords,
            options={**(options or {}), **more_options},
            subtask_type=subtask_type,
            immutable=immutable,
        )

    def __reduce__(self) -> tuple[object, ...]:
        """Pickled without its application: where it is read it belongs to the current one."""
        return type(self)._unpickled, (dict(self),)

    @classmethod
    def _unpickled(cls, fields: dict[str, object]) -> Signature:
        sig = cls.__new__(cls)
        dict.__init__(sig, fields)
        sig.bound_app = None
        return sig

    def __deepcopy__(self, memo: dict[int, object]) -> Signature:
        copied = self._unpickled({key: copy.deepcopy(value, memo) for key, value in self.items()})
        copied.bound_app = self.bound_app
        return copied

    # -- fields

    task = _Field[str]("task", "The task's name.")
    kwargs = _Field[dict[str, Any]]("kwargs", "Keyword arguments.")
    options = _Field[dict[str, Any]]("options", "Options of `apply_async`.")
    immutable = _Field[bool]("immutable", "Whether a parent's result is not prepended to the arguments.")
    subtask_type = _Field[str | None](
        "subtask_type", "chain, group, chord, chunks, xmap, xstarmap; None for a plain task."
    )

    @property
    def args(self) -> Arguments:
        """Positional arguments."""
        return tuple(self["args"] or ())

    @args.setter
    def args(self, args: Iterable[object]) -> None:
        self["args"] = tuple(args)

    @property
    def id(self) -> str | None:
        """The task id, once it is fixed."""
        return self.options.get("task_id")

    @property
    def parent_id(self) -> str | None:
        """The id of the task that it follows from, if that is fixed."""
        return self.options.get("parent_id")

    @property
    def root_id(self) -> str | None:
        """The id of the first task of all that belong together, if that is fixed."""
        return self.options.get("root_id")

    @property
    def name(self) -> str:
        """The same as `task`."""
        return self.task

    @property
    def type(self) -> Any:
        """The task itself. Raises: NotRegistered."""
        app = self.app
        app.finalize()  # shared tasks are registered by that
        return app.tasks[self.task]

    @property
    def app(self) -> Application:
        """The application that publishes it."""
        app: Application = self.bound_app or current_app()
        return app

    # -- changing

    def clone(
        self, args: Iterable[object] | None = None, kwargs: Keywords | None = None, **options: object
    ) -> Signature:
        """A copy with arguments put in front and options added; an immutable one takes only options."""
        cloned = type(self).__new__(type(self))
        dict.__init__(cloned, self)
        cloned.bound_app = self.bound_app
        if not self.immutable:
            arguments, keywords = _arguments(self.task, args, kwargs)
            cloned["args"] = arguments + self.args
            cloned["kwargs"] = {**self.kwargs, **keywords}
        # Links are added in place; the copy's are its own.
        lists = {key: list(value) for key, value in self.options.items() if isinstance(value, list)}
        cloned["options"] = {**self.options, **lists, **self._changeable(options)}
        return cloned

    def _changeable(self, options: OptionDict) -> OptionDict:
        """A member stays in its group, and a stamp stays as it was put (Celery's rule)."""
        if not options:
            return options
        fixed = self.options.keys() & {"group_id", "stamped_headers", *(self.options.get("stamped_headers") or ())}
        return {key: value for key, value in options.items() if key not in fixed} if fixed else options

    partial = clone

    def set(self, immutable: bool | None = None, **options: object) -> Signature:
        """Add options, in place. Raises: WrongValue for one that cannot have its value."""
        used = of_call(self.task, options)
        if immutable is not None:
            self["immutable"] = immutable
        self["options"] = {**self.options, **used}
        return self

    def set_immutable(self, immutable: bool) -> None:
        """Whether a parent's result is left out."""
        self["immutable"] = immutable

    def replace(
        self,
        args: Iterable[object] | None = None,
        kwargs: Keywords | None = None,
        options: Options | None = None,
    ) -> Signature:
        """A copy with other arguments or options in place of its own; None leaves them."""
        cloned = self.clone()
        if args is not None:
            cloned["args"] = tuple(args)
        if kwargs is not None:
            cloned["kwargs"] = dict(kwargs)
        if options is not None:
            cloned["options"] = dict(options)
        return cloned

    def freeze(
        self,
        _id: str | None = None,
        group_id: str | None = None,
        chord: Any = None,
        root_id: str | None = None,
        parent_id: str | None = None,
        group_index: int | None = None,
    ) -> Any:
        """Fix the task's id (and those of a composition's parts) before it is published; returns the result that it will have.

        Publishing it later keeps the ids; publishing it twice makes two messages with one id.
        """
        ids = {"group_id": group_id, "chord": chord, "root_id": root_id, "parent_id": parent_id}
        return self.app.freeze(self, task_id=_id, group_index=group_index, **ids)

    def append_to_list_option(self, key: str, value: object) -> Any:
        """Add to an option that is a list, unless it is there; returns `value`."""
        current = self.options.get(key)
        values = [] if current is None else list(current) if isinstance(current, (list, tuple)) else [current]
        if value not in values:
            values.append(value)
        self.options[key] = values
        return value

    def extend_list_option(self, key: str, values: object) -> None:
        """Add several (or one)."""
        for value in values if isinstance(values, (list, tuple)) else [values]:
            self.append_to_list_option(key, value)

    def link(self, callback: Signature) -> Signature:
        """Publish `callback` with the result when this succeeded; returns `callback`."""
        self.append_to_list_option("link", signature_of(callback))
        return callback

    def link_error(self, errback: Signature) -> Signature:
        """Publish `errback` when this failed; returns `errback`."""
        self.append_to_list_option("link_error", signature_of(errback))
        return errback

    def on_error(self, errback: Signature) -> Signature:
        """`link_error` that returns this signature."""
        self.link_error(errback)
        return self

    def stamp(self, visitor: StampingVisitor | None = None, append_stamps: bool = False, **headers: object) -> Any:
        """Put stamps on this task and its callbacks: those given by name, and those that a visitor says; returns it."""
        self.stamp_links(visitor, append_stamps, **headers)
        visited = visitor.on_signature(self, **headers) if visitor is not None else None
        return self.set(**gathered(headers, visited, self.options, append=append_stamps))

    def stamp_links(self, visitor: StampingVisitor | None, append_stamps: bool = False, **headers: object) -> None:
        """Stamp the callbacks and errbacks."""
        for key in ("link", "link_error"):
            stamped = []
            for link in listed(self.options.get(key)):
                callback = link if isinstance(link, Signature) else Signature(link, app=self.bound_app)
                visited = None
                if visitor is not None:
                    ask = visitor.on_callback if key == "link" else visitor.on_errback
                    visited = ask(callback, **headers)
                callback.stamp(visitor, append_stamps, **gathered(headers, visited, {}, append=append_stamps))
                stamped.append(callback)
            if stamped:
                self.options[key] = stamped

    def flatten_links(self) -> list[Any]:
        """This signature, its callbacks, their callbacks, and so on."""
        signatures: list[object] = [self]
        for callback in self.options.get("link") or ():
            signatures += Signature.flatten_links(callback) if isinstance(callback, Signature) else [callback]
        return signatures

    def reprcall(self, *args: object, **kwargs: object) -> str:
        """How the call would look in Python."""
        return Signature.__repr__(self.clone(args, kwargs))

    def __invert__(self) -> Any:
        """`~sig`: publish and wait for the result."""
        return self.apply_async().get()

    # -- publishing

    def delay(self, *args: object, **kwargs: object) -> UntypedResult:
        """Publish with more arguments."""
        return self.apply_async(args, kwargs)

    def apply_async(
        self, args: Iterable[object] | None = None, kwargs: Keywords | None = None, **options: object
    ) -> UntypedResult:
        """Publish; the result of the task. Raises: PublishError."""
        return self.app.publish_signature(self.clone(args, kwargs, **options))

    async def aapply_async(
        self, args: Iterable[object] | None = None, kwargs: Keywords | None = None, **options: object
    ) -> UntypedResult:
        """The same without blocking the event loop."""
        return await self.app.apublish_signature(self.clone(args, kwargs, **options))

    async def adelay(self, *args: object, **kwargs: object) -> UntypedResult:
        """`await` the publish."""
        return await self.aapply_async(args, kwargs)

    def apply(
        self, args: Iterable[object] | None = None, kwargs: Keywords | None = None, **options: object
    ) -> UntypedEagerResult:
        """Run the task here and now."""
        signature = self.clone(args, kwargs, **options)
        result: UntypedEagerResult = self.type.apply(signature.args, signature.kwargs, **signature.options)
        return result

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function itself."""
        signature = self.clone(args, kwargs)
        return self.type(*signature.args, **signature.kwargs)

    def __repr__(self) -> str:
        parts = [repr(value) for value in self.args] + [f"{key}={value!r}" for key, value in self.kwargs.items()]
        return f"{self.task}({', '.join(parts)})"


def listed(callbacks: object) -> list[Any]:
    """The callbacks of an option that may be one, several or none."""
    if not callbacks:
        return []
    return list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks]
