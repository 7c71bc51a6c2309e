"""Resuming a chain: steps of a redelivered message that need not run again, because their results are stored.

A worker runs the next steps of a chain without the broker for a while (worker.steps): the message that it got stays unanswered,
and each step's result is stored before the next one begins. When the worker is lost, the broker delivers that message again;
the worker that gets it finds here how far the chain has come, and publishes the next step.

Only results with the message's own run (RUN_HEADER) count: ids may be used twice, by a signature that is sent again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from amqtask import states
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.task import RUN_HEADER

if TYPE_CHECKING:
    from amqtask.execution.chords import FollowUps
    from amqtask.execution.context import Context
    from amqtask.execution.contract import ChainStore, Composer
    from amqtask.execution.request import Request
    from amqtask.ground.shapes import SignatureFields
    from amqtask.protocol.message import Message
    from amqtask.protocol.result import ResultMessage

logger = bounded_logger("amqtask.execution")
_COMPOSITIONS = frozenset({"celery.chain", "celery.group", "celery.chord"})


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
        and step.get("task") not in _COMPOSITIONS
        and not options.get("link")
        and not options.get("chord")
    )
