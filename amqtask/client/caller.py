"""Caller: how calls leave an application: composed, published with confirms or put into a transaction, and given a result."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial, update_wrapper
from inspect import iscoroutinefunction
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from amqtask import signals
from amqtask.calls.signature import Signature
from amqtask.canvas import routed, signature
from amqtask.client.inline_runner import InlineRunner
from amqtask.client.message_builder import body_of, tell_composed
from amqtask.exceptions import AlreadyQueued, BackendNotConfigured, ConfigurationError, PublishError
from amqtask.execution.context import current
from amqtask.flow.keys import TAKEN, UNIQUE
from amqtask.pipeline import Pipeline, find_pipeline, flush_open, opened
from amqtask.protocol import option_types
from amqtask.protocol.message import Message
from amqtask.protocol.option_types import of_call
from amqtask.result import AsyncResult

if TYPE_CHECKING:
    from amqtask.calls.application import CalledTask
    from amqtask.client.runtime import Roof
    from amqtask.execution.context import Context
    from amqtask.ground.shapes import Arguments, Headers, JsonObject, KeywordDict, Keywords, Options
    from amqtask.outbox.contract import NewRow, Transaction
    from amqtask.protocol.result import ResultMessage
    from amqtask.result import UntypedEagerResult, UntypedResult


# Seconds before a publish that are no part of its time.
NOT_COUNTED = 0.5

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")


def delegated(
    method: Callable[Concatenate[T, P], R], part: Callable[[Any], T] = attrgetter("caller")
) -> Callable[Concatenate[Any, P], R]:
    """A method of an application that a part of it does."""

    def call(app: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return method(part(app), *args, **kwargs)

    async def acall(app: Any, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        return await method(part(app), *args, **kwargs)  # type: ignore[misc] # a coroutine function, too

    function = acall if iscoroutinefunction(method) else call
    update_wrapper(function, method)
    return function  # type: ignore[return-value] # as `method` is


class Caller:
    """Calls of one application."""

    def __init__(self, app: Roof) -> None:
        self._app = app
        self.sender = Sender(app)

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
        self,
        name: str,
        args: Arguments,
        kwargs: KeywordDict,
        options: Options,
        task: CalledTask | None = None,
        *,
        refuses_held: bool = False,
    ) -> UntypedResult:
        """Publish one call, or run it here when task_always_eager says so. `refuses_held`: AlreadyQueued for a unique one whose
        key another call has, whatever its task says of that."""
        if self._app.runtime.is_eager:
            return self.eager(name, args, kwargs, options)
        began = time.monotonic()
        message = self.compose(name, args, kwargs, options, task)
        pipeline = self.open_pipeline
        if UNIQUE in message.properties.headers:
            earlier_result = self.claimed(message, at_once=pipeline is None, refuses_held=refuses_held)
            if earlier_result is not None:
                return earlier_result
        if pipeline is not None:
            pipeline.add(message)
        else:
            self.sender.send(message, self.rest_of(timeout_of(options), time.monotonic() - began))
        return self.result_of(message)

    @property
    def open_pipeline(self) -> Pipeline | None:
        """The pipeline that a call goes through here; a transaction comes first."""
        return None if opened.get() is None or self.sender.transaction is not None else find_pipeline(self)

    async def apublish_call(
        self, name: str, args: Arguments, kwargs: KeywordDict, options: Options, task: CalledTask | None = None
    ) -> UntypedResult:
        """The same over the async publisher."""
        if self._app.runtime.is_eager:
            return self.eager(name, args, kwargs, options)
        began = time.monotonic()
        await self.aprepare_results(timeout_of(options))
        message = self.compose(name, args, kwargs, options, task)
        if UNIQUE in message.properties.headers:
            earlier_result = await asyncio.to_thread(self.claimed, message)
            if earlier_result is not None:
                return earlier_result
        await self.sender.asend(message, self.rest_of(timeout_of(options), time.monotonic() - began))
        return self.result_of(message)

    def claimed(self, message: Message, *, at_once: bool = True, refuses_held: bool = False) -> UntypedResult | None:
        """Take the key of a unique call that is to be published. If another call has the key: the result to return instead.

        In a transaction the key is taken when the task is to run: a rollback would leave it behind.
        Raises: AlreadyQueued, FlowStoreUnreachable, ConfigurationError."""
        plan = self.unique_plan(message)
        if plan is None:
            return None
        other = self._app.runtime.claims.take(plan, message, at_once=at_once)
        if other is None:
            return None
        on_conflict = plan.unique.on_conflict
        if on_conflict == "raise" or refuses_held:
            raise AlreadyQueued(f"task {plan.name}: a call with the same unique key waits or runs: {other}", other)
        if on_conflict == "drop":
            return self._result(message.properties.headers["id"], plan.name, ignored=True)
        result: UntypedResult = self.noted(self._result(other, plan.name))
        return result

    def unique_plan(self, message: Message) -> Any:
        """The plan of a unique call whose key is taken before it is published; else None."""
        if UNIQUE not in message.properties.headers or self.sender.transaction is not None:
            return None
        plan = self._app.tasks[message.properties.headers["task"]].flow_plan
        return None if plan is None or plan.unique is None else plan

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

        return Pipeline(self, partial(self.sender.send_now, timeout=timeout), self.sender.settled)

    def compose(
        self, name: str, args: Arguments, kwargs: Keywords, options: Options, task: CalledTask | None
    ) -> Message:
        """The message of a call. Raises: TypeError, EncodeError, QueueNotFound."""
        if not self._app.is_finalized:
            self._app.finalize()
        if options:
            options = of_call(name, options)
        if task is None:
            task = self._app.tasks.get(name)
        backend = self._app.runtime.backend
        reply_to = ""
        if backend is not None and not _ignores(options, task):
            self.prepare_results(timeout_of(options))
            reply_to = backend.reply_to()
        message = self._app.runtime.calls.compose(name, args, kwargs, options, task=task, reply_to=reply_to)
        if signals.before_task_publish.connected:
            tell_composed(message)
        return message

    def prepare_results(self, timeout: float | None) -> None:
        """Before the store is asked where results come to: a queue on a node that is away is replaced here."""
        backend = self._app.runtime.backend
        if backend is None:
            return
        if self.sender.transaction is None:
            backend.prepare((), timeout)
        else:  # calls in a transaction need no broker: rows name the queue of results
            backend.keep_reading()

    def rest_of(self, timeout: float | None, spent: float, count: int = 1) -> float | None:
        """The seconds that are left for publishing so many messages: what the queue of results took counts, too. A fifth is left
        in any case: users' receivers may have taken the rest."""
        if spent < NOT_COUNTED:
            return timeout
        seconds = self.sender.limit(timeout, count)
        return None if seconds is None else max(seconds - spent, seconds / 5)

    def result_of(self, message: Message) -> UntypedResult:
        """The result of a call whose message has left."""
        headers = message.properties.headers
        ignored = bool(headers["ignore_result"])
        result: UntypedResult = self.noted(self._result(headers["id"], headers["task"], ignored=ignored))
        reply_to, backend = message.properties.reply_to, self._app.runtime.backend
        if reply_to and backend is not None and not ignored:
            backend.sent(result.id, reply_to)
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

    async def aprepare_results(self, timeout: float | None) -> None:
        """Have the store of results ready before a call is composed on an event loop, which must not wait for it."""
        if not self._app.is_finalized:
            self._app.finalize()
        backend = self._app.runtime.backend
        if backend is None:
            return
        if self.sender.transaction is not None:
            backend.start_reading()
        else:
            await backend.aprepare(timeout)

    async def aconnect(self, *, timeout: float | None = None) -> None:
        """Connect now what `adelay` and `aget` would connect when they are used first: the publisher, and for `rpc://` the queue
        of results. `timeout` is seconds, default: those of a publish. Raises: PublishError (BrokerUnreachable, AccessRefused …).
        """
        await self.aprepare_results(timeout)
        await self._app.runtime.async_publisher.connect(timeout=timeout)

    def compose_call(self, call: Signature) -> Message:
        """The message of one plain signature. Raises: TypeError, EncodeError, QueueNotFound."""
        call = routed(call)
        return self.compose(call.task, call["args"], call["kwargs"], call["options"], self._app.tasks.get(call.task))

    def compose_periodic(self, name: str, args: Arguments, kwargs: KeywordDict, options: Options) -> Message:
        """The message of a periodic task, for whose result nobody waits. Raises: TypeError, EncodeError, QueueNotFound."""
        task = self._registered(name)
        if task is not None:
            task.check_arguments(args, kwargs)
        message = self._app.runtime.calls.compose(name, args, kwargs, options, task=task)
        if signals.before_task_publish.connected:
            tell_composed(message)
        return message

    def check_periodic(self, name: str, options: Options) -> None:
        """Look at the options of a periodic task before it is due. Raises: TypeError (unknown option), WrongValue."""
        self._app.runtime.calls.check_options(name, of_call(name, options), self._registered(name))

    def _registered(self, name: str) -> Any:
        if not self._app.is_finalized:
            self._app.finalize()
        return self._app.tasks.get(name)

    def claim_periodic(self, message: Message) -> str | None:
        """Take the key of a unique call of beat's; the id of the call that has it, if another one has. Asks the store."""
        plan = self.unique_plan(message)
        if plan is None:
            return None
        replaces = plan.unique.on_conflict == "replace"
        other: str | None = self._app.runtime.claims.try_to_take(plan, message, replaces=replaces)
        return other

    def key_holder(self, message: Message) -> str | None:
        """The id of the call that has the key of this one, which is to run again; None where it has none, too. Asks the store."""
        headers = message.properties.headers
        if UNIQUE not in headers:
            return None
        task = self._registered(headers["task"]) if isinstance(headers.get("task"), str) else None
        plan = None if task is None else task.flow_plan
        if plan is None or plan.unique is None or not isinstance(headers.get("id"), str):
            return None
        try:
            holder: str | None = self._app.runtime.claims.holder(plan, message)
        except ConfigurationError:  # no store is named here
            return None
        return holder

    def periodic_claimed(self, message: Message, error: PublishError | None) -> None:
        """Tell the store of keys that the broker has stored the message of a periodic task that took its key, or has not."""
        if TAKEN in message.properties.headers:
            self._app.runtime.claims.settled(message, error)

    def periodic_settled(self, message: Message, error: PublishError | None) -> None:
        """Tell receivers of signals the same."""
        self.sender.tell(message, error)

    def noted(self, result: Any) -> Any:
        """Note a published result as a child of the task that runs."""
        parent = current.get()
        if parent is not None and parent.id is not None:
            parent.children.append(result.as_tuple())
        return result

    # -- running here

    def run_inline(
        self, task: CalledTask, args: Sequence[object], kwargs: Keywords, options: Options
    ) -> UntypedEagerResult:
        """Run a task here, retries and callbacks included. Its exception is kept in the result, unless the option `throw` or the
        setting task_eager_propagates has it raised."""
        return InlineRunner(self._app).run(task, args, kwargs, options, propagate=self.raises(options))

    def raises(self, options: Options) -> bool:
        """Whether a call that runs here raises the task's exception."""
        throw = options.get("throw")
        return bool(self._app.conf.task_eager_propagates if throw is None else throw)

    def eager(self, name: str, args: Arguments, kwargs: Keywords, options: Options) -> UntypedEagerResult:
        """Run a call here that would be published, were it not for task_always_eager."""
        self._app.finalize()
        return InlineRunner(self._app, in_place_of_publishing=True).run(
            self._app.tasks[name], args, kwargs, options, propagate=self.raises(options)
        )


def timeout_of(options: Options) -> float | None:
    """The seconds that a call's options leave for publishing it. Raises: WrongValue."""
    seconds = options.get("timeout") or options.get("confirm_timeout")
    return None if seconds is None else float(option_types.convert("timeout", option_types.SECONDS, seconds))


def _ignores(options: Options, task: CalledTask | None) -> bool:
    ignored = options.get("ignore_result")
    return bool(task.ignore_result if ignored is None and task is not None else ignored)


# -- how messages leave: to the broker with confirms, or into a transaction's outbox


class Sender:
    """Sends messages of one application, with signals and events about what was stored. Each method raises PublishError, or an
    error of the outbox's database, where it does not return errors."""

    def __init__(self, app: Roof) -> None:
        self._app = app

    @property
    def transaction(self) -> Transaction | None:
        """The outbox's transaction that a call is made in here, if any: its commit sends the call."""
        outbox = self._app.runtime.outbox
        return None if outbox is None else outbox.transaction()

    def store(self, message: Message, timeout: float | None = None) -> bool:
        """Send one message, without a word about it. False: it is a row of a transaction."""
        transaction = self.transaction
        if transaction is not None:
            transaction.write(self._rows((message,)))
            return False
        self._app.runtime.publisher.publish(message, timeout=timeout)
        return True

    def send(self, message: Message, timeout: float | None) -> None:
        """Send the message of one call."""
        try:
            is_published = self.store(message, timeout)
        except BaseException as error:
            self.settled(message, error)
            raise
        self.settled(message)
        if is_published and self._app.runtime.tells_sent:
            self._app.runtime.sent_events.sent((message,))

    async def asend(self, message: Message, timeout: float | None) -> None:
        """The same without blocking the event loop."""
        transaction = self.transaction
        try:
            if transaction is not None:
                await transaction.awrite(self._rows((message,)))
            else:
                await self._app.runtime.async_publisher.publish(message, timeout=timeout)
        except BaseException as error:
            await self._asettled(message, error)
            raise
        await self._asettled(message)
        if transaction is None:
            await self._atell_sent((message,))

    def send_many(self, messages: Sequence[Message], timeout: float | None) -> Sequence[PublishError | None]:
        """Send a burst; the errors of those that were not stored, in their order. `all_settled` comes next."""
        transaction = self.transaction
        if transaction is None:
            return self.send_now(messages, timeout=timeout)
        try:
            transaction.write(self._rows(messages))
        except BaseException as error:
            self._none_stored(messages, error)
            raise
        return [None] * len(messages)

    async def asend_many(self, messages: Sequence[Message], timeout: float | None) -> Sequence[PublishError | None]:
        """The same without blocking the event loop."""
        transaction = self.transaction
        if transaction is None:
            limit = self.limit(timeout, len(messages))
            errors = await self._app.runtime.async_publisher.publish_many(messages, timeout=limit)
            await self._atell_sent(_stored(messages, errors))
            return errors
        try:
            await transaction.awrite(self._rows(messages))
        except BaseException as error:
            self._none_stored(messages, error)
            raise
        return [None] * len(messages)

    def send_now(self, messages: Sequence[Message], *, timeout: float | None) -> Sequence[PublishError | None]:
        """Send a burst to the broker, whatever transaction there is."""
        errors = self._app.runtime.publisher.publish_many(messages, timeout=self.limit(timeout, len(messages)))
        if self._app.runtime.tells_sent:
            self._app.runtime.sent_events.sent(_stored(messages, errors))
        return errors

    def limit(self, timeout: float | None, count: int) -> float | None:
        """A burst has the deadline of one publish, and a second more for each thousand."""
        seconds = self._app.conf.broker_publish_timeout
        return timeout if timeout is not None or seconds is None else float(seconds) + count / 1000

    async def _atell_sent(self, messages: Sequence[Message]) -> None:
        """An event loop must not wait for the connection that events go over."""
        if self._app.runtime.tells_sent:
            await asyncio.to_thread(self._app.runtime.sent_events.sent, messages)

    def _rows(self, messages: Sequence[Message]) -> list[NewRow]:
        from amqtask.outbox.contract import as_row

        backend = self._app.runtime.backend
        queue = backend.reply_queue if backend is not None else None
        if queue is not None:
            messages = [
                replace(message, declare=(*message.declare, queue))
                if message.properties.reply_to == queue.name
                else message
                for message in messages
            ]
        return [as_row(message, self._app.runtime.delays) for message in messages]

    # -- what is said about it

    def settled(self, message: Message, error: BaseException | None = None) -> None:
        """Tell the store of a unique call's key, and send the signal after_task_publish, or with an error task_publish_failed."""
        if TAKEN in message.properties.headers:
            self._app.runtime.claims.settled(message, error)
        self.tell(message, error)

    def tell(self, message: Message, error: BaseException | None = None) -> None:
        """Send the signal about a message, as `settled` does."""
        if error is None:
            if signals.after_task_publish.connected:
                signals.after_task_publish.send(**_described(message))
        elif signals.task_publish_failed:
            signals.task_publish_failed.send(exception=error, **_described(message))

    async def _asettled(self, message: Message, error: BaseException | None = None) -> None:
        if TAKEN in message.properties.headers:
            await asyncio.to_thread(self._app.runtime.claims.settled, message, error)
        self.tell(message, error)

    def all_settled(self, messages: Sequence[Message], errors: Sequence[PublishError | None]) -> None:
        """Send the signals about a burst. Raises: the first error."""
        for message, error in zip(messages, errors, strict=True):
            self.settled(message, error)
        failed = next((error for error in errors if error is not None), None)
        if failed is not None:
            raise failed

    def _none_stored(self, messages: Sequence[Message], error: BaseException) -> None:
        for message in messages:
            self.settled(message, error)


def _described(message: Message) -> JsonObject:
    headers = message.properties.headers
    return {
        "sender": headers["task"],
        "body": body_of(message),
        "exchange": message.exchange,
        "routing_key": message.routing_key,
        "headers": headers,
    }


def _stored(messages: Sequence[Message], errors: Sequence[PublishError | None]) -> Sequence[Message]:
    """The messages that the broker has stored."""
    return [message for message, error in zip(messages, errors, strict=True) if error is None]
