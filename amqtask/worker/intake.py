"""The intake: deals with deliveries that cannot simply be run; common deliveries do not pass here.

All of them are rare: redelivered, timed, revoked, unknown or malformed messages. Each path ends in exactly one of: the
dispatcher, the finisher (result, dead letter or delay, then the answer), an answer, or the parked redeliveries.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from amqtask.exceptions import InvalidTaskError, NotRegistered, WorkerLostError
from amqtask.execution.request import CANCELLED
from amqtask.flow.deadline import HEADER as DEADLINE
from amqtask.flow.deadline import bind_received, bound_limit
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.task import as_limit, light_limit
from amqtask.topology.delays import second_delay
from amqtask.worker.finisher import back_to_its_queue
from amqtask.worker.strategy import Action, Verdict, judge

if TYPE_CHECKING:
    from amqtask.execution.no_run import Endings
    from amqtask.execution.request import Outcome, Request
    from amqtask.ground.shapes import Headers
    from amqtask.pool import Loop, Timer
    from amqtask.worker.deliveries import Deliveries
    from amqtask.worker.finisher import Finisher, Lost
    from amqtask.worker.options import WorkerSetup, WorkQueues
    from amqtask.worker.report import Report
    from amqtask.worker.revoked import Revocations
    from amqtask.worker.strategy import TaskStrategy

logger = bounded_logger(__name__)

NEVER = float("inf")
# For so long after a connection was lost the count of deliveries is not believed. What begins anew waits no longer (seconds).
LOSS_SECONDS = 10.0
# So many deliveries before the broker's own limit a message in doubt begins anew: more connections may be lost before it has.
SPARE = 2
# How often a message may begin anew, in the header of that name: one that breaks connections must come to its end.
MOST_NEW_BEGINNINGS = 3
BEGUN_ANEW = "amqtask-begun-anew"


class Intake:
    """Decides about uncommon deliveries. `ready` gets a request that waited here, or that is to be gathered for a batch."""

    def __init__(
        self,
        setup: WorkerSetup,
        *,
        loop: Loop,
        work_queues: WorkQueues,
        deliveries: Deliveries,
        lost: Lost,
        finisher: Finisher,
        revoked: Revocations,
        report: Report,
        endings: Endings,
        ready: Callable[[Request], None],
    ) -> None:
        self._setup = setup
        self._loop = loop
        self._work_queues = work_queues
        self._deliveries = deliveries
        self._lost = lost
        self._finisher = finisher
        self._revoked = revoked
        self._report = report
        self._endings = endings
        # Until then the count of deliveries is not believed.
        self._in_doubt_until = 0.0
        self._ready = ready
        self._soon: dict[int, tuple[Request, Timer]] = {}

    def examine(self, request: Request, strategy: TaskStrategy, watched: dict[int, float]) -> bool:
        """True: it may run now (its deadline is in `watched`). False: it has been dealt with."""
        if request.redelivered and self._is_known(request):
            return False
        if self._revoked.covers(request.id, request.headers):
            self._revoke(request)
            return False
        if strategy.task is None:
            return self._refuse_unknown(request, strategy)
        limit = self._work_queues.delivery_limit(request.queue)
        if limit and request.attempts and self._is_in_doubt(request):
            if request.attempts >= max(1, (self._work_queues.broker_limit(request.queue) or limit) - SPARE):
                self._begin_anew(request)
                return False
            limit = None
        if strategy.deadline is not None and DEADLINE not in request.headers:
            try:
                bind_received(request.headers, strategy.deadline)
            except (TypeError, ValueError, AttributeError, ArithmeticError):
                pass  # a time that is none, which is what the verdict says
        verdict = judge(request, time.time, delivery_limit=limit)
        if self._report.sees_received and verdict.action is not Action.EXPIRED:
            self._report.accepted(request)
        if verdict.deadline is not None and verdict.action is Action.RUN:
            watched[request.number] = verdict.deadline
        if strategy.batch is not None and verdict.action is Action.RUN:
            self._ready(request)
            return False
        return verdict.action is Action.RUN or self._divert(request, verdict)

    def watch(self, request: Request, watched: dict[int, float]) -> None:
        """Have a request that waits once more looked at before it runs: it may be revoked or too late by then."""
        if self._revoked.covers(request.id, request.headers):
            watched[request.number] = NEVER
        elif (deadline := judge(request, time.time, delivery_limit=None).deadline) is not None:
            watched[request.number] = deadline

    def connection_lost(self, *, is_silent: bool) -> None:
        """From now on the broker's counts may be of deliveries that no worker has begun: they were prefetched, or written into
        connections that nobody reads any more, ours and other workers'."""
        seconds = self._setup.silence_seconds if is_silent else LOSS_SECONDS
        self._in_doubt_until = max(self._in_doubt_until, time.time() + seconds)

    def admit(self, request: Request, deadline: float) -> bool:
        """Whether a watched request may run: called just before it does."""
        if self._revoked.covers(request.id, request.headers):
            self._revoke(request)
            return False
        if time.time() >= deadline:
            self._expire(request)
            return False
        if DEADLINE in request.headers:
            request.soft_limit = as_limit(bound_limit(request.headers, request.soft_limit, time.time()))
        return True

    def _is_known(self, request: Request) -> bool:
        answer = self._deliveries.redeliveries.recall(request)
        if answer is not None:
            self._deliveries.answer(request, answer)
            return True
        request.attempts = self._lost.attempts(request)
        return self._deliveries.redeliveries.park(request)

    def _divert(self, request: Request, verdict: Verdict) -> bool:
        match verdict.action:
            case Action.SOON:
                timer = self._loop.call_later(verdict.seconds, lambda: self._eta_reached(request))
                self._soon[request.number] = (request, timer)
            case Action.DELAY:
                self.delay(request, second_delay(request.headers, verdict.seconds))
            case Action.EXPIRED:
                self._expire(request)
            case Action.DEAD_LETTER:
                request.attempts -= 1  # it is not going to run this time
                # The workers may have died from reading its body, so it is not read here.
                self._end(request, self._endings.refused(request, WorkerLostError(verdict.reason)))
            case _:
                self.refuse(request, InvalidTaskError(verdict.reason))
        return False

    def _is_in_doubt(self, request: Request) -> bool:
        return self._in_doubt_until > time.time() and _begun_anew(request) < MOST_NEW_BEGINNINGS

    def _begin_anew(self, request: Request) -> None:
        """The message comes again with a count of its own, after a while in which fewer connections may be lost."""
        seconds = min(LOSS_SECONDS, self._in_doubt_until - time.time())
        logger.warning(
            "Task %s[%s] begins anew in %.0f s: it was delivered before (%d times), perhaps only over connections that were lost",
            request.task, request.id, seconds, request.attempts,
            extra=request.log_fields,
        )  # fmt: skip
        self.delay(request, seconds, {BEGUN_ANEW: _begun_anew(request) + 1})

    def delay(self, request: Request, seconds: float, more_headers: Headers | None = None) -> None:
        """Send a request to the broker's delay levels, from where it comes back to its queue."""
        message = back_to_its_queue(request)
        message.properties.headers.update(more_headers or {})
        self._finisher.forward(request, self._setup.delays.delayed(message, seconds), partial(self.refuse, request))

    def refuse(self, request: Request, error: Exception) -> None:
        """Dead-letter a message that is no task message, with the reason."""
        self._report.rejected(request, error)
        self._end(request, self._endings.refused(request, error))

    def dead_letter(self, request: Request, reason: str) -> None:
        """Dead-letter a task whose process died each time, the last time here."""
        self._end(request, self._endings.lost_finally(request, WorkerLostError(reason)))

    def _refuse_unknown(self, request: Request, strategy: TaskStrategy) -> bool:
        """There is no task of that name: dead-letter it with the reason. True: a slot does that, because the body is large."""
        error = NotRegistered(strategy.problem)
        self._report.unknown(request, error)
        if request.headers.get("compression") or len(request.body) > light_limit(request.content_type):
            return True
        self._end(request, self._endings.refused(request, error))
        return False

    def _revoke(self, request: Request) -> None:
        self._report.revoked(request)
        is_cancelled = self._revoked.in_tree(request.id, request.headers)
        self._end(request, self._endings.revoked(request, CANCELLED if is_cancelled else "revoked"))

    def _expire(self, request: Request) -> None:
        self._report.revoked(request, expired=True)
        self._end(request, self._endings.expired(request))

    def _end(self, request: Request, outcome: Outcome) -> None:
        self._report.ended(request, outcome)
        self._finisher.finish(request, outcome)

    # -- requests whose ETA is a moment away

    def _eta_reached(self, request: Request) -> None:
        if self._soon.pop(request.number, None) is not None:
            self._ready(request)

    @property
    def soon(self) -> list[Request]:
        """The requests that wait here for their ETA."""
        return [request for request, _ in self._soon.values()]

    def clear(self) -> list[Request]:
        """Remove and return the requests that wait for their ETA (to be given back, or void)."""
        requests = self.soon
        for _, timer in self._soon.values():
            timer.cancel()
        self._soon.clear()
        return requests


def _begun_anew(request: Request) -> int:
    count = request.headers.get(BEGUN_ANEW)
    return count if isinstance(count, int) and count > 0 else 0
