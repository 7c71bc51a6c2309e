"""What leaves an application in bursts: many calls at once, and what chains, groups and chords begin with."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from amqtask.canvas import as_signature, chain
from amqtask.client.caller import timeout_of
from amqtask.client.inline_runner import InlineRunner
from amqtask.exceptions import AlreadyQueued
from amqtask.flow.keys import UNIQUE
from amqtask.pipeline import BURST, flush_open
from amqtask.protocol.chord import more_message, queue_name, token_of
from amqtask.results import GroupResult

if TYPE_CHECKING:
    from amqtask.calls.signature import Signature
    from amqtask.client.caller import Caller
    from amqtask.client.runtime import Roof
    from amqtask.client.workflow_ids import Begun
    from amqtask.exceptions import PublishError
    from amqtask.ground.shapes import Arguments, KeywordDict, Options, SignatureFields
    from amqtask.protocol.message import Message
    from amqtask.result import UntypedResult

T = TypeVar("T")


class Bursts:
    """Many calls, and compositions, of one application; its `caller` composes and sends their messages."""

    def __init__(self, app: Roof, caller: Caller) -> None:
        self._app = app
        self._caller = caller

    # -- many calls

    def publish_many(self, calls: Iterable[Signature], *, timeout: float | None = None) -> list[UntypedResult]:
        """Publish many calls in one pipelined burst, each confirmed; results in their order.

        Raises: the PublishError or AlreadyQueued of the first that was not stored (its `results` attribute holds what was).
        """
        signatures = [as_signature(call, self._app) for call in calls]
        if self._app.runtime.is_eager:
            return [self._caller.eager(call.task, call.args, call.kwargs, call.options) for call in signatures]
        flush_open()  # earlier calls stay earlier in the queue
        results: list[UntypedResult] = []
        for calls_of_burst in _bursts(signatures):
            messages = self._compose_many(calls_of_burst)
            claimed = self._all_claimed(messages)
            errors = self._caller.sender.send_many(_unclaimed(messages, claimed), timeout)
            self._all_published(messages, claimed, errors, results)
        return results

    async def apublish_many(self, calls: Iterable[Signature], *, timeout: float | None = None) -> list[UntypedResult]:
        """The same over the async publisher."""
        signatures = [as_signature(call, self._app) for call in calls]
        if self._app.runtime.is_eager:
            return [self._caller.eager(call.task, call.args, call.kwargs, call.options) for call in signatures]
        await self._caller.aprepare_results(timeout)
        results: list[UntypedResult] = []
        for calls_of_burst in _bursts(signatures):
            messages = self._compose_many(calls_of_burst)
            claimed = await self._off_loop(self._all_claimed, messages)
            errors = await self._caller.sender.asend_many(_unclaimed(messages, claimed), timeout)
            self._all_published(messages, claimed, errors, results)
        return results

    def _compose_many(self, signatures: Sequence[Signature]) -> list[Message]:
        tasks = self._app.tasks
        return [
            self._caller.compose(call.task, call["args"], call["kwargs"], call["options"], tasks.get(call.task))
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
                self._caller.sender.settled(message, error)
                if error is None:
                    results.append(self._caller.result_of(message))
                failed = failed or error
        if failed is not None:
            failed.results = results  # type: ignore[union-attr]
            raise failed

    # -- keys of unique calls

    def _all_claimed(self, messages: Sequence[Message]) -> list[UntypedResult | AlreadyQueued | None]:
        """For each of them None, where it is to be published; else the result to return instead, or the error to raise.

        Raises: as Caller.claimed, the keys of all are free then."""
        claimed: list[UntypedResult | AlreadyQueued | None] = []
        try:
            for message in messages:
                try:
                    claimed.append(self._caller.claimed(message))
                except AlreadyQueued as error:
                    claimed.append(error)
        except BaseException as error:
            for message, earlier in zip(messages, claimed, strict=False):
                if earlier is None:
                    self._caller.sender.settled(message, error)
            raise
        return claimed

    def _claim_parts(self, messages: Sequence[Message], *, at_once: bool = True) -> None:
        """Take the keys of a composition's first calls, where they are free: none of them can be left out."""
        for message in messages:
            plan = self._caller.unique_plan(message)
            if plan is not None:
                self._app.runtime.claims.try_to_take(plan, message, at_once=at_once)

    async def _off_loop(self, claim: Callable[[Sequence[Message]], T], messages: Sequence[Message]) -> T:
        """`claim(messages)`, in a thread where the store of keys is to be asked."""
        if any(UNIQUE in message.properties.headers for message in messages):
            return await asyncio.to_thread(claim, messages)
        return claim(messages)

    # -- compositions

    def publish_composition(self, composition: Any, args: Arguments, kwargs: KeywordDict, options: Options) -> object:
        """Publish what a chain, group or chord begins with, in one burst; its result, None for an empty chain.

        Raises: the PublishError of the first message that was not stored.
        """
        if _is_empty_chain(composition):
            return None
        if self._app.runtime.is_eager:
            return self.run_composition(composition, args, kwargs, options)
        began = time.monotonic()
        self._caller.prepare_results(timeout_of(options))
        spent = time.monotonic() - began
        begun, result = self._app.runtime.workflows.prepared(composition, args, kwargs, options)
        messages = self._messages(begun)
        pipeline = self._caller.open_pipeline
        self._claim_parts(messages, at_once=pipeline is None)
        if pipeline is not None:
            for message in messages:
                pipeline.add(message)
        elif len(messages) == 1:
            self._caller.sender.send(messages[0], self._caller.rest_of(timeout_of(options), spent))
        else:
            for burst in _bursts(messages):
                timeout = self._caller.rest_of(timeout_of(options), spent, len(burst))
                self._caller.sender.all_settled(burst, self._caller.sender.send_many(burst, timeout))
        return self._caller.noted(result)

    async def apublish_composition(
        self, composition: Any, args: Arguments, kwargs: KeywordDict, options: Options
    ) -> object:
        """The same over the async publisher."""
        if _is_empty_chain(composition):
            return None
        if self._app.runtime.is_eager:
            return self.run_composition(composition, args, kwargs, options)
        began = time.monotonic()
        await self._caller.aprepare_results(timeout_of(options))
        spent = time.monotonic() - began
        begun, result = self._app.runtime.workflows.prepared(composition, args, kwargs, options)
        messages = self._messages(begun)
        await self._off_loop(self._claim_parts, messages)
        for burst in _bursts(messages):
            timeout = self._caller.rest_of(timeout_of(options), spent, len(burst))
            self._caller.sender.all_settled(burst, await self._caller.sender.asend_many(burst, timeout))
        return self._caller.noted(result)

    def _messages(self, begun: Begun) -> list[Message]:
        if not self._app.is_finalized:
            self._app.finalize()
        return self._app.runtime.workflows.messages(begun)

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
        self._caller.sender.store(message)

    def group_result(self, group_id: str, results: Sequence[Any], parent: object = None) -> GroupResult:
        """The results of a group."""
        return GroupResult(group_id, results, self._app.runtime.backend, parent)

    def run_composition(
        self,
        composition: Any,
        args: Arguments,
        kwargs: KeywordDict,
        options: Options,
    ) -> object:
        """Run a chain, group or chord here, one task after the other; errors as with `run_inline`."""
        if _is_empty_chain(composition):
            return None
        self._app.finalize()
        sig, _ = self._app.runtime.workflows.frozen(
            composition.clone(args, kwargs) if args or kwargs else composition,
            {k: v for k, v in options.items() if k != "throw"},
        )
        return InlineRunner(self._app, in_place_of_publishing=self._app.runtime.is_eager).run_composition(
            sig, propagate=self._caller.raises(options)
        )


def _is_empty_chain(composition: Signature) -> bool:
    return isinstance(composition, chain) and not len(composition)


def _bursts(calls: Sequence[T]) -> Iterator[Sequence[T]]:
    """Cut calls into bursts: large, so that round trips to the broker do not count; small, so that an `eta` is worked
    out just before its message leaves."""
    for start in range(0, len(calls), BURST):
        yield calls[start : start + BURST]


def _unclaimed(messages: Sequence[Message], claimed: Sequence[object]) -> list[Message]:
    return [message for message, earlier in zip(messages, claimed, strict=True) if earlier is None]
