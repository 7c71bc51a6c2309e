"""Steps of a chain that need not pass the broker: a slot goes on with the next one, and a redelivered chain goes on where it was.

A slot that is a process of its own runs the next step by itself (SlotSteps) and only tells the worker, which would otherwise send
it the next step through two sockets. What only the worker knows (revoked tasks, changed limits, that it stops) reaches the slot
as a flag. For all other slots the worker does the same itself (amqtask.worker.workflows).

Meanwhile the message that the worker got stays unanswered, and each step's result is stored before the next one begins. When
the worker is lost, the broker delivers that message again; the worker that gets it finds here how far the chain has come
(Resuming), and publishes the next step. Only results with the message's own run (RUN_HEADER) count: ids may be used twice, by a
signature that is sent again.
"""

from __future__ import annotations

import mmap
import time
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from amqtask import states
from amqtask.execution.follow_ups import COMPOSITIONS
from amqtask.execution.request import request_of
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.task import RUN_HEADER

if TYPE_CHECKING:
    from amqtask.execution.context import Context
    from amqtask.execution.contract import ChainStore, Composer, TaskLike
    from amqtask.execution.follow_ups import FollowUps
    from amqtask.execution.request import Outcome, Request
    from amqtask.ground.shapes import SignatureFields
    from amqtask.protocol.message import Message
    from amqtask.protocol.result import ResultMessage


_NO_LIMITS = (None, [None, None], (None, None))
logger = bounded_logger("amqtask.execution")
# Headers with ids by which a task may be revoked.
_IDS = ("id", "root_id", "parent_id", "group")


def needs_no_broker(before: Request, message: Message) -> bool:
    """Whether the message would be delivered from the queue that `before` came from, at once and with the same priority."""
    headers, properties = message.properties.headers, message.properties
    return (
        not message.exchange
        and message.routing_key == before.queue
        and (properties.priority or 0) == (before.priority or 0)
        and headers.get("eta") is None
        and headers.get("expires") is None
    )


class SlotSteps:
    """For the process of a slot: makes the requests of next steps for `seconds` after the first one, while `is_allowed` is on.
    `revoked` has the ids that may be revoked: about those the worker decides."""

    def __init__(
        self, tasks: Mapping[str, TaskLike], seconds: float, is_allowed: Flag, revoked: Perhaps | None = None
    ) -> None:
        self._tasks = tasks
        self._seconds = seconds
        self._is_allowed = is_allowed
        self._revoked = revoked

    def after(self, before: Request, outcome: Outcome) -> Request | None:
        """The request of the next step, to be run now; None: the worker decides.

        It has a number of its own, which no request of the worker's has.
        """
        if not (outcome.is_step and self._is_allowed[0]) or before.redelivered:
            return None
        now = time.monotonic()
        until = before.until or now + self._seconds
        if now >= until or not self._may_follow(before, outcome.publish[0]) or self._may_be_revoked(outcome.publish[0]):
            return None
        return _request(before, outcome.publish[0], until)

    def _may_be_revoked(self, message: Message) -> bool:
        revoked, headers = self._revoked, message.properties.headers
        return bool(revoked) and any(headers.get(name) in revoked for name in _IDS)  # type: ignore[operator]

    def begun(self, before: Request, outcome: Outcome, until: float) -> Request:
        """The request that `after` returned, for the worker. Raises: ValueError for one that it would never return."""
        if not outcome.is_step or not outcome.publish or not self._may_follow(before, outcome.publish[0]):
            raise ValueError(f"a step that cannot follow {before.task}[{before.id}]")
        return _request(before, outcome.publish[0], until)

    def _may_follow(self, before: Request, message: Message) -> bool:
        headers = message.properties.headers
        task = self._tasks.get(headers.get("task"))  # type: ignore[arg-type]
        return (
            task is not None
            and isinstance(headers.get("id"), str)
            and task.acks_late
            and task.flow_plan is None
            and task.batch is None
            and task.time_limit is None
            and task.soft_time_limit is None
            and headers.get("timelimit") in _NO_LIMITS
            and before.hard_limit is None
            and before.soft_limit is None
            and needs_no_broker(before, message)
        )


def _request(before: Request, message: Message, until: float) -> Request:
    headers = message.properties.headers
    number = before.number - 1 if before.number < 0 else -(before.number << 32) - 1
    step = request_of(message, number, task_id=headers["id"], task=headers["task"], queue=before.queue)
    step.until = until
    return step


class Flag(Protocol):
    """On when its one byte is not 0; to read it costs an index."""

    def __getitem__(self, index: int, /) -> int: ...


OFF: Flag = b"\0"


class SharedFlag:
    """`state` is the Flag, in memory that this process shares with children that it forks from now on."""

    def __init__(self, *, is_on: bool) -> None:
        self._page = mmap.mmap(-1, 1)
        self.state: Flag = self._page
        if is_on:
            self.turn_on()

    def turn_on(self) -> None:
        self._page[0] = 1

    def turn_off(self) -> None:
        self._page[0] = 0


# -- What else a worker tells slots that are processes, in memory that it shares with them: which running requests are asked to
# end (Stops), and which ids may be revoked (Perhaps).

# So many of the newest are known.
MOST = 4096
_SIZE = 8


class Stops:
    """Numbers of requests. To look costs a microsecond, and less while nobody was ever asked; a number is never used twice."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, MOST * _SIZE)
        self._next = 0

    def add(self, number: int) -> None:
        """Ask this one. In the process that made it."""
        start = self._next * _SIZE
        self._page[start : start + _SIZE] = _packed(number)
        self._next = (self._next + 1) % MOST

    def __contains__(self, number: object) -> bool:
        """Whether it was asked. In any process that was forked since."""
        if not isinstance(number, int):
            return False
        packed = _packed(number)
        found = self._page.find(packed, 0)
        while found % _SIZE and found >= 0:
            found = self._page.find(packed, found + 1)
        return found >= 0


def _packed(number: int) -> bytes:
    """Not all zeros, as what is free; numbers begin with 1."""
    return (number % 2**64).to_bytes(_SIZE, "big")


# Bits of a Perhaps: with 50,000 texts one in a hundred others is taken for one of them.
_BITS = 2**20


class Perhaps:
    """Texts that were added: of one that was it says so, and sometimes of another, too (a Bloom filter). Nothing is taken out."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, _BITS // 8)
        # Whether there is any.
        self._any = mmap.mmap(-1, 1)

    def add(self, text: str) -> None:
        """In the process that made it."""
        for bit in _bits_of(text):
            self._page[bit >> 3] |= 1 << (bit & 7)
        self._any[0] = 1

    def __bool__(self) -> bool:
        """Whether anything was added."""
        return bool(self._any[0])

    def __contains__(self, text: object) -> bool:
        """Whether it may have been added. In any process that was forked since."""
        if not isinstance(text, str):
            return False
        return all(self._page[bit >> 3] >> (bit & 7) & 1 for bit in _bits_of(text))


def _bits_of(text: str) -> tuple[int, int]:
    checksum = zlib.crc32(text.encode("utf-8", "surrogatepass"))
    return checksum % _BITS, (checksum * 0x9E3779B1 >> 12) % _BITS


# -- how far a chain has come


class Resuming:
    """Resumes chains from a store that keeps runs."""

    def __init__(self, store: ChainStore, composer: Composer) -> None:
        self._store = store
        self._composer = composer

    def covers(self, request: Request, context: Context, after: FollowUps) -> bool:
        """Whether all follow-ups of this task, whose result is stored, could be made again by `messages`."""
        chain = context.embed.get("chain")
        return bool(
            chain
            and len(after.publish) == 1
            and not after.parts
            and RUN_HEADER in request.headers
            and _is_plain(chain[-1])
        )

    def messages(self, request: Request, context: Context) -> tuple[Message, ...] | None:
        """The messages to publish instead of running it: the first step that has not run, or none when all have.

        None: it has to run. Raises: BackendUnreachable, and the errors of composing."""
        run, embed = request.headers.get(RUN_HEADER), context.embed
        if not run or embed.get("callbacks") or embed.get("chord"):
            return None
        last = self._success(request.id, run)
        if last is None:
            return None
        remaining, steps = list(embed.get("chain") or ()), 1
        while remaining and _is_plain(remaining[-1]):
            stored = self._success(remaining[-1]["options"]["task_id"], run)
            if stored is None:
                break
            last, steps = stored, steps + 1
            remaining.pop()
        logger.info(
            "Task %s[%s] has run already, and %d steps of its chain after it: %s",
            request.task, request.id, steps - 1, "the chain goes on" if remaining else "the chain has ended",
            extra=request.log_fields,
        )  # fmt: skip
        if not remaining:
            return ()
        context.id = last.task_id
        return tuple(self._composer.compose_next(remaining[-1], last.result, context, remaining[:-1]))

    def _success(self, task_id: str, run: str) -> ResultMessage | None:
        """The stored result of a step that succeeded in this run of its chain."""
        stored = self._store.find(task_id)
        is_of_run = stored is not None and stored.status == states.SUCCESS and stored.extra.get(RUN_HEADER) == run
        return stored if is_of_run else None


def _is_plain(step: SignatureFields) -> bool:
    """Whether the step has no follow-up but the next step."""
    options = step.get("options") or {}
    return bool(
        options.get("task_id")
        and step.get("task") not in COMPOSITIONS
        and not options.get("link")
        and not options.get("chord")
    )
