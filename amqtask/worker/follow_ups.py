"""What follows from a task (results, next calls) is published until the broker has it, or ends where it never can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from amqtask.exceptions import (
    AccessRefused,
    BrokerUnreachable,
    ConnectionBlocked,
    MessageRefused,
    PublishRefused,
    PublishTimeout,
    Unroutable,
)
from amqtask.execution.request import request_of
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.entities import Queue

if TYPE_CHECKING:
    from amqtask.exceptions import PublishError
    from amqtask.execution.no_run import Endings
    from amqtask.execution.request import Request
    from amqtask.pool import Loop
    from amqtask.protocol.chord import ChordPart
    from amqtask.protocol.message import Message
    from amqtask.transport.contract import LoopPublisher


# -- Results that no queue took: their reader has gone, or the node of its queue is down and comes back.
#
# A classic queue is on one node. While that is down, RabbitMQ 3.10 returns messages for the queue as if it did not exist;
# when the node is back, so is the queue, and its reader would wait for ever for results that were dropped meanwhile. A
# passive declaration of the queue tells the two apart: "no queue", or "home node … is down or inaccessible".


logger = bounded_logger(__name__)

OnEnd: TypeAlias = Callable[[], None]
# Publishes a message until it is stored; calls the first callback at the end, or the second one when the worker stops first.
Store: TypeAlias = Callable[["Message", Callable[["PublishError | None"], None], Callable[[], None]], None]
# How many names of deleted queues are remembered; names of result queues are not used again.
MOST_GONE = 1000


class Readers:
    """Handles returned results for one worker. The first result for a queue probes the queue; others wait for the answer."""

    def __init__(self, publisher: LoopPublisher, store: Store) -> None:
        self._publisher = publisher
        self._store = store
        self._gone_queues: dict[str, None] = {}
        self._waiting: dict[str, list[tuple[Message, OnEnd]]] = {}

    def returned(self, result: Message, on_end: OnEnd) -> None:
        """A result was returned as unroutable: publish it again when its queue is back. `on_end` is called when it is stored, or
        when its queue is gone."""
        queue = result.routing_key
        if queue in self._gone_queues:
            on_end()
        elif queue in self._waiting:
            self._waiting[queue].append((result, on_end))
        else:
            self._waiting[queue] = []
            probe = replace(result, declare=(Queue(queue, passive=True),))
            # A worker that stops first lets the others have their last attempt.
            self._store(probe, partial(self._probed, queue, on_end), partial(self._probed, queue, on_end, None))

    def _probed(self, queue: str, on_end: OnEnd, error: PublishError | None) -> None:
        waiting = self._waiting.pop(queue)
        if error is None:
            for result, on_stored in waiting:
                self._publisher.publish(result, partial(_stored, on_stored))
        else:
            if isinstance(error, PublishRefused):
                logger.warning("%d results for queue %s are lost: %s", 1 + len(waiting), queue, error)
            else:
                self._note_gone(queue, error)
            for _, on_lost in waiting:
                on_lost()
        on_end()

    def _note_gone(self, queue: str, error: PublishError) -> None:
        logger.debug("nobody reads the queue of results %s any more: %s", queue, error)
        if len(self._gone_queues) >= MOST_GONE:
            self._gone_queues.clear()
        self._gone_queues[queue] = None


def _stored(on_end: OnEnd, error: PublishError | None) -> None:
    if error is not None:
        logger.warning("a result is lost: %s", error)
    on_end()


# -- FollowUpPublisher: publishes the follow-ups of a task until the broker has them, or ends those that the broker will never
# take.
#
# Some errors pass: a nack (a full queue, no majority of its nodes), an alarm, a broker that is away. The message is published
# again until it is taken; the delivery that it follows from stays unanswered meanwhile, and its task is not run again. A
# missing queue, exchange or right may be mended by an operator: such an error is final after some seconds. A message that
# AMQP cannot encode, or that is too large, fails at once.
#
# A follow-up that cannot be published ends like a task that is refused: FAILURE with the reason is stored, its errbacks are
# called, and the signatures that wait for it (the rest of its chain, its chord) fail with it.

# True: dealt with. False: not confirmed before the worker stops, so the delivery that it follows from must stay with the
# broker.
OnDone: TypeAlias = Callable[[bool], None]
Patience: TypeAlias = Callable[["PublishError"], float]

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 5.0
NEVER = float("inf")
_ELSEWHERE = (PublishRefused, ConnectionBlocked, PublishTimeout, BrokerUnreachable, Unroutable)
# Seconds for errors that an operator may be mending.
UNROUTABLE_SECONDS, ACCESS_REFUSED_SECONDS = 5.0, 30.0
# A caller whose full queue refuses results must not hold up a worker for ever (seconds).
RESULT_SECONDS = 60.0


def patience(error: PublishError) -> float:
    """For how many seconds a follow-up is published again."""
    if never_fits(error):
        return 0.0
    if isinstance(error, Unroutable):
        return UNROUTABLE_SECONDS
    return ACCESS_REFUSED_SECONDS if isinstance(error, AccessRefused) else NEVER


def patience_with_results(error: PublishError) -> float:
    """For how many seconds a result is published again."""
    return min(patience(error), RESULT_SECONDS)


def never_fits(error: PublishError) -> bool:
    """Whether the message itself is the reason, so that publishing it again can never help."""
    return isinstance(error, MessageRefused) or not isinstance(error, _ELSEWHERE)


def _itself(error: PublishError) -> Exception:
    return error


class FollowUpPublisher:
    """Publishes follow-ups for one worker. `add_part(part, on_done)` deals with parts of chords; `is_stopping` ends retries."""

    def __init__(
        self,
        publisher: LoopPublisher,
        loop: Loop,
        endings: Endings,
        *,
        add_part: Callable[[ChordPart, OnDone], None],
        is_stopping: Callable[[], bool],
    ) -> None:
        self.publisher = publisher
        self.endings = endings
        self.add_part = add_part
        self.is_stopping = is_stopping
        # How many messages were refused for now and are published again.
        self.held = 0
        self._loop = loop
        self.readers = Readers(publisher, self._store_result)

    def follow(
        self,
        publish: Sequence[Message],
        parts: Sequence[ChordPart],
        result: Message | None,
        on_done: OnDone,
        *,
        request: Request | None = None,
        on_failed: Callable[[Message, PublishError], None] | None = None,
        error_from: Callable[[PublishError], Exception] = _itself,
        is_final: bool = True,
    ) -> None:
        """Publish all these messages; `on_done` is called when all of them are dealt with.

        `request` is the request that they follow from, `is_final` tells whether `result` is its last result. `on_failed` is
        called with follow-ups that will never be published; their result is the error that `error_from` makes of the broker's."""
        _FollowUps(self, on_done, request, on_failed, error_from).start(publish, parts, result, is_final=is_final)

    def result_refused(
        self, result: Message, error: PublishError, on_done: OnDone, *, request: Request, is_final: bool
    ) -> None:
        """Like `follow`, for a result that has just been refused."""
        _FollowUps(self, on_done, request, None, _itself).result_refused(result, error, is_final=is_final)

    def store(
        self,
        message: Message,
        on_end: Callable[[PublishError | None], None],
        *,
        on_stopped: Callable[[], None],
        patience: Patience = patience,
        refused: PublishError | None = None,
    ) -> None:
        """Publish one message, again after an error for as long as `patience` returns for it; `refused` is the error of one that
        was just refused. `on_stopped` is called instead of `on_end` when the worker stops first."""
        attempts = _Attempts(self, message, on_end, on_stopped, patience)
        if refused is None:
            attempts.start()
        else:
            attempts.refused(refused)

    def _store_result(
        self, result: Message, on_end: Callable[[PublishError | None], None], on_stopped: Callable[[], None]
    ) -> None:
        self.store(result, on_end, on_stopped=on_stopped, patience=patience_with_results)

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call `callback` after a pause."""
        self._loop.call_later(seconds, callback)


class Pauses:
    """Pauses that double from FIRST_PAUSE to LONGEST_PAUSE seconds; `waited` is their sum."""

    __slots__ = ("_next", "waited")

    def __init__(self) -> None:
        self.waited = 0.0
        self._next = FIRST_PAUSE

    def next(self) -> float:
        """The next pause, in seconds."""
        pause, self._next = self._next, min(2 * self._next, LONGEST_PAUSE)
        self.waited += pause
        return pause


class _Attempts:
    """One message that is published until the broker has it."""

    __slots__ = ("_following", "_is_held", "_message", "_on_end", "_on_stopped", "_patience", "_pauses")

    def __init__(
        self,
        following: FollowUpPublisher,
        message: Message,
        on_end: Callable[[PublishError | None], None],
        on_stopped: Callable[[], None],
        patience: Patience,
    ) -> None:
        self._following = following
        self._message = message
        self._on_end = on_end
        self._on_stopped = on_stopped
        self._patience = patience
        self._pauses = Pauses()
        self._is_held = False

    def start(self) -> None:
        self._following.publisher.publish(self._message, self._published)

    def _published(self, error: PublishError | None) -> None:
        if error is None:
            self._let_go()
            self._on_end(None)
        else:
            self.refused(error)

    def refused(self, error: PublishError) -> None:
        if self._pauses.waited >= self._patience(error):
            self._let_go()
            self._on_end(error)
        elif self._following.is_stopping() and self._pauses.waited >= LONGEST_PAUSE:
            self._let_go()
            self._on_stopped()
        else:
            self._hold(error)
            self._following.later(self._pauses.next(), self.start)

    def _hold(self, error: PublishError) -> None:
        if self._is_held:
            return
        self._is_held = True
        self._following.held += 1
        if self._following.held == 1:  # one line, however many there are
            logger.warning("a message is refused for now, and published again until it is taken: %s", error)

    def _let_go(self) -> None:
        if self._is_held:
            self._is_held = False
            self._following.held -= 1


class _FollowUps:
    """The follow-ups, parts and result of one task, until all of them are dealt with."""

    __slots__ = ("_error_from", "_following", "_is_unconfirmed", "_on_done", "_on_failed", "_request", "_unfinished")

    def __init__(
        self,
        following: FollowUpPublisher,
        on_done: OnDone,
        request: Request | None,
        on_failed: Callable[[Message, PublishError], None] | None,
        error_from: Callable[[PublishError], Exception],
    ) -> None:
        self._following = following
        self._on_done = on_done
        self._request = request
        self._on_failed = on_failed
        self._error_from = error_from
        self._unfinished = 0
        self._is_unconfirmed = False

    def start(
        self, publish: Sequence[Message], parts: Sequence[ChordPart], result: Message | None, *, is_final: bool
    ) -> None:
        self._unfinished = 1 + len(publish) + len(parts) + (result is not None)
        publisher = self._following.publisher
        for message in publish:
            publisher.publish(message, partial(self._published, message))
        for part in parts:
            self._following.add_part(part, self._one_done)
        if result is not None:
            publisher.publish(result, partial(self._result_published, result, is_final))
        self._one_done(True)

    def result_refused(self, result: Message, error: PublishError, *, is_final: bool) -> None:
        self._unfinished = 1
        self._result_published(result, is_final, error)

    def _one_done(self, is_dealt_with: bool) -> None:
        if not is_dealt_with:
            self._is_unconfirmed = True
        self._unfinished -= 1
        if not self._unfinished:
            self._on_done(not self._is_unconfirmed)

    # -- tasks

    def _published(self, message: Message, error: PublishError | None) -> None:
        if error is None:
            self._one_done(True)
        elif "task" not in message.properties.headers:
            self._result_published(message, False, error)
        else:
            self._following.store(
                message, partial(self._ended, message), on_stopped=partial(self._one_done, False), refused=error
            )

    def _ended(self, message: Message, error: PublishError | None) -> None:
        if error is None:
            self._one_done(True)
            return
        request = follow_up_request(message)
        logger.error(
            "Task %s[%s] cannot be published and fails: %s%s",
            request.task, request.id, error, self._origin(),
            extra=request.log_fields,
        )  # fmt: skip
        if self._on_failed is not None:
            self._on_failed(message, error)
        fate = self._following.endings.refused(request, self._error_from(error))
        self._following.follow(fate.publish, fate.parts, fate.result, self._one_done, request=request)

    def _origin(self) -> str:
        request = self._request
        return "" if request is None else f" (it follows from task {request.task}[{request.id}])"

    # -- results

    def _result_published(self, result: Message, is_final: bool, error: PublishError | None) -> None:
        if error is None:
            self._one_done(True)
            return
        if isinstance(error, Unroutable) and not result.exchange:
            self._following.readers.returned(result, partial(self._one_done, True))
            return
        self._following.store(
            result, partial(self._result_ended, is_final),
            on_stopped=partial(self._one_done, False), patience=patience_with_results, refused=error,
        )  # fmt: skip

    def _result_ended(self, is_final: bool, error: PublishError | None) -> None:
        request = self._request
        if error is not None and request is not None:
            logger.error("The result of task %s[%s] cannot be published: %s", request.task, request.id, error)
            if is_final and never_fits(error):
                # The caller gets the reason as the result.
                refusal_result = self._following.endings.refused(request, error).result
                if refusal_result is not None:
                    self._unfinished += 1
                    self._following.publisher.publish(
                        refusal_result, partial(self._result_published, refusal_result, False)
                    )
        elif error is not None:
            logger.error("a result cannot be published: %s", error)
        self._one_done(True)


def follow_up_request(message: Message) -> Request:
    """The request of a message that was not published, to end it like a refused task."""
    headers = message.properties.headers
    return request_of(message, 0, task_id=headers["id"], task=headers["task"], queue=message.routing_key)
