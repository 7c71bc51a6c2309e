"""What this worker remembers about deliveries whose channel died under them, so that a redelivery is not run
twice.

When a connection is lost the broker gives every unanswered message back, also those whose tasks still run
here. Such a task is an *orphan*: nobody can be told its answer. Its message comes again, marked
redelivered, with the same task id and the same number of retries (a retry of the same id is another run and
must not be mistaken for it). Three cases: the orphan has ended, then its answer is given again; it still
runs, then the redelivery is parked until it ends; we know nothing, then it runs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeAlias

from amqtask.execution.outcome import Answer

if TYPE_CHECKING:
    from amqtask.execution.request import Request

Key: TypeAlias = tuple[str, int]


def key_of(request: Request) -> Key:
    """What a redelivery is recognised by."""
    retries = request.headers.get("retries")
    return request.id, retries if isinstance(retries, int) else 0


class Answered:
    """Orphans, their parked redeliveries, and the answers of those that ended (the newest `limit`)."""

    def __init__(self, limit: int = 10_000) -> None:
        self._limit = limit
        self._answers: OrderedDict[Key, Answer] = OrderedDict()
        self._orphans: dict[Key, int] = {}
        self._parked: dict[Key, list[Request]] = {}

    def adopt(self, requests: Iterable[Request]) -> None:
        """Their channel died; they run on. Parked redeliveries came on that channel too and are void."""
        self._parked.clear()
        for request in requests:
            self._orphans[key_of(request)] = request.number

    def recall(self, request: Request) -> Answer | None:
        """The answer to a redelivery of something that ended here."""
        key = key_of(request)
        answer = self._answers.get(key)
        if answer is not None:
            self._answers.move_to_end(key)
        return answer

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
            self._answers[key] = answer
            if len(self._answers) > self._limit:
                self._answers.popitem(last=False)
        return self._parked.pop(key, [])

    def give_up(self) -> list[Request]:
        """The worker stops: what is parked goes back."""
        parked = [request for requests in self._parked.values() for request in requests]
        self._parked.clear()
        return parked

    @property
    def parked(self) -> int:
        """How many redeliveries wait for an orphan."""
        return sum(map(len, self._parked.values()))


class LostAttempts:
    """How often a message without `x-delivery-count` (classic queue) took its process with it; the newest `limit`."""

    def __init__(self, limit: int = 10_000) -> None:
        self._limit = limit
        self._counts: OrderedDict[str, int] = OrderedDict()

    def count(self, task_id: str) -> int:
        return self._counts.get(task_id, 0)

    def add(self, task_id: str) -> None:
        self._counts[task_id] = self._counts.get(task_id, 0) + 1
        self._counts.move_to_end(task_id)
        if len(self._counts) > self._limit:
            self._counts.popitem(last=False)

    def forget(self, task_id: str) -> None:
        self._counts.pop(task_id, None)
