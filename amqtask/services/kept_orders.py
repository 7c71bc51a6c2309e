"""What operators have ordered and the broker keeps: which queues are paused, which tasks are revoked.

RevokeReader reads the revokes, first all of them, then each as it comes; and writes down those that somebody else's program gave.
A worker starts no task before it has read what was kept when it started, but at most for HOLD_SECONDS from when it consumes its
queues: a journal that cannot be read must not stop it.

A client of ours writes its order down itself. One of Celery's is heard by all workers; each waits a random part of
SPREAD_SECONDS, and then writes it down unless another has. So it is written once, or a few times, which does no harm.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from amqtask.exceptions import (
    AccessRefused,
    EncodeError,
    MessageError,
    MessageTooLarge,
    OperationalError,
    QueueNotFound,
    Undecodable,
)
from amqtask.ground.loop import OneTimer
from amqtask.ground.printable import bounded_logger, count, printable
from amqtask.protocol.control import CANCEL, TREE
from amqtask.protocol.message import OddHeaders
from amqtask.remote.kept import AT, JOURNAL, KEPT, MARK, ORDERS, NotOurs, is_refused
from amqtask.services.revoking import ids_of, matcher, stamps_of
from amqtask.transport.contract import OFFSET

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from amqtask.ground.shapes import CommandArguments
    from amqtask.pool import Loop
    from amqtask.protocol.control import Command
    from amqtask.protocol.message import Delivery
    from amqtask.remote.kept import KeptRevokes, Pauses
    from amqtask.transport.contract import Tail
    from amqtask.worker.dispatcher import Dispatcher
    from amqtask.worker.operations import Operations
    from amqtask.worker.revoked import Stamp

# -- Pausing: looks which queues are paused, when orders may have been missed: at the start, and after a lost connection.

logger = bounded_logger("amqtask.worker")

# Seconds before another look, when the broker could not be asked.
PAUSES_RETRY_SECONDS = 1.0
# Before one after orders may have been missed: a worker that starts, or connects again, has tasks to see to first.
PAUSES_LOOK_SECONDS = 0.2


class Pausing:
    """The broker is asked in a thread: the worker goes on meanwhile. Until the first answer nothing may be consumed: with
    `knows` the worker was started with one already."""

    name = "pausing"

    def __init__(self, operations: Operations, *, loop: Loop, pauses: Pauses, knows: bool) -> None:
        self._operations = operations
        self._loop = loop
        self._pauses = pauses
        self._knows = knows
        self._is_looking = False
        self._is_stopped = False
        self._timer = OneTimer(loop)

    def start(self) -> None:
        if not self._knows:
            logger.warning("worker: consumes nothing before the broker has told which queues are paused")
            self._look()

    def stop(self) -> None:
        self._is_stopped = True
        self._timer.cancel()

    def look(self) -> None:
        """Ask soon, and do what the answer says."""
        if not self._is_stopped:
            self._timer.set(PAUSES_LOOK_SECONDS, self._look)

    def _look(self) -> None:
        if not self._is_looking and not self._is_stopped:
            self._is_looking = True
            threading.Thread(target=self._ask, name="amqtask pauses", daemon=True).start()

    def _ask(self) -> None:
        try:
            paused = read_pauses(self._pauses, knows=self._knows)
        except Exception:
            logger.exception("worker: the paused queues cannot be read")
            paused = None
        if not self._is_stopped:
            self._loop.call_soon_threadsafe(lambda: self._answered(paused))

    def _answered(self, paused: frozenset[str] | None) -> None:
        self._is_looking = False
        if self._is_stopped:
            return
        if paused is not None:
            self._knows = True
            self._operations.keep_paused(paused)
        elif not self._knows:
            self._timer.set(PAUSES_RETRY_SECONDS, self._look)


def read_pauses(pauses: Pauses, *, knows: bool = False) -> frozenset[str] | None:
    """The paused queues; None when the broker cannot be asked now. Who may not ask is told that, and none is paused.

    What somebody else has written there is nothing new to who `knows`, else none is paused: no worker would ever consume.
    """
    try:
        return frozenset(pauses.read())
    except AccessRefused as error:
        logger.warning("worker: the paused queues cannot be read, so none is taken for paused: %s", error)
        return frozenset()
    except NotOurs as error:
        logger.warning("worker: which queues are paused now is not known: %s", error)
        return None if knows else frozenset()
    except OperationalError as error:
        logger.debug("worker: the paused queues cannot be read now: %s", error)
        return None


# -- Revokes

HOLD_SECONDS = 10.0
SPREAD_SECONDS = 1.0
# How long a read waits, after which the thread looks whether it is to end, and whether it has to write.
LOOK_SECONDS = 0.25
RETRY_SECONDS, REFUSED_SECONDS = 1.0, 60.0
STOP_SECONDS = 1.0
NOT_KEPT = "worker: revokes are not kept, so a worker that starts learns them only from workers that run"
# Entries in one read.
BATCH = 1000
# Ids and stamps that the loop learns in one go.
AT_ONCE = 5_000
# Orders that wait to be written down; while the broker takes none, the oldest go.
MOST_HEARD = 10_000


class _Said(NamedTuple):
    """What an order says, whoever gave it: two that say the same are one."""

    ids: tuple[str, ...]
    stamps: tuple[Stamp, ...]
    is_tree: bool


_Order = tuple[_Said, "CommandArguments"]


class RevokeReader:
    """Reads in a thread; what it finds is done on the loop. `is_ready`: whether the worker consumes its queues. `written` is
    called in the thread when nothing is left to write."""

    name = "revokes"

    def __init__(
        self,
        operations: Operations,
        dispatcher: Dispatcher,
        *,
        loop: Loop,
        revokes: KeptRevokes,
        is_ready: Callable[[], bool],
        written: Callable[[], None] = lambda: None,
    ) -> None:
        self._operations = operations
        self._dispatcher = dispatcher
        self._loop = loop
        self._revokes = revokes
        self._is_ready = is_ready
        self._written = written
        self._is_holding = False
        self._timer = OneTimer(loop)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="amqtask revokes", daemon=True)
        # Orders that were heard, and not yet taken by the thread.
        self._heard: deque[Command] = deque(maxlen=MOST_HEARD)
        # The thread's own: what it has to write, by what it says, with the time (monotonic) to do it at; the entry that it waits
        # for, and whether it came; where it is.
        self._unwritten: dict[_Said, tuple[float, Command]] = {}
        self._mark: str | None = None
        self._has_all = False
        self._position: object = None

    def start(self) -> None:
        """Hold the worker's tasks until all is read."""
        self._is_holding = True
        self._dispatcher.hold()
        self._timer.set(HOLD_SECONDS, self._too_late)
        self._thread.start()

    def stop(self) -> None:
        """Let the thread write what it still has to; when called again, wait for that."""
        if not self._stopping.is_set():
            self._stopping.set()
            self._timer.cancel()
        elif self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(STOP_SECONDS)

    def heard(self, command: Command) -> None:
        """A worker's mailbox had this: keep it, if it is an order that nobody has kept. On the loop."""
        is_for_all = command.destination is None and not command.pattern
        if command.method in ORDERS and is_for_all and not command.arguments.get(KEPT):
            self._heard.append(command)

    # -- on the loop

    def _too_late(self) -> None:
        if self._is_ready():
            logger.warning(
                "worker: the revokes that the broker keeps could not be read in %g s; tasks begin without", HOLD_SECONDS
            )
            self._release()
        else:
            self._timer.set(HOLD_SECONDS, self._too_late)

    def _release(self) -> None:
        if self._is_holding:
            self._is_holding = False
            self._timer.cancel()
            self._dispatcher.release()
            self._operations.wake()

    def _learn(self, orders: Sequence[_Order]) -> None:
        now = time.time()
        for (ids, stamps, is_tree), arguments in orders:
            if arguments.get(CANCEL):
                self._operations.ask_to_end(matcher(ids, is_tree=is_tree))
            self._operations.note_revoked(ids, stamps, _time_of(arguments.get(AT), now), tree=is_tree)
        self._operations.stop_revoked()

    # -- in the thread

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._follow()
            except (OperationalError, QueueNotFound) as error:
                self._wait_after(error)
            except Exception:  # whatever a client's library raises must not end it
                logger.exception("worker: the kept revokes cannot be read")
                self._stopping.wait(REFUSED_SECONDS)

    def _wait_after(self, error: OperationalError | QueueNotFound) -> None:
        if isinstance(error, OperationalError) and is_refused(error):
            self._revokes.tell_refused(NOT_KEPT, error)
            self._call(self._release)
            self._stopping.wait(REFUSED_SECONDS)
        else:
            logger.debug("worker: the kept revokes cannot be read now: %s", error)
            self._stopping.wait(RETRY_SECONDS)

    def _follow(self) -> None:
        """Read, and write, until the worker stops. Raises: OperationalError, QueueNotFound."""
        tail = self._revokes.tail(self._position)
        try:
            if not self._has_all:
                self._mark = self._revokes.mark(tail)
            while not self._stopping.is_set():
                self._read(tail)
                self._write(time.monotonic())
            self._write(float("inf"))
        finally:
            tail.close()

    def _read(self, tail: Tail) -> None:
        deliveries = tail.read(BATCH, LOOK_SECONDS)
        if not deliveries:
            return
        # The last one whose headers could be read.
        position = [offset for delivery in deliveries if (offset := _offset_of(delivery)) is not None][-1:]
        orders: list[_Order] = []
        is_all = False
        for delivery in deliveries:
            try:
                order = self._revokes.read(delivery)
                if order.method == MARK:
                    is_all |= order.arguments.get("name") == self._mark
                elif order.method in ORDERS:
                    said = _said(order)
                    orders.append((said, order.arguments))
                    self._unwritten.pop(said, None)
            except MessageError as error:
                logger.warning("worker: an entry among the kept revokes that is none: %s", error)
        tail.acknowledge()
        self._position = position[0] if position else self._position
        for portion in _portions(orders):
            self._have_learned(portion)
        if is_all:
            self._has_all = True
            logger.debug("worker: the kept revokes are read (%s last)", count(len(orders), "order"))
            self._call(self._release)

    def _have_learned(self, portion: Sequence[_Order]) -> None:
        """Wait for the loop, so that it has turns of its own between two portions."""
        learned = threading.Event()

        def learn() -> None:
            try:
                self._learn(portion)
            finally:
                learned.set()

        self._call(learn)
        while not (learned.wait(LOOK_SECONDS) or self._stopping.is_set()):
            pass

    def _call(self, callback: Callable[[], None]) -> None:
        """On the loop, unless that is about to end."""
        if not self._stopping.is_set():
            self._loop.call_soon_threadsafe(callback)

    def _write(self, until: float) -> None:
        """Write down what is due by then."""
        while self._heard and len(self._unwritten) < MOST_HEARD:
            order = self._heard.popleft()
            due = time.monotonic() + random.random() * SPREAD_SECONDS
            try:
                self._unwritten.setdefault(_said(order), (due, order))
            except MessageError as error:
                logger.debug("worker: an order that is none is not kept: %s", error)
        for said, (due, order) in list(self._unwritten.items()):
            if due <= until:
                try:
                    self._revokes.keep(order.method, order.arguments)
                except (EncodeError, MessageTooLarge) as error:
                    logger.warning("worker: an order cannot be kept: %s", error)
                del self._unwritten[said]
                self._written()


def _portions(orders: Iterable[_Order]) -> Iterator[list[_Order]]:
    """The same orders, in portions that keep the loop for moments: anybody may have written many, or long ones."""
    portion: list[_Order] = []
    size = 0
    for (ids, stamps, is_tree), arguments in orders:
        for start in range(0, max(1, len(ids), len(stamps)), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            portion.append((_Said(ids[part], stamps[part], is_tree), arguments))
            size += len(ids[part]) + len(stamps[part])
            if size >= AT_ONCE or len(portion) >= AT_ONCE:
                yield portion
                portion, size = [], 0
    if portion:
        yield portion


def _offset_of(delivery: Delivery) -> object:
    """None where anybody wrote headers that cannot be read. Raises: OperationalError: reading would take it from others."""
    headers = delivery.properties.headers
    offset = (headers or {}).get(OFFSET)
    if offset is None and not isinstance(headers, OddHeaders):
        raise OperationalError(f"{JOURNAL!r} on the broker is no stream; delete it, and it is made as one")
    return offset


def _said(order: Command) -> _Said:
    """Raises: Undecodable. Anybody may write there."""
    arguments = order.arguments
    try:
        ids, stamps = sorted(ids_of(arguments)), sorted(stamps_of(arguments), key=repr)
    except (TypeError, ValueError, RecursionError) as error:
        raise Undecodable(
            f"a {order.method} with arguments that it does not have: {printable(str(error), 200)}"
        ) from error
    return _Said(tuple(ids), tuple(stamps), bool(arguments.get(TREE)))


def _time_of(at: object, now: float) -> float:
    """When an order was given: not in the future, as far as this host's clock knows."""
    try:
        return min(now, float(at)) if isinstance(at, (int, float)) and math.isfinite(at) else now
    except OverflowError:
        return now
