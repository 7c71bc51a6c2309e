"""The tasks that every worker has, under the names that Celery's messages use (celery/app/builtins.py), and one of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from amqtask.canvas import ACCUMULATE, CHAIN, CHORD, CHUNKS, GROUP, MAP, STARMAP, chord, chunks, maybe_signature
from amqtask.exceptions import ConfigurationError
from amqtask.execution.context import Context
from amqtask.protocol.result import exception_from_dict

if TYPE_CHECKING:
    from amqtask.calls.application import Application
    from amqtask.ground.shapes import Arguments, JsonFields, SignatureFields

ERRBACK = "amqtask.errback"


def _map(app: Application) -> None:
    @app.task(name=MAP, shared=False)
    def run_map(task: SignatureFields, it: list[object]) -> object:
        return _each(app, task, [(item,) for item in it])


def _starmap(app: Application) -> None:
    @app.task(name=STARMAP, shared=False)
    def run_starmap(task: SignatureFields, it: list[Arguments]) -> object:
        return _each(app, task, [tuple(item) for item in it])


def _each(app: Application, task: SignatureFields, calls: list[Arguments]) -> object:
    call = maybe_signature(task, app)
    function = app.tasks[call.task]
    arguments = [((*leading, *call.args), call.kwargs) for leading in calls]
    if function.is_async:

        async def one_after_the_other() -> list[object]:
            return [await function(*args, **kwargs) for args, kwargs in arguments]

        return one_after_the_other()
    return [function(*args, **kwargs) for args, kwargs in arguments]


def _accumulate(app: Application) -> None:
    @app.task(name=ACCUMULATE, shared=False)
    def accumulate(*args: object, index: int | None = None, **kwargs: object) -> object:
        """All of its arguments, or one: what makes one task of a group's results."""
        return list(args) if index is None else args[index]


def _chunks(app: Application) -> None:
    @app.task(name=CHUNKS, shared=False)
    def run_chunks(task: SignatureFields, it: list[object], n: int) -> object:
        return chunks(task, it, n, app=app).apply_async().as_tuple()


def _group(app: Application) -> None:
    @app.task(name=GROUP, bind=True, shared=False)
    def run_group(
        self: object, /, tasks: Any, result: object = None, group_id: object = None, partial_args: Any = ()
    ) -> object:
        from_wire = maybe_signature({"task": GROUP, "args": (), "kwargs": {"tasks": list(tasks)}, "options": {}}, app)
        return from_wire.apply_async(tuple(partial_args or ())).as_tuple()


def _chord(app: Application) -> None:
    @app.task(name=CHORD, bind=True, shared=False)
    def run_chord(self: Any, /, header: Any, body: Any, partial_args: Any = (), **options: object) -> object:
        sig = chord(header, body, app=app)
        return self.replace(sig.clone(tuple(partial_args or ())))


def _chain(app: Application) -> None:
    @app.task(name=CHAIN, bind=True, shared=False)
    def run_chain(self: Any, /, *args: Any, tasks: list[object] | None = None, **kwargs: object) -> object:
        if not tasks:
            raise ConfigurationError("a chain travels as the first of its tasks; this message has no tasks in it")
        sig = maybe_signature({"task": CHAIN, "args": (), "kwargs": {"tasks": list(tasks)}, "options": {}}, app)
        return self.replace(sig.clone(args))


def _errback(app: Application) -> None:
    @app.task(name=ERRBACK, ignore_result=True, shared=False)
    def call_errback(errback: SignatureFields, request: JsonFields, error: Mapping[str, object], trace: str) -> None:
        """Calls an errback that takes (request, exc, traceback) for a task that no slot ran to its end."""
        call = maybe_signature(errback, app)
        extra_args = () if call.immutable else (Context(**request), exception_from_dict(error, trace), trace)
        app.tasks[call.task](*extra_args, *call.args, **call.kwargs)


def _backend_cleanup(app: Application) -> None:
    @app.task(name="celery.backend_cleanup", ignore_result=True, shared=False)
    def backend_cleanup() -> None:
        """Delete expired results, where the store does not do so by itself."""
        if app.backend is not None:
            app.backend.cleanup()


BUILTINS: tuple[Callable[[Application], None], ...] = (
    _map, _starmap, _accumulate, _chunks, _group, _chord, _chain, _errback, _backend_cleanup,
)  # fmt: skip
