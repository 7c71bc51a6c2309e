"""The deliveries of a worker and their answers: each gets exactly one of ack, reject or nack, on the channel that it came on.

`Deliveries` is the one place that answers. It keeps a `Ledger` of what is unanswered on the present channel, and `Redeliveries`,
a memory of what was unanswered when a channel was lost.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, NoReturn, TypeAlias

from amqtask.execution.request import Answer
from amqtask.worker.workflows import delivered

if TYPE_CHECKING:
    from amqtask.execution.request import Request
    from amqtask.ground.shapes import Headers
    from amqtask.protocol.message import Delivery
    from amqtask.transport.contract import Consumer


# -- The ledger: which deliveries of a channel are unanswered, and the fewest ack frames that answer the finished
# ones.
#
# Delivery tags of one channel count upwards and are void on any other channel, so the ledger knows one
# `epoch` (channel incarnation) at a time. `basic.ack` with `multiple` answers every unanswered tag up to and
# including its own. So at the end of a loop turn the finished tags below the oldest open one need one frame
# together; those above it (a long task is still running below them) need one each.
#
# Invariants: a tag is answered once; a `multiple` ack never covers an open tag, and names a tag that is
# itself unanswered. Memory is bound by the prefetch windows: only open tags and those finished in this turn
# are kept. Each operation is O(1) amortised; the search for the oldest open tag passes over the entries that
# a dictionary keeps of deleted keys, which are as many as it has slots at most, once per turn.


class Acks(NamedTuple):
    """What to send: `upto` with `multiple=True` first (0: nothing), then `singles`, each alone."""

    upto: int
    singles: list[int]


NOTHING = Acks(0, [])


class Ledger:
    """Outstanding delivery tags of one epoch."""

    __slots__ = ("_finished", "_open", "epoch")

    def __init__(self, epoch: int = 0) -> None:
        self.epoch = epoch
        # The queue of each.
        self._open: dict[int, str] = {}
        self._finished: list[int] = []

    def begin(self, epoch: int) -> None:
        """A new channel: all tags of the old one are void."""
        self.epoch = epoch
        self._open = {}
        self._finished = []

    def add(self, tag: int, queue: str = "") -> None:
        """A delivery of the queue came; tags come in rising order."""
        self._open[tag] = queue

    def is_open(self, tag: int) -> bool:
        """Whether the delivery has neither an answer nor been finished."""
        return tag in self._open

    def finish(self, tag: int) -> None:
        """Ack this delivery at the end of the turn."""
        del self._open[tag]
        self._finished.append(tag)

    def drop(self, tag: int) -> None:
        """Forget a delivery that the caller answers now (reject, nack, or an ack of its own)."""
        del self._open[tag]

    def flush(self) -> Acks:
        """The frames that ack all deliveries finished since the last flush."""
        finished = self._finished
        if not finished:
            return NOTHING
        self._finished = []
        if len(finished) == 1:
            return Acks(0, finished)
        if not self._open:
            return Acks(max(finished), [])
        oldest_open = next(iter(self._open))
        prefix = [tag for tag in finished if tag < oldest_open]
        if len(prefix) < 2:
            return Acks(0, finished)
        return Acks(max(prefix), [tag for tag in finished if tag > oldest_open])

    @property
    def outstanding(self) -> int:
        """How many deliveries have no answer yet (finished ones that wait for the flush included)."""
        return len(self._open) + len(self._finished)

    def outstanding_of(self, queue: str) -> int:
        """How many of them are the queue's, at most: of those that wait for the flush it is not known."""
        return sum(name == queue for name in self._open.values()) + len(self._finished)

    @property
    def open_tags(self) -> tuple[int, ...]:
        """The tags of deliveries that are not finished, oldest first."""
        return tuple(self._open)


# -- A memory of deliveries whose channel was lost before they were answered, so that a redelivery is not run twice.
#
# When a connection is lost the broker requeues every unanswered message, also those whose tasks still run here.
# Such a task is an *orphan*: the broker cannot get its answer. Its message comes again, marked redelivered, with the
# same task id and the same number of retries (a retry of the same id is another run and must not be mistaken for it).
# There are three cases: the orphan has ended, then the redelivery gets its answer; it still runs, then the redelivery
# is parked until it ends; the message is unknown, then it runs. The last acks before the loss may not have arrived, so
# those tasks count as ended.
#
# A redelivery comes soon after the loss, so an answer is remembered for minutes only. Callers may use an id twice.
# When two unanswered messages of a lost channel have the same key, or one of them has the key of a task that was acked
# recently, their redeliveries cannot be told apart: they run, as they would without this memory. A task may run twice,
# but it must run.

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
            if request_counts[key] == 1 and key[0]:  # without an id it may be any other
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


# -- `Deliveries` has all that an answer needs: the open tags of the present channel (the ledger), the channel's epoch, the
# requests that are acked before they run, and the memory of deliveries whose channel was lost. Nothing else answers the
# broker.

# The epoch of no channel: no delivery has it.
NO_EPOCH = -1


class Deliveries:
    """Answers deliveries. When their channel is lost, `unanswered` returns the requests that go on and those that had not begun;
    `changed` is called after each answer."""

    def __init__(
        self,
        consumer: Consumer,
        *,
        unanswered: Callable[[], tuple[list[Request], list[Request]]],
        changed: Callable[[], None],
    ) -> None:
        self._consumer = consumer
        self.redeliveries = Redeliveries()
        self._unanswered = unanswered
        self._changed = changed
        self._ledger = Ledger(NO_EPOCH)
        # The numbers of requests of tasks that must run at most once: acked before the run.
        self.acks_early: set[int] = set()

    def came(self, delivery: Delivery) -> None:
        """A delivery came; from now on it needs an answer."""
        if delivery.epoch != self._ledger.epoch:
            self.begin(delivery.epoch)
        self._ledger.add(delivery.tag, delivery.queue)

    def is_present(self, request: Request) -> bool:
        """Whether the channel that it came on is still open."""
        return bool(request.delivery.epoch == self._ledger.epoch)

    @property
    def outstanding(self) -> int:
        """How many deliveries have no answer yet."""
        return self._ledger.outstanding

    def outstanding_of(self, queue: str) -> int:
        """How many deliveries of the queue have no answer yet, at most."""
        return self._ledger.outstanding_of(queue)

    # -- answers

    def ack_early(self, request: Request) -> None:
        """Ack before the run, for a task that must run at most once."""
        delivery = request.delivery
        if delivery.epoch == self._ledger.epoch:
            self._ledger.drop(delivery.tag)
            self._consumer.ack(delivery.tag)

    def ack(self, requests: Sequence[Request]) -> None:
        """The answer of most: their outcomes publish nothing."""
        self.look_at_channel()
        epoch, finish, acked = self._ledger.epoch, self._ledger.finish, self.redeliveries.acked
        for request in requests:
            delivery = request.delivery
            if delivery.epoch == epoch and not self.acks_early and request.first is None:
                finish(delivery.tag)
                acked(request.headers)
            else:
                self.answer(request, Answer.ACK)

    def answer(self, request: Request, answer: Answer) -> None:
        """The end of a delivery: all messages of its outcome have been confirmed. Acks go out with the next `flush`."""
        self.look_at_channel()
        delivery, ledger = request.delivery, self._ledger
        if delivery.epoch != ledger.epoch:
            # Its channel is gone, so it cannot be answered; its redelivery will get this answer.
            self.acks_early.discard(request.number)
            for parked in self.redeliveries.ended(delivered(request), answer):
                self.answer(parked, answer)
        elif not ledger.is_open(delivery.tag):  # it was acked early
            self.acks_early.discard(request.number)
        else:
            self._tell_broker(delivery.tag, answer)
            if self.acks_early:
                self.acks_early.discard(request.number)
            if answer is not Answer.REQUEUE:
                self.redeliveries.acked(delivered(request).headers)
        self._changed()

    def _tell_broker(self, tag: int, answer: Answer) -> None:
        match answer:
            case Answer.ACK | Answer.DEAD_LETTER:  # the dead letter has been confirmed
                self._ledger.finish(tag)
            case Answer.REQUEUE:
                self._ledger.drop(tag)
                self._consumer.reject(tag, requeue=True)
            case Answer.DROP:
                self._ledger.drop(tag)
                self._consumer.reject(tag, requeue=False)
            case _:
                _never(answer)

    def give_back(self, requests: Iterable[Request]) -> None:
        """Requeue requests that have not run, but for those that were acked early."""
        for request in requests:
            self.give_back_delivery(request.delivery)
            self.acks_early.discard(request.number)

    def give_back_delivery(self, delivery: Delivery) -> None:
        """With nack, not reject: on RabbitMQ 4.3 that does not count as a failed delivery."""
        self.look_at_channel()
        if delivery.epoch == self._ledger.epoch and self._ledger.is_open(delivery.tag):
            self._ledger.drop(delivery.tag)
            self._consumer.nack(delivery.tag, requeue=True)

    def flush(self) -> None:
        """Send the acks of finished deliveries."""
        self.look_at_channel()
        acks = self._ledger.flush()
        if acks.upto:
            self._consumer.ack(acks.upto, multiple=True)
        for tag in acks.singles:
            self._consumer.ack(tag)

    # -- the channel

    def look_at_channel(self) -> None:
        """A channel may be gone before its event comes; its tags must not be answered on the next channel."""
        if self._consumer.epoch != self._ledger.epoch:
            self.begin(self._consumer.epoch)

    def begin(self, epoch: int) -> None:
        """Deliveries of the old channel are void: waiting requests are dropped, running ones become orphans."""
        if epoch == self._ledger.epoch:
            return
        alive, waiting = self._unanswered()
        orphans = [delivered(request) for request in alive if self.is_present(request)]
        self.acks_early.difference_update([request.number for request in waiting])
        self.redeliveries.adopt(orphans, [delivered(request) for request in waiting])
        self._ledger.begin(epoch)


def _never(value: NoReturn) -> NoReturn:
    raise AssertionError(f"unhandled: {value!r}")
