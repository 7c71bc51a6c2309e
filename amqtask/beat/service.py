"""Beat: one page on which the life of a due time can be read. Rides on an I/O loop, of its own or a worker's.

    timer ─► scheduler.take(now) ─► publish each ─confirm─► scheduler.advance ─► leadership.save ─confirm─► store.record ─► timer

Nothing is taken while something is on its way, and nothing while another beat leads.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from amqtask.beat.contract import Entry, Run
from amqtask.beat.scheduler import decode_positions, encode_positions
from amqtask.exceptions import AmqTaskError, ConnectionBlocked, PublishError, PublishRefused, PublishTimeout, line_of
from amqtask.flow.keys import TAKEN, UNIQUE
from amqtask.ground.loop import OneTimer, Ticker
from amqtask.ground.printable import bounded_logger

if TYPE_CHECKING:
    from amqtask.beat.contract import ScheduleStore
    from amqtask.beat.leader import LeaderListener, Leadership
    from amqtask.beat.scheduler import Due, Position, Scheduler
    from amqtask.beat.sender import AppSender
    from amqtask.pool import Loop
    from amqtask.protocol.message import Message
    from amqtask.transport.contract import LoopPublisher


# -- The clerk: calls a store of entries on a thread of its own, so that a slow database never holds up the I/O loop.

logger = bounded_logger("amqtask.beat")
T = TypeVar("T")
CLOSE_SECONDS = 5.0

_Job = Callable[["ScheduleStore"], None]


class Clerk:
    """Opens the store with the first question and answers all in their order. `ask` and `close` on the loop's thread."""

    def __init__(self, open_store: Callable[[], ScheduleStore], loop: Loop) -> None:
        self._open = open_store
        self._loop = loop
        self._jobs: queue.SimpleQueue[tuple[_Job, Callable[[Exception], None]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._store: ScheduleStore | None = None
        self._is_closed = False

    def ask(
        self,
        question: Callable[[ScheduleStore], T],
        on_answer: Callable[[T], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        """Call `question(store)` on the store's thread; `on_answer` or `on_error` follows on the loop."""

        def job(store: ScheduleStore) -> None:
            answer = question(store)
            self._tell(lambda: on_answer(answer))

        if self._is_closed:
            return
        self._jobs.put((job, on_error))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="beat store", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Answer what was asked, close the store; waits for that, but not for a store that hangs."""
        if self._is_closed:
            return
        self._is_closed = True
        self._jobs.put(None)
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)
            if self._thread.is_alive():
                logger.warning("beat: the schedule store does not answer; leaving it behind")

    def _run(self) -> None:
        while (queued := self._jobs.get()) is not None:
            job, on_error = queued
            try:
                if self._store is None:
                    self._store = self._open()
                job(self._store)
            except Exception as error:  # noqa: BLE001 - whatever a store raises is told to who asked
                self._tell(partial(on_error, error))
        if self._store is not None:
            try:
                self._store.close()
            except Exception:  # a store of the user's own
                logger.exception("beat: the schedule store could not be closed")

    def _tell(self, callback: Callable[[], None]) -> None:
        if not self._is_closed:
            self._loop.call_soon_threadsafe(callback)


# The state is stored anew at least this often: see leader.py.
REFRESH_SECONDS = 60.0
# What a beat stored so long ago it does not tell to others any more.
KNOWN_SECONDS = 300.0
# What may pass: a due time that the broker does not take for one of these stays due, and is published again so much later.
PASSING = (ConnectionBlocked, PublishRefused, PublishTimeout)
AGAIN_SECONDS = 1.0
# Before another attempt to read what is paused.
RETRY_SECONDS = 1.0
LAST = datetime.max.replace(tzinfo=timezone.utc)
# The longest sleep, so that a clock that was set is noticed.
LONGEST_SLEEP = 5.0


class Beat:
    """Sends what is due while it leads. `start`, `stop`; `on_failed` when it can not take part at all.

    `read_paused` says which entries are paused (it may block); nothing is sent before it has, each time that this beat begins to
    lead. It is asked again whenever a state comes from elsewhere: who changes a pause sends one.
    """

    name = "beat"

    def __init__(
        self,
        *,
        loop: Loop,
        clerk: Clerk,
        scheduler: Scheduler,
        sender: AppSender,
        publisher: LoopPublisher,
        make_leadership: Callable[[LeaderListener, Callable[[], bytes]], Leadership],
        read_paused: Callable[[], frozenset[str]] | None = None,
        max_interval: float | None = None,
        on_start: Callable[[Beat], None] = lambda beat: None,
        on_failed: Callable[[Exception], None] = lambda error: None,
        clock: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
    ) -> None:
        self._loop = loop
        self._clerk = clerk
        self.scheduler = scheduler
        self._sender = sender
        self._publisher = publisher
        self._leadership = make_leadership(self, self._recent_state)
        self._read_paused = read_paused
        self._paused: frozenset[str] = frozenset()
        self._knows_pauses = read_paused is None
        self._told: list[Entry] = []
        self._again = OneTimer(loop)
        self._max_interval = max_interval
        self._on_start = on_start
        self._on_failed = on_failed
        self._clock = clock
        self._poll: Ticker | None = None
        self._timer = OneTimer(loop)
        self._is_started = False
        self._is_stopped = False
        self._on_stopped: Callable[[], None] | None = None
        # A number for each time of leading; answers to an earlier one's questions count for nothing.
        self._term = 0
        # Whether something is on its way to the broker.
        self.is_busy = False
        self._is_dirty = False
        # What is wrong with entries that cannot be sent, as it was told; forgotten when one is sent.
        self._wrong: dict[str, str] = {}
        # Entries that the broker does not take; and whether it just refused one, so that the next attempt has time.
        self._refused: set[str] = set()
        self._is_refused = False
        self._saved_at: datetime | None = None
        # What the broker last confirmed.
        self._saved: bytes = encode_positions({})
        self._store_fails = False

    @property
    def is_leading(self) -> bool:
        """Whether this beat leads, and so sends."""
        return self._leadership.is_leading

    # -- start and stop

    def start(self) -> None:
        """Read the entries, then take part in the election."""
        if not self._is_started:
            self._is_started = True
            self._on_start(self)
            logger.info("beat: Starting...")
            self._clerk.ask(lambda store: (float(store.poll_seconds), list(store.entries())), self._begin, self._fail)

    def stop(self, on_stopped: Callable[[], None] | None = None) -> None:
        """Send nothing more; the next beat goes on at once. Waits for nobody when `on_stopped` is not given."""
        if self._is_stopped:
            return
        self._is_stopped = True
        logger.info("beat: Shutting down...")
        self._cancel_timers()
        self._on_stopped = on_stopped
        if on_stopped is None or not self.is_busy:
            self._close()

    def _close(self) -> None:
        on_stopped, self._on_stopped = self._on_stopped, None
        self._term += 1
        self._clerk.close()
        self._leadership.stop(on_stopped)

    def _begin(self, loaded: tuple[float, list[Entry]]) -> None:
        if self._is_stopped:
            return
        poll_seconds, entries = loaded
        interval = min(poll_seconds, self._max_interval) if self._max_interval else poll_seconds
        self._told = entries
        self._check(entries)
        self.scheduler.update(self._entries(), self._clock())
        self._poll = Ticker(self._loop, max(0.1, interval), self._look_for_changes)
        self._poll.start()
        self._leadership.start()

    def _fail(self, error: Exception) -> None:
        # What was said on purpose needs no traceback.
        logger.critical("beat: cannot start: %s", error, exc_info=None if isinstance(error, AmqTaskError) else error)
        self._on_failed(error)

    def _cancel_timers(self) -> None:
        self._timer.cancel()
        self._again.cancel()
        if self._poll is not None:
            self._poll.stop()

    # -- the entries

    def _look_for_changes(self) -> None:
        def changed(store: ScheduleStore) -> list[Entry] | None:
            return list(store.entries()) if store.has_changed() else None

        self._clerk.ask(changed, self._take_entries, self._store_failed)

    def _take_entries(self, entries: Iterable[Entry] | None) -> None:
        if self._store_fails:
            self._store_fails = False
            logger.warning("beat: the schedule store answers again")
        if entries is None or self._is_stopped:
            return
        logger.info("beat: the schedule has changed")
        self._told = list(entries)
        self._check(self._told)
        self._is_dirty |= self.scheduler.update(self._entries(), self._clock())
        self._tick()

    def _check(self, entries: Iterable[Entry]) -> None:
        """Name the entries that cannot be sent as they are: the first due time may be far."""
        for entry in entries:
            if entry.enabled:
                try:
                    self._sender.check(entry)
                except Exception as error:  # noqa: BLE001 - the other entries go on
                    self._cannot(entry, error)

    def _cannot(self, entry: Entry, error: Exception) -> None:
        """One line for as long as the same is wrong with an entry."""
        if self._wrong.get(entry.name) != str(error):
            self._wrong[entry.name] = str(error)
            logger.error("beat: %s (%s) cannot be sent: %s", entry.name, entry.task, line_of(error))

    def _store_failed(self, error: Exception) -> None:
        if not self._store_fails:
            self._store_fails = True
            logger.error("beat: the schedule store fails, going on with what it told before: %s", error, exc_info=error)

    # -- pauses

    def _entries(self) -> list[Entry]:
        """The entries as the store told them; those that are paused are disabled."""
        return [replace(entry, enabled=False) if entry.name in self._paused else entry for entry in self._told]

    def _look_at_pauses(self) -> None:
        read, term = self._read_paused, self._term
        if read is None or self._is_stopped:
            return

        def taken(paused: frozenset[str]) -> None:
            if term == self._term:
                self._take_pauses(paused)

        def failed(error: Exception) -> None:
            if term == self._term:
                logger.warning("beat: what is paused cannot be read, trying again: %s", error)
                self._again.set(RETRY_SECONDS, self._look_at_pauses)

        self._clerk.ask(lambda store: read(), taken, failed)

    def _take_pauses(self, paused: frozenset[str]) -> None:
        self._knows_pauses = True
        before, self._paused = self._paused, paused
        for name in sorted(paused ^ before):
            logger.info("beat: %s is %s", name, "paused" if name in paused else "resumed")
        if paused != before:
            self._is_dirty |= self.scheduler.update(self._entries(), self._clock())
        self._tick()

    # -- leading

    def _recent_state(self) -> bytes:
        """The state that this beat seeds: its last saved one if that is fresh, else an empty one."""
        is_fresh = self._saved_at is not None and self._clock() - self._saved_at < timedelta(seconds=KNOWN_SECONDS)
        return self._saved if is_fresh else encode_positions({})

    def on_leading(self, states: Sequence[bytes]) -> None:
        """The broker has given this beat the state: go on from there."""
        self._term += 1
        self.is_busy = False
        self.scheduler.resume(_read([*states, self._recent_state()]), self._clock())
        self._is_dirty = True
        logger.info("beat: leading; entries: %d", len(self.scheduler.entries))
        self._knows_pauses = self._read_paused is None
        self._look_at_pauses()
        self._tick()

    def on_states(self, states: Sequence[bytes]) -> None:
        """Other beats have added states (a beat came, or the queue was made anew): learn from them."""
        self.scheduler.learn(_read(states))
        self._is_dirty = True
        self._look_at_pauses()
        self._tick()

    def on_following(self, reason: str) -> None:
        """Another beat leads, or will."""
        self._term += 1
        self.is_busy = False
        self._timer.cancel()
        logger.warning("beat: not leading any more (%s); another beat goes on, or this one when it can", reason)
        if self._is_stopped and self._on_stopped is not None:
            self._close()

    def on_failed(self, error: Exception) -> None:
        """This beat cannot take part."""
        logger.critical("beat: cannot go on: %s", error)
        self._on_failed(error)

    # -- a due time

    def _tick(self) -> None:
        self._timer.cancel()
        if not self.is_leading or self.is_busy or self._is_stopped or not self._knows_pauses:
            return
        if self._is_refused:
            self._is_refused = False
            self._timer.set(AGAIN_SECONDS, self._tick)
            return
        now = self._clock()
        dues = self.scheduler.take(now)
        if dues:
            self._send(dues, now)
        elif self._is_dirty or self._saved_at is None or now - self._saved_at >= timedelta(seconds=REFRESH_SECONDS):
            self._save([])
        else:
            self._timer.set(self._sleep(now), self._tick)

    def _sleep(self, now: datetime) -> float:
        following = self.scheduler.next_at
        seconds = LONGEST_SLEEP if following is None else (following - now).total_seconds()
        return max(0.001, min(seconds, self._max_interval or LONGEST_SLEEP, LONGEST_SLEEP))

    def _send(self, dues: Sequence[Due], now: datetime) -> None:
        self.is_busy = True
        batch = _Batch(self._term, len(dues), self._sent)
        for due in dues:
            try:
                message = self._sender.compose(due)
            except Exception as error:  # noqa: BLE001 - arguments and routers are the user's; the other entries go on
                self._cannot(due.entry, error)
                batch.done(due, None)
                continue
            self._wrong.pop(due.entry.name, None)
            logger.info(
                "Scheduler: Sending due task %s (%s)%s",
                due.entry.name,
                due.entry.task,
                f", due at {due.due_at.isoformat()}" if due.is_catch_up else "",
            )
            if UNIQUE in message.properties.headers:
                self._claim(batch, due, message)
            else:
                self._publisher.publish(message, self._on_published(batch, due, message))

    def _claim(self, batch: _Batch, due: Due, message: Message) -> None:
        """Publish a unique task's message when its key is taken."""

        def taken(other: str | None) -> None:
            if batch.term != self._term:
                return
            if other is None:
                self._publisher.publish(message, self._on_published(batch, due, message))
                return
            name, task = due.entry.name, due.entry.task
            logger.info(
                "beat: %s (%s) is not sent: call %s, which waits or runs, has its unique key", name, task, other
            )
            batch.done(due, None)

        def failed(error: Exception) -> None:
            logger.error(
                "beat: no key for %s (%s), which is sent without it: %s", due.entry.name, due.entry.task, error
            )
            taken(None)

        self._clerk.ask(lambda store: self._sender.claim(message), taken, failed)

    def _on_published(self, batch: _Batch, due: Due, message: Message) -> Callable[[PublishError | None], None]:
        def on_published(error: PublishError | None) -> None:
            if batch.term != self._term:
                return
            passes = isinstance(error, PASSING)
            if error is not None:
                self._complain(due, error, passes=passes)
            else:
                self._refused.discard(due.entry.name)
            self._sender.settled(message, error)
            if TAKEN in message.properties.headers:
                self._clerk.ask(lambda store: self._sender.claimed(message, error), lambda _: None, self._not_told)
            batch.done(due, message if error is None else None, is_still_due=passes)

        return on_published

    def _complain(self, due: Due, error: PublishError, *, passes: bool) -> None:
        """Log an error once until the broker takes the message: what stays due is tried again every second."""
        level = logging.DEBUG if due.entry.name in self._refused else logging.ERROR
        consequence = "is tried again" if passes else "goes on with its next due time"
        logger.log(level, "beat: %s (%s) is not sent, and %s: %s", due.entry.name, due.entry.task, consequence, error)
        if passes:
            self._refused.add(due.entry.name)

    def _sent(self, batch: _Batch) -> None:
        """All messages of a batch are confirmed or given up: advance, save, and tell the store."""
        if batch.term != self._term:
            return
        runs, messages, now = [], [], self._clock()
        for due, message in sorted(batch.ended, key=lambda pair: pair[0].due_at):
            if due.due_at >= batch.still_due.get(due.entry.name, LAST):
                continue  # one that was taken after one that was not goes again too, under its id
            count = self.scheduler.advance(due)
            if message is not None:
                task_id = self._sender.task_id(due)
                runs.append(Run(due.entry.name, due.due_at, now, task_id, count, due.entry.one_off))
                messages.append(message)
        self._is_refused = bool(batch.still_due)
        self._save(runs)
        self._clerk.ask(lambda store: self._sender.published(messages), lambda _: None, self._not_told)

    def _not_told(self, error: Exception) -> None:
        logger.warning("beat: what became of sent tasks could not be told: %s", error)

    def _save(self, runs: Sequence[Run]) -> None:
        self.is_busy, self._is_dirty = True, False
        state, term = encode_positions(self.scheduler.positions), self._term

        def saved() -> None:
            if term != self._term:
                return
            self._saved, self._saved_at = state, self._clock()
            self.is_busy = False
            if runs:
                self._clerk.ask(lambda store: store.record(runs), lambda _: None, self._store_failed)
            if self._is_stopped:
                self._close()
            else:
                self._tick()

        self._leadership.save(state, saved)


class _Batch:
    """Messages that were published together."""

    def __init__(self, term: int, size: int, on_ended: Callable[[_Batch], None]) -> None:
        self.term = term
        self.ended: list[tuple[Due, Message | None]] = []
        # Entries that the broker may take later, each with the first of its due times.
        self.still_due: dict[str, datetime] = {}
        self._size = size
        self._on_ended = on_ended

    def done(self, due: Due, stored: Message | None, *, is_still_due: bool = False) -> None:
        """Note the end of one run: its message is stored, or there is none, or the broker may take it later."""
        if is_still_due:
            name = due.entry.name
            self.still_due[name] = min(due.due_at, self.still_due.get(name, LAST))
        self.ended.append((due, stored))
        if len(self.ended) == self._size:
            self._on_ended(self)


def _read(states: Sequence[bytes]) -> list[dict[str, Position]]:
    positions = []
    for state in states:
        try:
            positions.append(decode_positions(state))
        except ValueError as error:
            logger.error("beat: a state in the broker cannot be read and is left out: %s", error)
    return positions
