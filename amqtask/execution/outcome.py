"""Outcome: the end of one request, as plain data, for the worker to act on."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from amqtask import states

if TYPE_CHECKING:
    from amqtask.execution.request import Request
    from amqtask.protocol.chord import ChordPart
    from amqtask.protocol.message import Message


class Answer(IntEnum):
    """The answer to the broker for a delivery, after all else was done."""

    ACK = 0
    REQUEUE = 1  # basic.reject(requeue=True): counts towards the delivery limit
    DEAD_LETTER = 2  # publish to `<queue>.dead` with the reason, then ack
    DROP = 3  # basic.reject(requeue=False): the queue's own dead-letter policy decides


class Outcome(NamedTuple):
    """The end of one request.

    The worker publishes `publish` (retries, next steps) and `result` (a result that travels by AMQP), waits
    for the broker's confirms, and only then gives `answer`. A result for a store with a server of its
    own (Redis) was already stored by the slot. `summary` is a repr of the return value or exception, for
    logs and events; `runtime` is seconds.
    """

    number: int
    state: str = states.SUCCESS
    answer: Answer = Answer.ACK
    reason: str = ""
    publish: tuple[Message, ...] = ()
    result: Message | None = None
    runtime: float = 0.0
    summary: str = ""
    traceback: str = ""
    expected: bool = False  # an exception listed in the task's `throws`: logged without traceback
    # Seconds that a REQUEUE waits in the broker's delay levels (when the result store is away).
    pause: float = 0.0
    # Parts of chords that are joined in the broker: before the answer they are published, confirmed, and the chord is looked at.
    parts: tuple[ChordPart, ...] = ()
    # `publish` is only the next step of a chain, and a redelivery could be resumed from the stored result.
    is_step: bool = False
    # The request of that step, where the slot has begun with it by itself.
    going_on: Request | None = None


_new = tuple.__new__


def of_success(
    number: int,
    runtime: float,
    summary: str = "",
    *,
    publish: tuple[Message, ...] = (),
    result: Message | None = None,
    parts: tuple[ChordPart, ...] = (),
    is_step: bool = False,
) -> Outcome:
    """`Outcome(number, …)` of a task that has succeeded, in a third of the time."""
    return _new(
        Outcome,
        (
            number, states.SUCCESS, Answer.ACK, "", publish, result, runtime, summary, "", False, 0.0, parts, is_step, None
        ),
    )  # fmt: skip
