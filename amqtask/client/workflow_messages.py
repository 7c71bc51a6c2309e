"""Workflows: compositions, callbacks and replacements as the messages that carry them; and the tasks that every worker has for
them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from amqtask import signals
from amqtask.calls.signature import Signature, listed
from amqtask.canvas import ACCUMULATE, CHAIN, CHORD, CHUNKS, GROUP, MAP, STARMAP, as_signature, chord, chunks, routed
from amqtask.client.message_builder import deadline_of, eta_of, tell_composed
from amqtask.client.workflow_ids import Begun, Freezer, Place, Result, begin, bind_bodies, end_of, settle, single
from amqtask.exceptions import ConfigurationError
from amqtask.execution.batches import called_at_once
from amqtask.execution.context import Context, current_context
from amqtask.execution.follow_ups import body_id, call_in_place
from amqtask.execution.request import Request
from amqtask.flow.deadline import HEADER as DEADLINE
from amqtask.flow.deadline import UNBOUND
from amqtask.protocol.chord import CHORD_HEADER, chord_mark, chord_queue, without_chord_keys
from amqtask.protocol.message import Message
from amqtask.protocol.result import exception_as_dict, exception_from_dict
from amqtask.protocol.task import RUN_HEADER
from amqtask.result import AsyncResult

if TYPE_CHECKING:
    from datetime import datetime

    from amqtask.calls.application import Application
    from amqtask.ground.shapes import Arguments, HeaderDict, JsonFields, Keywords, Options, SignatureFields
    from amqtask.result import UntypedResult


ERRBACK = "amqtask.errback"


# -- the tasks that every worker has, under the names that Celery's messages use (celery/app/builtins.py), and one of ours


def _map(app: Application) -> None:
    @app.task(name=MAP, shared=False)
    def run_map(task: SignatureFields, it: list[object]) -> object:
        return _each(app, task, [(item,) for item in it])


def _starmap(app: Application) -> None:
    @app.task(name=STARMAP, shared=False)
    def run_starmap(task: SignatureFields, it: list[Arguments]) -> object:
        return _each(app, task, [tuple(item) for item in it])


def _each(app: Application, task: SignatureFields, calls: list[Arguments]) -> object:
    call = as_signature(task, app)
    function = app.tasks[call.task]
    arguments = [((*leading, *call.args), call.kwargs) for leading in calls]
    if function.batch is not None:
        return called_at_once(function, arguments)
    if function.inbox and not function.is_async:
        # Each has a transaction and an id, the same one when this comes again.
        parent = current_context()
        prefix = None if parent is None else parent.id
        return [
            function.apply(args, kwargs, task_id=prefix and f"{prefix}:{index}", throw=True).result
            for index, (args, kwargs) in enumerate(arguments)
        ]
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
        from_wire = as_signature({"task": GROUP, "args": (), "kwargs": {"tasks": list(tasks)}, "options": {}}, app)
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
        sig = as_signature({"task": CHAIN, "args": (), "kwargs": {"tasks": list(tasks)}, "options": {}}, app)
        return self.replace(sig.clone(args))


def _errback(app: Application) -> None:
    @app.task(name=ERRBACK, ignore_result=True, shared=False)
    def call_errback(errback: SignatureFields, request: JsonFields, error: Mapping[str, object], trace: str) -> None:
        """Calls an errback that takes (request, exc, traceback) for a task that no slot ran to its end."""
        call = as_signature(errback, app)
        extra_args = () if call.immutable else (Context(**request), exception_from_dict(error, trace), trace)
        call_in_place(app.tasks[call.task], (*extra_args, *call.args), call.kwargs)


def _backend_cleanup(app: Application) -> None:
    @app.task(name="celery.backend_cleanup", ignore_result=True, shared=False)
    def backend_cleanup() -> None:
        """Delete expired results, where the store does not do so by itself, and expired rows of the inbox."""
        if app.backend is not None:
            app.backend.cleanup()
        inbox = app.make_inbox_runs(app.tasks)
        if inbox is not None:
            inbox.cleanup(app.conf.inbox_expires)


BUILTINS: tuple[Callable[[Application], None], ...] = (
    _map, _starmap, _accumulate, _chunks, _group, _chord, _chain, _errback, _backend_cleanup,
)  # fmt: skip


# -- messages


class Workflows:
    """Composes an application's workflows; its executors compose follow-ups with it (amqtask.execution.contract.Composer)."""

    def __init__(self, app: Application) -> None:
        self._app = app

    # -- what a caller publishes

    def prepared(
        self, composition: Any, args: Sequence[object], kwargs: Keywords, options: Options
    ) -> tuple[Begun, Result]:
        """The calls that a composition begins with, and its result. Raises: ConfigurationError."""
        sig, result = self.frozen(composition.clone(args, kwargs) if args or kwargs else composition, options)
        return self._begun(sig), result

    def _begun(self, sig: Signature, args: Arguments = (), continuation: list[SignatureFields] | None = None) -> Begun:
        return begin(sig, args, continuation=continuation, says_size=self._app.chord_store is None)

    def frozen(self, composition: Any, options: Options) -> tuple[Signature, Result]:
        """A settled copy with all its ids, and its result."""
        options = dict(options)
        if options.get("deadline") is not None:  # the same moment for all, whenever they are published
            zone = self._app.timezone
            eta = eta_of(options.get("eta"), options.get("countdown"), lambda: zone)
            options["deadline"] = deadline_of(options["deadline"], eta, lambda: zone).isoformat()
        task_id, root_id, parent_id = (options.pop(key, None) for key in ("task_id", "root_id", "parent_id"))
        membership = {key: options.pop(key, None) for key in ("group_id", "group_index", "chord")}
        sig = settle(composition, options)
        running = current_context()
        if running is not None and running.id is not None:
            root_id, parent_id = root_id or running.root_id or running.id, parent_id or running.id
            bind_bodies(sig, running)
        result = self._freezer().freeze(sig, Place(task_id, membership, root_id, parent_id))
        return sig, result

    def as_member(self, composition: Any, options: Options) -> Signature:
        """`composition` as one member of a chord that runs: its end has the id and the membership that `options` say."""
        member, _ = self.frozen(single(settle(composition)), options)
        if type(member) is type(composition):  # a lazy one may be published by the name that its maker has for it
            composition.clear()
            composition.update(member)
        return member

    def _freezer(self, reply_to: str | None = None, new_id: Callable[[], str] | None = None) -> Freezer:
        app = self._app
        if reply_to is None:
            reply_to = app.backend.reply_to() if app.backend is not None else ""

        def result(task_id: str, name: str, parent: Any) -> UntypedResult:
            return AsyncResult(task_id, app.backend, parent=parent, revoke=app.revoke_call, task_name=name)

        return Freezer(reply_to, result, app.group_result, new_id)

    def messages(self, begun: Begun) -> list[Message]:
        """The messages of calls, with what must exist before the chords that they belong to can be joined.

        Raises: what composing raises, BackendUnreachable (a store that counts chords is told of them here).
        """
        app = self._app
        messages = [app.compose_call(call) for call in begun.calls]
        self.announce(begun, messages)
        return messages

    def announce(self, begun: Begun, messages: Sequence[Message]) -> None:
        """Make sure that the parts of the chords that begin here can be counted."""
        app, store = self._app, self._app.chord_store
        for group_id, size in begun.chords.items():
            if store is not None:
                store.set_chord_size(group_id, size, begun.body_ids[group_id])
                continue
            queue = chord_queue(group_id, begun.tokens.get(group_id, ""), app.conf.result_chord_expires)
            # With each: the async publisher and the relays of an outbox keep no order, and no member may end before it is there.
            for message in messages:
                message.declare = (*message.declare, queue)

    def _composed(self, begun: Begun) -> list[Message]:
        """`messages` in a worker: the caller that published the first task has said where results go."""
        messages = [self._compose_here(call) for call in begun.calls]
        self.announce(begun, messages)
        return messages

    def _compose_here(self, call: Signature) -> Message:
        app = self._app
        task, options = app.tasks.get(call.task), routed(call).options
        return _announced(app.calls.compose(call.task, call.args, call.kwargs, options, task=task, is_follow_up=True))

    # -- what follows from a task

    def compose_retry(
        self, request: Request, context: Context, *, when: datetime | float | None, sig: object
    ) -> Message:
        """The message of a retry."""
        return _announced(self._app.calls.compose_retry(request, context, when=when, sig=sig))

    def compose_next(
        self,
        signature: SignatureFields,
        result: object,
        context: Context,
        chain: list[SignatureFields],
        *,
        is_bound: bool = True,
    ) -> list[Message]:
        """The messages of a callback or of the next step of a chain, with the rest of that (reversed) behind it."""
        request = context.request
        run = request.headers.get(RUN_HEADER) if request is not None else None
        headers = {RUN_HEADER: run} if run else {}
        if not is_bound and current_context() is not None:
            headers |= UNBOUND
        return self._following(as_signature(signature, self._app), (result,), context, chain, headers)

    def compose_body(
        self, body: SignatureFields, values: list[object], group_id: str, parent_id: str | None
    ) -> list[Message]:
        """The messages of a chord's body."""
        sig = as_signature(without_chord_keys(body), self._app)
        # Whoever runs the body's first task may forget what the store knows of the chord.
        headers = {CHORD_HEADER: chord_mark(group_id, body_id(body))}
        context = Context(id=parent_id, root_id=_root_of(sig))
        return self._following(sig, (values,), context, [], headers)

    def compose_replacement(self, replacement: object, context: Context) -> list[Message]:
        """The messages of what a task asked to be replaced with: its id, callbacks and place are the task's."""
        sig = single(settle(as_signature(replacement, self._app)))
        if context.stamped_headers:
            sig.stamp(**(context.stamps or {}), stamped_headers=list(context.stamped_headers))
        for callback in listed(context.callbacks):
            end_of(sig, lambda end, callback=callback: end.extend_list_option("link", [callback]))  # type: ignore[misc]
        errbacks = listed(context.errbacks)
        nesting = (context.replaced_task_nesting or 0) + 1
        shared = {"replaced_task_nesting": nesting}
        sig = settle(sig, {**shared, "link_error": [*listed(sig.options.get("link_error")), *errbacks]})
        membership = {"group_id": context.group, "group_index": context.group_index, "chord": context.chord}
        reply_to = context.reply_to or ""
        bind_bodies(sig, context)
        place = Place(context.id, membership, context.root_id, context.parent_id)
        self._freezer(reply_to).freeze(sig, place)
        return self._composed(self._begun(sig, continuation=list(context.chain or ())))

    def compose_errback(self, errback: SignatureFields, context: Context, error: BaseException, trace: str) -> Message:
        """An errback that takes (request, exc, traceback), for a worker's slot to call where it may not be called here."""
        call = as_signature(errback, self._app)
        name = call.task
        about = {
            "id": context.id, "task": context.task, "args": context.args, "kwargs": context.kwargs,
            "root_id": context.root_id, "parent_id": context.parent_id, "group": context.group,
        }  # fmt: skip
        route = self._app.router.route(name, (), {}, {}, self._app.tasks.get(name))
        options = {"exchange": route.exchange, "routing_key": route.routing_key, "root_id": context.root_id}
        args = (dict(call), about, exception_as_dict(error), trace)
        message = self._compose_here(Signature(ERRBACK, args, None, options, app=self._app))
        return replace(message, declare=(*message.declare, *route.declare))

    def _following(
        self,
        sig: Signature,
        args: Arguments,
        context: Context,
        later_steps: list[SignatureFields],
        headers: HeaderDict | None = None,
    ) -> list[Message]:
        sig = settle(sig)
        if DEADLINE not in (headers or {}):
            bind_bodies(sig, context)
        request = context.request
        reply_to = request.reply_to if request is not None else ""
        freezer = self._freezer(reply_to or "", context.follow_up_id)
        result = freezer.freeze(sig, Place(root_id=context.root_id or context.id, parent_id=context.id))
        context.children.append(result.as_tuple())
        begun = self._begun(sig, args, continuation=later_steps)
        for call in begun.calls if headers else ():
            call.options["headers"] = {**(call.options.get("headers") or {}), **(headers or {})}
        return self._composed(begun)


def _announced(message: Message) -> Message:
    """Send before_task_publish, but not on a worker's I/O loop (where no task runs): receivers are users' code."""
    if signals.before_task_publish and current_context() is not None:
        tell_composed(message, follow_up=True)
    return message


def _root_of(sig: SignatureFields) -> object:
    """The root id of a frozen signature's first task."""
    kwargs, options = sig.get("kwargs") or {}, sig.get("options") or {}
    inner = kwargs.get("tasks") or kwargs.get("header") or ()
    if sig["task"] in (CHAIN, GROUP, CHORD) and not options.get("root_id"):
        return _root_of(inner[0]) if inner else None
    return options.get("root_id")
