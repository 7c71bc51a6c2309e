"""Caller: how calls and compositions leave an application: composed, published with confirms, and given a result."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import copy_context
from dataclasses import replace
from functools import partial, update_wrapper
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from amqtask import signals
from amqtask.calls.signature import Signature
from amqtask.canvas import as_signature, routed, signature
from amqtask.client.inline_runner import InlineRunner
from amqtask.client.message_builder import tell_composed
from amqtask.client.sender import Sender
from amqtask.exceptions import AlreadyQueued, BackendNotConfigured, PublishError
from amqtask.execution.context import current
from amqtask.flow.keys import UNIQUE
from amqtask.pipeline import BURST, Pipeline, find_pipeline, flush_open, opened
from amqtask.protocol import option_types
from amqtask.protocol.chord import more_message, queue_name, token_of
from amqtask.protocol.message import Message
from amqtask.protocol.option_types import of_call
from amqtask.result import AsyncResult
from amqtask.results import GroupResult

if TYPE_CHECKING:
    from amqtask.calls.application import CalledTask
    from amqtask.client.runtime import Roof
    from amqtask.client.workflow_ids import Begun
    from amqtask.execution.context import Context
    from amqtask.ground.shapes import Arguments, Headers, KeywordDict, Keywords, Options, SignatureFields
    from amqtask.protocol.result import ResultMessage
    from amqtask.result import UntypedEagerResult, UntypedResult


# Seconds before a publish that are no part of its time.
NOT_COUNTED = 0.5

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")


def delegated(method: Callable[Concatenate[Caller, P], R]) -> Callable[Concatenate[Any, P], R]:
    """A method of an application that its caller does."""

    def call(app: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return method(app.caller, *args, **kwargs)

    async def acall(app: Any, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        return await method(app.caller, *args, **kwargs)  # type: ignore[misc] # a coroutine function, too

    function = acall if iscoroutinefunction(method) else call
    update_wrapper(function, method)
    return function  # type: ignore[return-value] # as `method` is


class Caller:
    """Calls and compositions of one application."""

    def __init__(self, app: Roof) -> None:
        self._app = app
        self._sender = Sender(app)

    # -- calling

    def send_task(
        self, /, name: str, args: Iterable[object] | None = None, kwargs: Keywords | None = None, **options: object
    ) -> UntypedResult:
        """Publish a task by name; it need not be registered here. Options as in `Task.apply_async`."""
        return self.publish_call(name, *option_types.arguments(name, args, kwargs), options)

    async def asend_task(
        self, /, name: str, args: Iterable[object] | None = None, kwargs: Keywords | None = None, **options: object
    ) -> UntypedResult:
        """`send_task` without blocking the event loop."""
        return await self.apublish_call(name, *option_types.arguments(name, args, kwargs), options)

    def signature(self, task: Any, *args: Any, **kwargs: Any) -> Signature:
        """A signature that belongs to this app."""
        return signature(task, *args, app=self._app, **kwargs)

    def publish_call(
        self, name: str, args: Arguments, kwargs: KeywordDict, options: Options, task: CalledTask | None = None
    ) -> UntypedResult:
        """Publish one call, or run it here when task_always_eager says so."""
        if self._app.runtime.is_eager:
            return self._eager(name, args, kwargs, options)
        began = time.monotonic()
        message = self.compose(name, args, kwargs, options, task)
        pipeline = self._pipeline
        if UNIQUE in message.properties.headers:
            earlier_result = self._claimed(message, at_once=pipeline is None)
            if earlier_result is not None:
                return earlier_result
        if pipeline is not None:
            pipeline.add(message)
        else:
            self._sender.send(message, self._rest_of(_timeout(options), time.monotonic() - began))
        return self._result_of(message)

    @property
    def _pipeline(self) -> Pipeline | None:
        """The pipeline that a call goes through here; a transaction comes first."""
        return None if opened.get() is None or self._sender.transaction is not None else find_pipeline(self)

    async def apublish_call(
        self, name: str, args: Arguments, kwargs: KeywordDict, options: Options, task: CalledTask | None = None
    ) -> UntypedResult:
        """The same over the async publisher."""
        if self._app.runtime.is_eager:
            return self._eager(name, args, kwargs, options)
        began = time.monotonic()
        await self._aprepare(_timeout(options))
        message = self.compose(name, args, kwargs, options, task)
        if UNIQUE in message.properties.headers:
            earlier_result = await asyncio.to_thread(copy_context().run, self._claimed, message)
            if earlier_result is not None:
                return earlier_result
        await self._sender.asend(message, self._rest_of(_timeout(options), time.monotonic() - began))
        return self._result_of(message)

    def _claimed(self, message: Message, *, at_once: bool = True) -> UntypedResult | None:
        """Take the key of a unique call that is to be published. If another call has the key: the result to return instead.

        In a transaction the key is taken when the task is to run: a rollback would leave it behind.
        Raises: AlreadyQueued, FlowStoreUnreachable, ConfigurationError."""
        plan = self._unique_plan(message)
        if plan is None:
            return None
        other = self._app.runtime.claims.take(plan, message, at_once=at_once)
        if other is None:
            return None
        on_conflict = plan.unique.on_conflict
        if on_conflict == "raise":
            raise AlreadyQueued(f"task {plan.name}: a call with the same unique key waits or runs: {other}", other)
        if on_conflict == "drop":
            return self._result(message.properties.headers["id"], plan.name, ignored=True)
        result: UntypedResult = self._noted(self._result(other, plan.name))
        return result

    def _unique_plan(self, message: Message) -> Any:
        """The plan of a unique call whose key is taken before it is published; else None."""
        if UNIQUE not in message.properties.headers or self._sender.transaction is not None:
            return None
        plan = self._app.tasks[message.properties.headers["task"]].flow_plan
        return None if plan is None or plan.unique is None else plan

    def _all_claimed(self, messages: Sequence[Message]) -> list[UntypedResult | AlreadyQueued | None]:
        """For each of them None, where it is to be published; else the result to return instead, or the error to raise.

        Raises: as _claimed, the keys of all are free then."""
        claimed: list[UntypedResult | AlreadyQueued | None] = []
        try:
            for message in messages:
                try:
                    claimed.append(self._claimed(message))
                except AlreadyQueued as error:
                    claimed.append(error)
        except BaseException as error:
            for message, earlier in zip(messages, claimed, strict=False):
                if earlier is None:
                    self._sender.settled(message, error)
            raise
        return claimed

    def _claim_parts(self, messages: Sequence[Message], *, at_once: bool = True) -> None:
        """Take the keys of a composition's first calls, where they are free: none of them can be left out."""
        for message in messages:
            plan = self._unique_plan(message)
            if plan is not None:
                self._app.runtime.claims.try_to_take(plan, message, at_once=at_once)

    async def _off_loop(self, claim: Callable[[Sequence[Message]], T], messages: Sequence[Message]) -> T:
        """`claim(messages)`, in a thread where the store of keys is to be asked."""
        if any(UNIQUE in message.properties.headers for message in messages):
            return await asyncio.to_thread(copy_context().run, claim, messages)
        return claim(messages)

    def publish_signature(self, call: Signature) -> UntypedResult:
        """Publish a plain signature."""
        return self.publish_call(call.task, call.args, call.kwargs, call.options, self._app.tasks.get(call.task))

    async def apublish_signature(self, call: Signature) -> UntypedResult:
        """The same over the async publisher."""
        return await self.apublish_call(call.task, call.args, call.kwargs, call.options, self._app.tasks.get(call.task))

    def pipeline(self, *, timeout: float | None = None) -> Pipeline:
        """A block whose calls are published together, as fast as `publish_many`, and all confirmed at its end.

            with app.pipeline():
                results = [add.delay(n, n) for n in range(5000)]

        `delay()` composes its message, checks its arguments and returns; messages leave by the thousand, or when the first
        has waited 0.1 s at the next call, when a result is asked for, and at the end of the block. `timeout` (seconds)
        is that of each burst, default as in `publish_many`; the calls' own `timeout` does not count.
        Raises, from the call that completed a burst or at the end of the block: the first PublishError; `failed` of the
        pipeline names all calls that were not stored.
        """

        return Pipeline(self, partial(self._sender.send_now, timeout=timeout), self._sender.settled)

    def publish_many(self, calls: Iterable[Signature], *, timeout: float | None = None) -> list[UntypedResult]:
        """Publish many calls in one pipelined burst, each confirmed; results in their order.

        Raises: the PublishError or AlreadyQueued of the first that was not stored (its `results` attribute holds what was).
        """
        signatures = [as_signature(call, self._app) for call in calls]
        if self._app.runtime.is_eager:
            return [self._eager(call.task, call.args, call.kwargs, call.options) for call in signatures]
        flush_open()  # earlier calls stay earlier in the queue
        results: list[UntypedResult] = []
        for calls_of_burst in _bursts(signatures):
            messages = self._compose_many(calls_of_burst)
            claimed = self._all_claimed(messages)
            errors = self._sender.send_many(_unclaimed(messages, claimed), timeout)
            self._all_published(messages, claimed, errors, results)
        return results

    async def apublish_many(self, calls: Iterable[Signature], *, timeout: float | None = None) -> list[UntypedResult]:
        """The same over the async publisher."""
        signatures = [as_signature(call, self._app) for call in calls]
        if self._app.runtime.is_eager:
            return [self._eager(call.task, call.args, call.kwargs, call.options) for call in signatures]
        await self._aprepare(timeout)
        results: list[UntypedResult] = []
        for calls_of_burst in _bursts(signatures):
            messages = self._compose_many(calls_of_burst)
            claimed = await self._off_loop(self._all_claimed, messages)
            errors = await self._sender.asend_many(_unclaimed(messages, claimed), timeout)
            self._all_published(messages, claimed, errors, results)
        return results

    def _compose_many(self, signatures: Sequence[Signature]) -> list[Message]:
        tasks = self._app.tasks
        return [
            self.compose(call.task, call["args"], call["kwargs"], call["options"], tasks.get(call.task))
            for call in signatures
        ]

    def _all_published(
        self,
        messages: Sequence[Message],
        claimed: Sequence[UntypedResult | AlreadyQueued | None],
        errors: Sequence[PublishError | None],
        results: list[UntypedResult],
    ) -> None:
        """Add the results of what is stored, or was before. Raises: the first error, with all results so far as `results`."""
        failed: AlreadyQueued | PublishError | None = None
        of_published = iter(errors)
        for message, earlier in zip(messages, claimed, strict=True):
            if isinstance(earlier, AlreadyQueued):
                failed = failed or earlier
            elif earlier is not None:
                results.append(earlier)
            else:
                error = next(of_published)
                self._sender.settled(message, error)
                if error is None:
                    results.append(self._result_of(message))
                failed = failed or error
        if failed is not None:
            failed.results = results  # type: ignore[union-attr]
            raise failed

    def compose(
        self, name: str, args: Arguments, kwargs: Keywords, options: Options, task: CalledTask | None
    ) -> Message:
        """The message of a call. Raises: TypeError, EncodeError, QueueNotFound."""
        if not self._app.is_finalized:
            self._app.finalize()
        if options:
            options = of_call(name, options)
        if task is None:
            task = self._app.tasks.get(name) if name in self._app.tasks else None
        backend = self._app.runtime.backend
        reply_to = ""
        if backend is not None and not _ignores(options, task):
            self._prepare_results(_timeout(options))
            reply_to = backend.reply_to()
        message = self._app.runtime.calls.compose(name, args, kwargs, options, task=task, reply_to=reply_to)
        if signals.before_task_publish.connected:
            tell_composed(message)
        return message

    def _prepare_results(self, timeout: float | None) -> None:
        """Before the store is asked where results come to: a queue on a node that is away is replaced here."""
        backend = self._app.runtime.backend
        if backend is None:
            return
        if self._sender.transaction is None:
            backend.prepare((), timeout)
        else:  # calls in a transaction need no broker: rows name the queue of results
            backend.keep_reading()

    def _rest_of(self, timeout: float | None, spent: float, count: int = 1) -> float | None:
        """The seconds that are left for publishing so many messages: what the queue of results took counts, too. A fifth is left
        in any case: users' receivers may have taken the rest."""
        if spent < NOT_COUNTED:
            return timeout
        seconds = self._sender.limit(timeout, count)
        return None if seconds is None else max(seconds - spent, seconds / 5)

    def _result_of(self, message: Message) -> UntypedResult:
        headers = message.properties.headers
        ignored = bool(headers["ignore_result"])
        result: UntypedResult = self._noted(self._result(headers["id"], headers["task"], ignored=ignored))
        return result

    def _result(self, task_id: str, name: str | None = None, *, ignored: bool = False) -> UntypedResult:
        return AsyncResult(
            task_id, self._app.runtime.backend, revoke=self._app.revoke_call, task_name=name, ignored=ignored
        )

    def AsyncResult(self, task_id: str, *, task_name: str | None = None) -> UntypedResult:
        """The result of an earlier call, by its id."""
        return self._result(task_id, task_name)

    def store_state(self, result: ResultMessage, context: Context) -> None:
        """`Task.update_state`: store a state now. Raises: BackendNotConfigured."""
        backend = self._app.runtime.backend
        if backend is None:
            raise BackendNotConfigured("update_state() needs a result backend: set result_backend")
        message = backend.message_for(result, context.reply_to, context.correlation_id)
        if message is None:
            # A state on the way is not worth waiting for a store without end.
            backend.store_briefly(result)
        elif message.routing_key:
            self._app.runtime.publisher.publish(replace(message, mandatory=False))

    def revoke_call(
        self,
        task_id: str | Sequence[str],
        *,
        terminate: bool = False,
        signal: str | None = None,
        wait: bool = False,
        timeout: float | None = None,
        headers: Headers | None = None,
        tree: bool | None = None,
    ) -> None:
        """Tell all workers not to run a task, several, or those with these stamps, after the calls that wait in a pipeline. With
        `tree` (True or False) cancel them."""
        flush_open()
        arguments: KeywordDict = {"terminate": terminate, "signal": signal or "SIGTERM", "reply": wait}
        seconds = 1.0 if timeout is None else timeout
        if tree is not None:
            self._app.runtime.control.cancel(task_id, tree=tree, timeout=seconds, **arguments)
        elif headers is None:
            self._app.runtime.control.revoke(task_id, timeout=seconds, **arguments)
        else:
            self._app.runtime.control.revoke_by_stamped_headers(headers, timeout=seconds, **arguments)

    # -- workflows

    def publish_composition(self, composition: Any, args: Arguments, kwargs: KeywordDict, options: Options) -> object:
        """Publish what a chain, group or chord begins with, in one burst; its result.

        Raises: the PublishError of the first message that was not stored.
        """
        if self._app.runtime.is_eager:
            return self.run_composition(composition, args, kwargs, options)
        began = time.monotonic()
        self._prepare_results(_timeout(options))
        spent = time.monotonic() - began
        begun, result = self._app.runtime.workflows.prepared(composition, args, kwargs, options)
        messages = self._composition_messages(begun)
        pipeline = self._pipeline
        self._claim_parts(messages, at_once=pipeline is None)
        if pipeline is not None:
            for message in messages:
                pipeline.add(message)
        elif len(messages) == 1:
            self._sender.send(messages[0], self._rest_of(_timeout(options), spent))
        else:
            for burst in _bursts(messages):
                timeout = self._rest_of(_timeout(options), spent, len(burst))
                self._sender.all_settled(burst, self._sender.send_many(burst, timeout))
        return self._noted(result)

    async def apublish_composition(
        self, composition: Any, args: Arguments, kwargs: KeywordDict, options: Options
    ) -> object:
        """The same over the async publisher."""
        if self._app.runtime.is_eager:
            return self.run_composition(composition, args, kwargs, options)
        began = time.monotonic()
        await self._aprepare(_timeout(options))
        spent = time.monotonic() - began
        begun, result = self._app.runtime.workflows.prepared(composition, args, kwargs, options)
        messages = self._composition_messages(begun)
        await self._off_loop(self._claim_parts, messages)
        for burst in _bursts(messages):
            timeout = self._rest_of(_timeout(options), spent, len(burst))
            self._sender.all_settled(burst, await self._sender.asend_many(burst, timeout))
        return self._noted(result)

    async def _aprepare(self, timeout: float | None) -> None:
        """Have the store of results ready before a call is composed on an event loop, which must not wait for it."""
        if not self._app.is_finalized:
            self._app.finalize()
        backend = self._app.runtime.backend
        if backend is None:
            return
        if self._sender.transaction is not None:
            backend.start_reading()
        else:
            await backend.aprepare(timeout)

    async def aconnect(self, *, timeout: float | None = None) -> None:
        """Connect now what `adelay` and `aget` would connect when they are used first: the publisher, and for `rpc://` the queue
        of results. `timeout` is seconds, default: those of a publish. Raises: PublishError (BrokerUnreachable, AccessRefused …).
        """
        await self._aprepare(timeout)
        await self._app.runtime.async_publisher.connect(timeout=timeout)

    def _composition_messages(self, begun: Begun) -> list[Message]:
        if not self._app.is_finalized:
            self._app.finalize()
        return self._app.runtime.workflows.messages(begun)

    def compose_call(self, call: Signature) -> Message:
        """The message of one plain signature. Raises: TypeError, EncodeError, QueueNotFound."""
        call = routed(call)
        return self.compose(call.task, call["args"], call["kwargs"], call["options"], self._app.tasks.get(call.task))

    def compose_periodic(self, name: str, args: Arguments, kwargs: KeywordDict, options: Options) -> Message:
        """The message of a periodic task, for whose result nobody waits. Raises: TypeError, EncodeError, QueueNotFound."""
        if not self._app.is_finalized:
            self._app.finalize()
        task = self._app.tasks.get(name)
        if task is not None:
            task.check_arguments(args, kwargs)
        message = self._app.runtime.calls.compose(name, args, kwargs, options, task=task)
        if signals.before_task_publish.connected:
            tell_composed(message)
        return message

    def periodic_settled(self, message: Message, error: PublishError | None) -> None:
        """Tell receivers of signals that the broker has stored a periodic task's message, or has not."""
        self._sender.settled(message, error)

    def freeze(self, /, sig: Signature, *, task_id: str | None, **ids: Any) -> object:
        """Fix the ids of a signature and of its parts, in place; the result it will have."""
        options = {"task_id": task_id, **ids}
        frozen, result = self._app.runtime.workflows.frozen(sig, {k: v for k, v in options.items() if v is not None})
        sig.clear()
        sig.update(frozen)
        return result

    def add_to_chord(
        self, group_id: str, member: Signature, *, task_id: str | None = None, chord: SignatureFields | None = None
    ) -> None:
        """Say that a chord has one more member, before that is published. `task_id` is that of the task that it ends in, `chord`
        the chord's body as its members have it; a plain task has both itself.

        Raises: PublishError, BackendUnreachable."""
        store, member_id = self._app.runtime.chord_store, task_id or str(member.id)
        if store is not None:
            store.add_to_chord(group_id, member_id)
            return
        queue = queue_name(group_id, token_of(chord or member.options.get("chord") or {}))
        message = more_message(queue, member_id)
        self._sender.store(message)

    def _noted(self, result: Any) -> Any:
        """Note a published result as a child of the task that runs."""
        parent = current.get()
        if parent is not None and parent.id is not None:
            parent.children.append(result.as_tuple())
        return result

    def group_result(self, group_id: str, results: Sequence[Any], parent: object = None) -> GroupResult:
        """The results of a group."""
        return GroupResult(group_id, results, self._app.runtime.backend, parent)

    # -- running here

    def run_inline(
        self, task: CalledTask, args: Sequence[object], kwargs: Keywords, options: Options
    ) -> UntypedEagerResult:
        """Run a task here, retries and callbacks included. Its exception is kept in the result, unless the option `throw` or the
        setting task_eager_propagates has it raised."""
        return InlineRunner(self._app).run(task, args, kwargs, options, propagate=self._raises(options))

    def run_composition(
        self,
        composition: Any,
        args: Arguments,
        kwargs: KeywordDict,
        options: Options,
    ) -> object:
        """Run a chain, group or chord here, one task after the other; errors as with `run_inline`."""
        self._app.finalize()
        sig, _ = self._app.runtime.workflows.frozen(
            composition.clone(args, kwargs) if args or kwargs else composition,
            {k: v for k, v in options.items() if k != "throw"},
        )
        return InlineRunner(self._app, in_place_of_publishing=self._app.runtime.is_eager).run_composition(
            sig, propagate=self._raises(options)
        )

    def _raises(self, options: Options) -> bool:
        """Whether a call that runs here raises the task's exception."""
        throw = options.get("throw")
        return bool(self._app.conf.task_eager_propagates if throw is None else throw)

    def _eager(self, name: str, args: Arguments, kwargs: Keywords, options: Options) -> UntypedEagerResult:
        self._app.finalize()
        return InlineRunner(self._app, in_place_of_publishing=True).run(
            self._app.tasks[name], args, kwargs, options, propagate=self._raises(options)
        )


def _timeout(options: Options) -> float | None:
    seconds = options.get("timeout") or options.get("confirm_timeout")
    return None if seconds is None else float(option_types.convert("timeout", option_types.SECONDS, seconds))


def _bursts(calls: Sequence[T]) -> Iterator[Sequence[T]]:
    """Cut calls into bursts: large, so that round trips to the broker do not count; small, so that an `eta` is worked
    out just before its message leaves."""
    for start in range(0, len(calls), BURST):
        yield calls[start : start + BURST]


def _unclaimed(messages: Sequence[Message], claimed: Sequence[object]) -> list[Message]:
    return [message for message, earlier in zip(messages, claimed, strict=True) if earlier is None]


def _ignores(options: Options, task: CalledTask | None) -> bool:
    ignored = options.get("ignore_result")
    return bool(task.ignore_result if ignored is None and task is not None else ignored)
