"""The scheduler: which entries are due, and what comes next. Pure: it is told the time, and tells what to send.

Every entry has a position, its last due time (for one that never ran, when it was first seen). What is due follows from
positions and the present time alone, so a scheduler that is given another one's positions goes on exactly where that
one ended.

    update(entries) ─► take(now) ─► what is due, in order ─► advance(due) once the broker has it ─► positions

**After a gap.** When the oldest missed due time of an entry is no older than `catch_up` seconds, each missed one is due:
that is a hand-over between beats, or a short outage of the broker. When it is older, only the last one is due: that is a
long stop, and nobody wants its flood. A crontab entry that is overdue for more than `deadline` seconds is left out.
"""

from __future__ import annotations

import heapq
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime, timedelta, timezone, tzinfo
from functools import partial
from typing import Any, NamedTuple

from amqtask.beat.contract import Entry
from amqtask.ground.printable import bounded_logger
from amqtask.schedules import checked_due, clocked, crontab, due_after, schedule

# -- Positions of entries (their last due times), and the form in which beats hand them to each other through the broker.
#
# The form is JSON: `{"v": 1, "entries": {name: [time, total_run_count, has_run]}}`, times in ISO 8601 with their offset.
# Readers ignore what they do not know, so that beats of different versions can follow each other.

VERSION = 1
# As many as a database's integer holds: anybody may have written the state, also a number that can be read and not written again.
_MOST_RUNS = 2**31 - 1
_LAST_YEAR = 9000


class Position(NamedTuple):
    """`since` is the last due time, or for an entry that never ran the moment at which it was first seen."""

    since: datetime
    total_run_count: int = 0
    has_run: bool = False


def encode_positions(positions: Mapping[str, Position]) -> bytes:
    """A state of positions as a message body."""
    entries = {
        name: [position.since.isoformat(), position.total_run_count, int(position.has_run)]
        for name, position in positions.items()
    }
    return json.dumps({"v": VERSION, "entries": entries}, separators=(",", ":")).encode()


def decode_positions(body: bytes) -> dict[str, Position]:
    """The positions of a message body. Raises: ValueError for what is no such state."""
    try:
        document = json.loads(body)
        return {str(name): _position(*fields[:3]) for name, fields in document["entries"].items()}
    except (
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        UnicodeDecodeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise ValueError(f"no state of a beat: {error!r}") from error


def _position(since: Any, count: Any = 0, has_run: Any = 0) -> Position:
    moment = datetime.fromisoformat(since)
    if moment.tzinfo is None:
        raise ValueError(f"a time without a zone: {since!r}")
    moment = moment.astimezone(timezone.utc)
    if not 1970 <= moment.year < _LAST_YEAR:  # where zones and schedules cannot count on
        raise ValueError(f"a time beyond the calendar: {since!r}")
    return Position(moment, max(0, min(int(count), _MOST_RUNS)), bool(has_run))


def merged_positions(states: Iterable[Mapping[str, Position]]) -> dict[str, Position]:
    """The furthest position of each entry."""
    furthest: dict[str, Position] = {}
    for state in states:
        for name, position in state.items():
            current = furthest.get(name)
            if current is None or _rank(position) > _rank(current):
                furthest[name] = position
    return furthest


def _rank(position: Position) -> tuple[bool, datetime, int]:
    # An entry that has run stands further than one that was only seen, whenever that was.
    return position.has_run, position.since, position.total_run_count


logger = bounded_logger("amqtask.beat")

# How long positions of entries that only other beats have are kept: a deployment replaces one version by the other.
FOREIGN_KEPT = timedelta(days=1)
# Clocks of several hosts differ by less than this; a last run that lies further ahead is not believed.
CLOCKS_DIFFER = timedelta(seconds=30)
_INSTANT = timedelta(microseconds=1)


class Due(NamedTuple):
    """An entry and the time it is due at: what gives a run its identity."""

    due_at: datetime
    entry: Entry
    # Whether it stands for earlier due times too, after a long stop.
    is_catch_up: bool = False


class Scheduler:
    """Holds entries and positions; nothing here waits, and nothing looks at a clock."""

    def __init__(self, zone: tzinfo, *, catch_up: float = 30.0, deadline: float | None = None) -> None:
        self._zone = zone
        self._catch_up = timedelta(seconds=catch_up)
        self._deadline = None if deadline is None else timedelta(seconds=deadline)
        self._entries: dict[str, Entry] = {}
        self._positions: dict[str, Position] = {}
        self._foreign: dict[str, Position] = {}
        # Where entries stood when they were disabled.
        self._disabled: dict[str, Position] = {}
        self._next: dict[str, datetime] = {}
        self._heap: list[tuple[datetime, int, str]] = []
        self._numbers = itertools.count()
        self._broken: set[str] = set()

    # -- entries and positions

    @property
    def entries(self) -> Mapping[str, Entry]:
        """All entries that were given, by name."""
        return self._entries

    @property
    def positions(self) -> dict[str, Position]:
        """Where all entries stand, those of other versions included."""
        return {**self._foreign, **self._positions}

    def resume(self, states: Iterable[Mapping[str, Position]], now: datetime) -> None:
        """Begin where other beats ended: with the furthest positions of `states` and of the entries' store."""
        remembered = {
            entry.name: Position(entry.last_due_at, entry.total_run_count, True)
            for entry in self._entries.values()
            # One that is to run once and is enabled has been enabled again, as far as its store knows.
            if entry.last_due_at is not None and not entry.one_off
        }
        furthest = merged_positions([*states, remembered])
        self._positions = {}
        for entry in self._entries.values():
            if entry.enabled:
                reached = furthest.pop(entry.name, Position(now, entry.total_run_count))
                self._positions[entry.name] = _unless_renewed(entry, reached, now)
        self._foreign = {
            name: position
            for name, position in furthest.items()
            if name not in self._entries and abs(now - position.since) < FOREIGN_KEPT
        }
        self._plan_all()

    def learn(self, states: Iterable[Mapping[str, Position]]) -> None:
        """Take positions of other beats for entries that never ran here and have run there."""
        furthest = merged_positions([self._positions, *states])
        for name, position in self._positions.items():
            if furthest[name] != position and not position.has_run:
                self._positions[name] = furthest[name]
                self._plan(name)

    def update(self, entries: Iterable[Entry], now: datetime) -> bool:
        """Replace the entries; returns whether positions changed. An entry that is new or enabled again begins now, and so
        does one whose times of day were changed; an interval goes on from its last due time."""
        before, self._entries = self._entries, {entry.name: entry for entry in entries}
        positions = {}
        for entry in self._entries.values():
            position = self._positions.get(entry.name)
            if not entry.enabled:
                if position is not None:
                    self._disabled[entry.name] = position
                continue
            old = before.get(entry.name)
            if position is None:
                position = _begun(entry, self._disabled.pop(entry.name, None), now)
            elif old is not None and old.schedule != entry.schedule:
                position = _after_change(entry, position, now)
            else:
                position = _unless_renewed(entry, position, now)
            positions[entry.name] = position
            self._foreign.pop(entry.name, None)
        changed = positions != self._positions
        self._positions = positions
        self._broken.intersection_update(self._entries)
        self._plan_all()
        return changed

    # -- what is due

    def take(self, now: datetime) -> list[Due]:
        """The runs that are due at or before `now`, in order; the same again until `advance` is called for them."""
        self._pull_back(now)
        names = set()
        while self._heap and self._heap[0][0] <= now:
            due_at, _, name = heapq.heappop(self._heap)
            if self._next.get(name) == due_at:
                names.add(name)
        due_now = []
        for name in names:
            dues = list(self._dues(self._entries[name], now))
            if dues:
                self._push(name, dues[0].due_at)  # until it is advanced
                due_now += dues
            else:
                self._plan(name)  # too late for it: its position has moved on
        return sorted(due_now, key=lambda due: (due.due_at, due.entry.name))

    def _pull_back(self, now: datetime) -> None:
        """Reset positions in the future, which a clock that was ahead has left: nothing would be due before that time."""
        for name, position in self._positions.items():
            if position.since - now > CLOCKS_DIFFER:
                logger.warning(
                    "beat: %s ran last at %s, which is in the future: a clock was wrong. It goes on from now",
                    name,
                    position.since,
                )
                self._positions[name] = position._replace(since=now)
                self._plan(name)

    def advance(self, due: Due) -> int:
        """Note that a run was sent, or cannot be; returns how often the entry has run in all."""
        name = due.entry.name
        position = self._positions.get(name)
        if position is None:
            return due.entry.total_run_count
        count = position.total_run_count + 1
        self._positions[name] = Position(due.due_at, count, True)
        if name in self._entries:
            self._plan(name)
        return count

    @property
    def next_at(self) -> datetime | None:
        """The next time at which any entry is due."""
        while self._heap and self._next.get(self._heap[0][2]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def next_of(self, name: str) -> datetime | None:
        """The next time at which one entry is due; None when never, or when it is disabled."""
        return self._next.get(name)

    def upcoming(self, until: datetime) -> Iterator[Due]:
        """The runs that will be due up to `until`, in order, as if each were sent in time. Changes the positions."""
        while (moment := self.next_at) is not None and moment <= until:
            for due in self.take(moment):
                yield due
                self.advance(due)

    # -- one entry

    def _dues(self, entry: Entry, now: datetime) -> Iterator[Due]:
        first = self._next[entry.name]
        if now - first > self._catch_up:
            latest = self._latest(entry, first, now)
            if self._is_in_time(entry, latest, now):
                yield Due(latest, entry, latest != first)
            else:
                self._skip(entry.name, latest)
            return
        due: datetime | None = first
        while due is not None and due <= now:
            if self._is_in_time(entry, due, now):
                yield Due(due, entry)
            else:
                self._skip(entry.name, due)
            if entry.one_off:
                return
            due = self._answer(entry, partial(self._following, entry, due))

    def _latest(self, entry: Entry, first: datetime, now: datetime) -> datetime:
        end = now if entry.expires is None else min(now, entry.expires - _INSTANT)
        latest = self._answer(entry, partial(self._latest_due, entry, first, end))
        return first if latest is None else latest

    def _latest_due(self, entry: Entry, after: datetime, until: datetime) -> datetime | None:
        latest = checked_due(entry.schedule.latest_due(after, until, self._zone), "latest_due")
        return latest if latest is None or after < latest <= until else None

    def _is_in_time(self, entry: Entry, due: datetime, now: datetime) -> bool:
        if self._deadline is None or not isinstance(entry.schedule, crontab) or now - due <= self._deadline:
            return True
        logger.warning("beat: %s was due at %s, longer ago than beat_cron_starting_deadline: left out", entry.name, due)
        return False

    def _skip(self, name: str, due: datetime) -> None:
        position = self._positions[name]
        self._positions[name] = position._replace(since=due, has_run=True)

    def _plan_all(self) -> None:
        self._next.clear()
        self._heap.clear()
        for name in self._positions:
            self._plan(name)

    def _plan(self, name: str) -> None:
        self._next.pop(name, None)
        entry, position = self._entries[name], self._positions[name]
        due = self._answer(entry, partial(self._due_after, entry, position))
        if due is not None:
            self._push(name, due)

    def _answer(self, entry: Entry, question: Callable[[], datetime | None]) -> datetime | None:
        """None where the schedule, which may be the user's own, or a library's, cannot answer: the other entries go on."""
        try:
            return question()
        except Exception:
            if entry.name not in self._broken:
                self._broken.add(entry.name)
                logger.exception("beat: cannot work out when %s is due; it is left out", entry.name)
            return None

    def _push(self, name: str, due: datetime) -> None:
        self._next[name] = due
        heapq.heappush(self._heap, (due, next(self._numbers), name))

    def _due_after(self, entry: Entry, position: Position) -> datetime | None:
        if entry.one_off and position.has_run:
            return None
        if position.has_run:
            return self._following(entry, position.since)
        start = entry.start_time
        if start is not None and _counts_from_start(entry):
            if start > position.since:
                return self._unless_ended(entry, start)
            return self._following(entry, self._latest_due(entry, start, position.since) or start)
        if start is not None and start > position.since:
            return self._following(entry, start - _INSTANT)
        first = checked_due(entry.schedule.first_due(position.since, self._zone), "first_due")
        return self._unless_ended(entry, first)

    def _following(self, entry: Entry, since: datetime) -> datetime | None:
        due = due_after(entry.schedule, since, self._zone)
        if due is not None and entry.start_time is not None and due < entry.start_time:
            if _counts_from_start(entry):
                due = entry.start_time
            else:
                due = due_after(entry.schedule, entry.start_time - _INSTANT, self._zone)
        return self._unless_ended(entry, due)

    def _unless_ended(self, entry: Entry, due: datetime | None) -> datetime | None:
        return None if due is not None and entry.expires is not None and due >= entry.expires else due


def _begun(entry: Entry, before: Position | None, now: datetime) -> Position:
    """Where an entry begins that is new, or enabled again: what was due meanwhile is not made up for, whoever leads next."""
    has_run = entry.last_due_at is not None or (before is not None and before.has_run)
    count = entry.total_run_count if before is None else max(before.total_run_count, entry.total_run_count)
    return Position(now, count, has_run and not entry.one_off)


def _counts_from_start(entry: Entry) -> bool:
    """Whether an entry runs first at its start time, if it has one: an interval that is not relative."""
    return isinstance(entry.schedule, schedule) and not entry.schedule.relative


def _unless_renewed(entry: Entry, position: Position, now: datetime) -> Position:
    """A store disables a one-off entry when it learns of the run: an enabled one whose run it knows was enabled again."""
    is_told = entry.last_due_at is not None and entry.last_due_at >= position.since
    return Position(now, entry.total_run_count) if entry.one_off and position.has_run and is_told else position


def _after_change(entry: Entry, position: Position, now: datetime) -> Position:
    if isinstance(entry.schedule, schedule):
        return position
    if isinstance(entry.schedule, clocked):
        return Position(now, position.total_run_count)
    return position._replace(since=max(position.since, now))
