"""chain and group: several calls as one signature (Celery's canvas; celery-facts 1.4 has the shapes)."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from amqtask.exceptions import ConfigurationError
from amqtask.signature import Signature, maybe_signature

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.result import AsyncResult, GroupResult

CHAIN, GROUP = "celery.chain", "celery.group"


class chain(Signature):
    """Each task gets the result of the one before as its first argument; the last one's result is the chain's."""

    def __init__(self, *tasks: Any, app: AmqTask | None = None, **options: Any) -> None:
        if len(tasks) == 1 and not isinstance(tasks[0], Mapping) and isinstance(tasks[0], Iterable):
            tasks = tuple(tasks[0])
        steps = [step for task in tasks for step in _steps(maybe_signature(task, app))]
        if not steps:
            raise ConfigurationError("a chain needs at least one task")
        super().__init__(CHAIN, (), {"tasks": steps}, options, subtask_type="chain", app=app or steps[0]._app)

    @property
    def tasks(self) -> list[Signature]:
        """The steps."""
        return [maybe_signature(step, self._app) for step in self.kwargs["tasks"]]

    def clone(
        self, args: Iterable[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> Signature:
        """A copy whose first step has the arguments put in front."""
        cloned = super().clone(None, None, **options)
        steps = [step.clone() for step in self.tasks]
        steps[0] = steps[0].clone(args, kwargs)
        cloned["kwargs"] = {"tasks": steps}
        return cloned

    def apply_async(
        self, args: Iterable[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> AsyncResult[Any]:
        """Publish the first step, which carries the others."""
        return self.app.publish_chain(self.clone(args, kwargs, **options))

    async def aapply_async(
        self, args: Iterable[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> AsyncResult[Any]:
        """The same without blocking the event loop."""
        return await self.app.apublish_chain(self.clone(args, kwargs, **options))

    def apply(self, args: Iterable[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Any) -> Any:
        """Run the steps here, one after the other; the last one's result."""
        result: Any = None
        for position, step in enumerate(self.tasks):
            arguments = tuple(args or ()) if position == 0 else (result.get(),)
            result = step.apply(arguments, kwargs if position == 0 else None, **options)
        return result

    def __or__(self, other: Any) -> chain:  # type: ignore[override]
        return chain(*self.tasks, *_steps(maybe_signature(other)), app=self._app)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Publish, as Celery's chains do when they are called."""
        return self.apply_async(args, kwargs)

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.tasks))


class group(Signature):
    """Tasks that run side by side; all are published in one pipelined burst."""

    def __init__(self, *tasks: Any, app: AmqTask | None = None, **options: Any) -> None:
        if len(tasks) == 1 and not isinstance(tasks[0], Mapping) and isinstance(tasks[0], Iterable):
            tasks = tuple(tasks[0])
        members = [maybe_signature(task, app) for task in tasks]
        found = app or next((member._app for member in members if member._app), None)
        super().__init__(GROUP, (), {"tasks": members}, options, subtask_type="group", app=found)

    @property
    def tasks(self) -> list[Signature]:
        """The members."""
        return [maybe_signature(member, self._app) for member in self.kwargs["tasks"]]

    def clone(
        self, args: Iterable[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> Signature:
        """A copy whose members have the arguments put in front."""
        cloned = super().clone(None, None, **options)
        cloned["kwargs"] = {"tasks": [member.clone(args, kwargs) for member in self.tasks]}
        return cloned

    def apply_async(  # type: ignore[override]
        self, args: Iterable[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> GroupResult:
        """Publish all members. Raises: PublishError for the first that was not stored."""
        return self.app.publish_group(self.clone(args, kwargs, **options))

    async def aapply_async(  # type: ignore[override]
        self, args: Iterable[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> GroupResult:
        """The same without blocking the event loop."""
        return await self.app.apublish_group(self.clone(args, kwargs, **options))

    def delay(self, *args: Any, **kwargs: Any) -> GroupResult:  # type: ignore[override]
        """Publish with more arguments."""
        return self.apply_async(args, kwargs)

    def apply(self, args: Iterable[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Any) -> Any:
        """Run the members here; their results."""
        return self.app.group_result(
            str(uuid.uuid4()), [member.apply(args, kwargs, **options) for member in self.tasks]
        )

    def skew(self, start: float = 1.0, stop: float | None = None, step: float = 1.0) -> group:
        """Give the members countdowns, `step` seconds apart."""
        for position, member in enumerate(self.tasks):
            countdown = start + position * step
            member.set(countdown=countdown if stop is None else min(countdown, stop))
        return self

    def __or__(self, other: Any) -> Any:
        raise ConfigurationError("a group with a callback is a chord, and chords are not available in this version")

    def __call__(self, *args: Any, **kwargs: Any) -> GroupResult:
        """Publish, as Celery's groups do when they are called."""
        return self.apply_async(args, kwargs)

    def __iter__(self) -> Iterator[Any]:
        return dict.__iter__(self)

    def __len__(self) -> int:
        return len(self.kwargs["tasks"])

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"group({', '.join(map(repr, self.tasks))})"


def _steps(signature: Signature) -> list[Signature]:
    """The steps of a chain, or the one that a plain signature is."""
    if signature.task == CHAIN:
        return [maybe_signature(step, signature._app) for step in signature["kwargs"]["tasks"]]
    if signature.task == GROUP:
        raise ConfigurationError("a group inside a chain is a chord, and chords are not available in this version")
    return [signature]


def signature(
    task: Any,
    args: Iterable[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    app: AmqTask | None = None,
    immutable: bool = False,
    **options: Any,
) -> Signature:
    """A signature of a task, a name, or a dictionary that came over the wire."""
    if isinstance(task, Mapping):
        return from_dict(task, app).clone(args, kwargs, **options)
    found = app or getattr(task, "app", None)
    return Signature(getattr(task, "name", task), args, kwargs, options, immutable=immutable, app=found)


def from_dict(found: Mapping[str, Any], app: AmqTask | None = None) -> Signature:
    """The chain, group or plain signature that a dictionary describes."""
    if isinstance(found, Signature) and type(found) is not Signature:
        return found
    if found["task"] == CHAIN:
        return chain(*found["kwargs"]["tasks"], app=app, **(found.get("options") or {}))
    if found["task"] == GROUP:
        return group(*found["kwargs"]["tasks"], app=app, **(found.get("options") or {}))
    return Signature(found, app=app)


Signature.chained = chain
