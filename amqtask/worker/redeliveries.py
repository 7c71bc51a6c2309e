"""A memory of deliveries whose channel was lost before they were answered, so that a redelivery is not run twice.

When a connection is lost the broker requeues every unanswered message, also those whose tasks still run here.
Such a task is an *orphan*: the broker cannot get its answer. Its message comes again, marked redelivered, with the
same task id and the same number of retries (a retry of the same id is another run and must not be mistaken for it).
There are three cases: the orphan has ended, then the redelivery gets its answer; it still runs, then the redelivery
is parked until it ends; the message is unknown, then it runs. The last acks before the loss may not have arrived, so
those tasks count as ended.

A redelivery comes soon after the loss, so an answer is remembered for minutes only. Callers may use an id twice.
When two unanswered messages of a lost channel have the same key, or one of them has the key of a task that was acked
recently, their redeliveries cannot be told apart: they run, as they would without this memory. A task may run twice,
but it must run.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, TypeAlias

from amqtask.execution.request import Answer

if TYPE_CHECKING:
    from amqtask.execution.request import Request
    from amqtask.ground.shapes import Headers

Key: TypeAlias = tuple[str, int]
# Acks that may be under way to the broker when the connection breaks.
ACKS_IN_FLIGHT = 1000
REMEMBERED_SECONDS = 600.0


def key_of(request: Request) -> Key:
    """The key by which a redelivery is recognised."""
    return _key(request.id, request.headers)


def _key(task_id: str, headers: Headers) -> Key:
    retries = headers.get("retries")
    return task_id, retries if isinstance(retries, int) else 0


class Redeliveries:
    """Orphans, their parked redeliveries, and the answers of those that ended (the newest `limit`)."""

    def __init__(self, limit: int = 10_000, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._clock = clock
        # The answer, and until when it is remembered; the oldest first.
        self._answers: OrderedDict[Key, tuple[Answer, float]] = OrderedDict()
        self._orphans: dict[Key, int] = {}
        self._parked: dict[Key, list[Request]] = {}
        self._acked: deque[Mapping[str, object]] = deque(maxlen=ACKS_IN_FLIGHT)
        # Called with the headers of every task that is acked; keys are computed only when a channel is lost.
        self.acked = self._acked.append

    def adopt(self, alive: Iterable[Request], waiting: Iterable[Request]) -> None:
        """A channel is lost: its `alive` requests run on, its `waiting` requests had not begun.

        Parked redeliveries came on that channel, too, and are void."""
        self._parked.clear()
        alive = list(alive)
        request_counts = Counter(key_of(request) for request in (*alive, *waiting))
        for key in request_counts:
            self._answers.pop(key, None)
        for request in alive:
            key = key_of(request)
            if request_counts[key] == 1:
                self._orphans[key] = request.number
        while self._acked:
            headers = self._acked.popleft()
            key = _key(str(headers.get("id") or ""), headers)
            if key[0] and key not in request_counts:
                self._remember(key, Answer.ACK)

    def recall(self, request: Request) -> Answer | None:
        """The answer of a task that ended here, for its redelivery; None when it is unknown."""
        answer, until = self._answers.get(key_of(request), (None, 0.0))
        return answer if self._clock() < until else None

    def park(self, request: Request) -> bool:
        """Keep the redelivery if its orphan still runs."""
        key = key_of(request)
        if key not in self._orphans:
            return False
        self._parked.setdefault(key, []).append(request)
        return True

    def ended(self, request: Request, answer: Answer) -> list[Request]:
        """An orphan ended; the parked redeliveries that get its answer. REQUEUE is forgotten: it is to run again."""
        key = key_of(request)
        if self._orphans.get(key) == request.number:
            del self._orphans[key]
            if answer is not Answer.REQUEUE:
                self._remember(key, answer)
        return self._parked.pop(key, [])

    def _remember(self, key: Key, answer: Answer) -> None:
        self._answers[key] = (answer, self._clock() + REMEMBERED_SECONDS)
        self._answers.move_to_end(key)
        if len(self._answers) > self._limit:
            self._answers.popitem(last=False)

    def give_up(self) -> list[Request]:
        """The worker stops: the parked redeliveries, to be given back."""
        parked = [request for requests in self._parked.values() for request in requests]
        self._parked.clear()
        return parked

    @property
    def parked(self) -> int:
        """How many redeliveries wait for an orphan."""
        return sum(map(len, self._parked.values()))
