"""`app.history`: search what happened to tasks. See docs/history.md."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, TypedDict

from amqtask.exceptions import ConfigurationError, MessageError
from amqtask.ground.lazy import lazy
from amqtask.history.index import HistoryIndex
from amqtask.history.records import FAILED_MARK, KEY_BITS, LONG, TaskRow, WorkerRow, key_at, mark, short
from amqtask.history.records import text as as_text
from amqtask.history.search import Question
from amqtask.history.tables import HAS_ROOT, TASKS
from amqtask.protocol.serialization import JSON, loads
from amqtask.states import FAILURE

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Tasks of one family that `get` shows.
MOST_RELATIVES = 500
# Tasks of one workflow that are shown.
MOST_OF_WORKFLOW = 1_000
Moment = datetime | timedelta | float
_JSON = frozenset((JSON,))


@dataclass(frozen=True, slots=True)
class Step:
    """What happened to a task: received, started, retried …, when, and in which process."""

    at: datetime
    event: str
    worker: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptMessage:
    """The whole message of a task, with task_history_arguments; `body` is base64."""

    body: str
    headers: Mapping[str, object]
    content_type: str | None = None
    content_encoding: str | None = None
    exchange: str = ""
    routing_key: str = ""
    priority: int | None = None
    correlation_id: str | None = None
    reply_to: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Following:
    """What comes after a task, by its message: the next steps of its chain (`how` is "chain"), the body of the chord that it is a
    part of ("chord", with the `size` of its header, and what comes after it: "then"), a callback ("link").

    `members` is a group's or chord's number of tasks. One without `task` says how many `more` there are."""

    how: str = ""
    task: str | None = None
    id: str | None = None
    members: int | None = None
    size: int | None = None
    more: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PastTask:
    """One task, as its events told. What no event told is None; texts are as they are shown in events (`argsrepr`).

    `waited` and `runtime` are seconds. `cursor` is for `after` of the next search. `joins` is the group whose results it gets.
    `can_run_again`: its `message` is kept, which is large: `get` and `by_ids` have it.
    """

    id: str
    name: str | None
    state: str
    queue: str | None
    worker: str | None
    args: str | None
    kwargs: str | None
    retries: int
    root_id: str | None
    parent_id: str | None
    rerun_of: str | None
    group_id: str | None
    group_index: int | None
    joins: str | None
    periodic: str | None
    follows: tuple[Following, ...]
    eta: str | None
    expires: str | None
    first: datetime
    sent: datetime | None
    received: datetime | None
    started: datetime | None
    ended: datetime | None
    waited: float | None
    runtime: float | None
    result: str | None
    exception: str | None
    error: str | None
    traceback: str | None
    stamps: Mapping[str, Sequence[str]]
    steps: tuple[Step, ...]
    can_run_again: bool
    cursor: str
    message: KeptMessage | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Page:
    """What `History.page` found. `next` is the `after` of the next page, None where nothing is left.

    `looked_to`: there was no time to look at tasks that are older than this; None where that does not matter."""

    tasks: tuple[PastTask, ...]
    next: str | None
    looked_to: datetime | None


class StateCounts(dict[str, int]):
    """How many tasks a search has, by state, the most first.

    With `has_more` there are others, which are older; where it took too long to look for them all, there may be others, before
    `looked_to`."""

    def __init__(self, counts: Mapping[str, int], most: int | None = None, looked_to: datetime | None = None) -> None:
        super().__init__(counts)
        self.total = sum(counts.values())
        self.looked_to = looked_to
        self.has_more = looked_to is not None or (most is not None and self.total > most)


@dataclass(frozen=True, slots=True)
class TaskHistory:
    """One task whole: itself, those that called it (the first one first), and those that it called."""

    task: PastTask
    parents: tuple[PastTask, ...]
    children: tuple[PastTask, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureGroup:
    """Failures of one task with one class of exception; `example` is the last of them.

    `seen_by` marked the group as seen at `seen_at`; `unseen` failed since then (all, where nobody did)."""

    name: str
    error: str
    count: int
    first: datetime
    last: datetime
    example: PastTask
    unseen: int
    seen_by: str | None = None
    seen_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class MinuteNumbers:
    """What happened in one minute. In seconds, `runtime` is the mean of the tasks that succeeded, `waited` that of the tasks that
    `started` without an eta: from when they were sent, or received."""

    at: datetime
    sent: int
    succeeded: int
    failed: int
    retried: int
    revoked: int
    runtime: float | None
    started: int = 0
    waited: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PastWorker:
    """A worker. `is_online` is what it said last; `is_gone`: it said no goodbye, and nothing else for three heartbeats."""

    hostname: str
    is_online: bool
    is_gone: bool
    since: datetime
    last_heard: datetime
    software: str | None
    processed: int | None
    active: int | None


class Search(TypedDict, total=False):
    """Which tasks are meant: see `History.find`."""

    state: str | Sequence[str] | None
    task: str | None
    queue: str | None
    worker: str | None
    since: Moment | None
    until: Moment | None
    text: str | None
    stamp: tuple[str, str] | None
    root_id: str | None
    error: str | None
    periodic: str | None
    after: str | None


class History:
    """Searches the index that `amqtask history` (or the console) fills.

    Each method raises IndexUnreachable, and ConfigurationError for a `history_url` that cannot be used.
    """

    def __init__(self, url: str) -> None:
        self._url = url

    @lazy
    def index(self) -> HistoryIndex:
        """The index itself."""
        return HistoryIndex(self._url)

    def find(
        self,
        *,
        state: str | Sequence[str] | None = None,
        task: str | None = None,
        queue: str | None = None,
        worker: str | None = None,
        since: Moment | None = None,
        until: Moment | None = None,
        text: str | None = None,
        stamp: tuple[str, str] | None = None,
        root_id: str | None = None,
        error: str | None = None,
        periodic: str | None = None,
        limit: int = 50,
        after: str | None = None,
    ) -> list[PastTask]:
        """Tasks for which all of this holds, the newest first.

        `since` and `until` are about a task's first event (sent or received): a datetime, a Unix time, or a timedelta before now.
        `text` are words in its arguments or its error (`addr*`: words that begin so); `stamp` is a stamp's name and value;
        `error` is the class of its exception; `periodic` is the name of a periodic task (its entry's in the schedule).
        `after` is the `cursor` of the last task of the page before.
        Raises: ConfigurationError.
        """
        search = Search(
            state=state, task=task, queue=queue, worker=worker, since=since, until=until, text=text, stamp=stamp,
            root_id=root_id, error=error, periodic=periodic, after=after,
        )  # fmt: skip
        questions = _asked(search)
        return [past_task(row) for row in self.index.select(*questions, limit=max(1, limit))]

    def page(self, *, limit: int = 50, is_whole: bool = False, **search: Unpack[Search]) -> Page:
        """`find` for somebody who waits: what is found within a quarter of a second, and from where to go on.

        A few searches take longer (words that many tasks have, but not next to each other): they look through some of the newest
        tasks, and say how far. `is_whole` looks through all, as `find` does. Raises: ConfigurationError.
        """
        questions = _asked(search)
        if is_whole:
            rows, bottom = self.index.select(*questions, limit=limit + 1), None
        else:
            rows, bottom = self.index.look(*questions, limit=limit + 1)
        tasks = tuple(past_task(row) for row in rows[:limit])
        if len(rows) > limit:
            return Page(tasks, tasks[-1].cursor, None)
        return Page(tasks, None, None) if bottom is None else Page(tasks, str(bottom), _of_key(bottom))

    def count(self, *, most: int | None = None, **search: Unpack[Search]) -> StateCounts:
        """How many tasks a search of `find` has, by state.

        With `most` the newest ones are counted, so many and one, as far back as a quarter of a second allows: to count millions
        takes seconds. Raises: ConfigurationError.
        """
        questions = _asked(search)
        if most is None:
            return StateCounts(self.index.count_states(*questions))
        counts, bottom = self.index.count_newest(*questions, most=most)
        return StateCounts(counts, most, None if bottom is None else _of_key(bottom))

    def now(self) -> str:
        """A cursor before all that is known now: with `after=` a search finds the same tasks later, and none that came since."""
        return str(self.index.newest() + 1)

    def get(self, task_id: str) -> TaskHistory | None:
        """One task with its parents and children; None where nothing is known of it."""
        task_id = short(task_id) or ""
        rows = self.index.by_ids([task_id])
        if not rows:
            return None
        task, parents = rows[0], list[TaskRow]()
        visited, parent_id = {task_id}, task.parent_id
        while parent_id and parent_id not in visited and len(parents) < MOST_RELATIVES:
            visited.add(parent_id)
            above = self.index.by_ids([parent_id])
            parents += above
            parent_id = above[0].parent_id if above else None
        children = self.index.select(Question(conditions=[TASKS.c.parent_id == task_id]), limit=MOST_RELATIVES)
        return TaskHistory(
            past_task(task),
            tuple(past_task(row) for row in reversed(parents)),
            tuple(past_task(row) for row in reversed(children)),
        )

    def by_ids(self, ids: Sequence[str]) -> list[PastTask]:
        """These tasks in this order, as far as anything is known of them."""
        rows = {row.id: row for row in self.index.by_ids(ids)}
        return [past_task(rows[task_id]) for task_id in ids if task_id in rows]

    def reruns(self, task_id: str) -> list[PastTask]:
        """The tasks that were made to stand for this one, with other arguments."""
        rows = self.index.select(Question(conditions=[TASKS.c.rerun_of == task_id]), limit=MOST_RELATIVES)
        return [past_task(row) for row in rows]

    def workflow(self, some_id: str) -> list[PastTask]:
        """All tasks that belong to one workflow, the first one first; at most MOST_OF_WORKFLOW of them.

        `some_id` is a root id, or the id of any task or group of it. A group that was called from outside a task has as many
        roots as members: what has a root or a group in common belongs together."""
        rows: dict[int, TaskRow] = {}
        searched: set[str] = set()
        unsearched = {some_id}
        while unsearched and len(rows) < MOST_OF_WORKFLOW:
            ids = sorted(unsearched)[:MOST_RELATIVES]
            searched.update(ids)
            c = TASKS.c
            related_by = ([c.id.in_(ids)], [c.root_id.in_(ids), HAS_ROOT], [c.group_id.in_(ids)], [c.joins.in_(ids)])
            matches = [
                row
                for conditions in related_by
                for row in self.index.select(Question(conditions=conditions), limit=MOST_OF_WORKFLOW)
            ]
            rows.update((row.key, row) for row in matches)
            related = {one for row in matches for one in (row.root_id, row.group_id, row.joins) if one}
            unsearched = (unsearched | related) - searched
        return [past_task(rows[key]) for key in sorted(rows)[:MOST_OF_WORKFLOW]]

    def failures(self, *, since: Moment | None = None, task: str | None = None, limit: int = 100) -> list[FailureGroup]:
        """Failures in groups of task and exception, the most first."""
        conditions = [TASKS.c.name == task] if task is not None else []
        if since is not None:
            conditions.append(TASKS.c.key >= key_at(_unix(since)))
        groups = self.index.group_failures(conditions, limit)
        examples = {row.key: row for row in self.index.by_keys([last for *_, last in groups])}
        marks = self.index.seen()
        failure_groups = []
        for name, error, count, first, last in groups:
            if last not in examples:
                continue  # forgotten meanwhile
            seen_mark = marks.get((name or "", error or ""))
            failure_groups.append(
                FailureGroup(
                    name=name or "",
                    error=error or "",
                    count=count,
                    first=_of_key(first),
                    last=_of_key(last),
                    example=past_task(examples[last]),
                    unseen=count
                    if seen_mark is None
                    else self.index.count_failures(name, error, seen_mark.until, conditions),
                    seen_by=None if seen_mark is None else seen_mark.who,
                    seen_at=None if seen_mark is None else _at(seen_mark.at),
                )
            )
        return failure_groups

    def mark_seen(self, task: str, error: str, who: str, *, last: datetime) -> None:
        """Mark a group of failures as seen, up to those of tasks that began until `last` (the group's, when it was looked at)."""
        self.index.mark_seen(task, error, who, key_at(last.timestamp()) + (1 << KEY_BITS))

    def minutes(self, since: Moment, *, every: int = 1) -> list[MinuteNumbers]:
        """What happened in each minute, or in so many together; those in which nothing did are left out."""
        return [
            MinuteNumbers(
                datetime.fromtimestamp(minute * 60, timezone.utc),
                sent,
                succeeded,
                failed,
                retried,
                revoked,
                runtime / 1000 / succeeded if succeeded else None,
                started,
                waited / 1000 / started if started else None,
            )
            for row in self.index.minutes(int(_unix(since) // 60), every)
            for minute, sent, succeeded, failed, retried, revoked, runtime, started, waited in (tuple[int, ...](row),)
        ]

    def waits(self, queue: str) -> float | None:
        """Seconds that the oldest task in a queue waits, as far as events tell: of callers that tell nothing (Celery's, without
        task_send_sent_event) none is known. None: no task waits."""
        sent_at = self.index.oldest_waiting(queue)
        return None if sent_at is None else max(0.0, time.time() - sent_at)

    def workers(self) -> list[PastWorker]:
        """Workers that were heard of, by name."""
        now = time.time()
        return [_past_worker(row, now) for row in self.index.workers()]

    def close(self) -> None:
        """Close the connections to the index."""
        if "index" in self.__dict__:
            self.index.close()


def _asked(search: Search) -> list[Question]:
    """What a search asks for: a question for each of its states."""
    # As they are kept.
    task, queue, root_id = short(search.get("task")), short(search.get("queue")), short(search.get("root_id"))
    text, stamp, state = as_text(search.get("text"), LONG), search.get("stamp"), search.get("state")
    since, until, after = search.get("since"), search.get("until"), search.get("after")
    named = (
        ("name", task),
        ("queue", queue),
        ("worker", short(search.get("worker"))),
        ("error", short(search.get("error"))),
        ("periodic", short(search.get("periodic"))),
    )
    ends = [key_at(_unix(until))] if until is not None else []
    ends += [_key(after)] if after is not None else []
    question = Question(
        equal={name: value for name, value in named if value is not None},
        words=text.strip() if text and text.strip() else None,
        marks=[mark(prefix, value) for prefix, value in (("n", task), ("q", queue)) if value is not None],
        stamp=(short(stamp[0]) or "", short(stamp[1]) or "") if stamp is not None else None,
        since=key_at(_unix(since)) if since is not None else None,
        until=min(ends, default=None),
    )
    questions = [question] if root_id is None else [*_of_root(question, root_id)]
    if state is not None:
        states = {(short(name) or "").upper() for name in ([state] if isinstance(state, str) else state)}
        questions = [_with_state(one, name) for one in questions for name in sorted(states)]
    return questions


def _of_root(question: Question, root_id: str) -> Iterator[Question]:
    """The root, and the others."""
    yield replace(question, equal={**question.equal, "id": root_id}, conditions=[TASKS.c.root_id == TASKS.c.id])
    yield replace(question, equal={**question.equal, "root_id": root_id}, conditions=[HAS_ROOT])


def _with_state(question: Question, state: str) -> Question:
    marks = [*question.marks, FAILED_MARK] if state == FAILURE else question.marks
    return replace(question, equal={**question.equal, "state": state}, marks=marks)


# What a task has as its row has it.
_AS_KEPT = (
    "id", "name", "state", "queue", "worker", "args", "kwargs", "retries", "root_id", "parent_id", "rerun_of", "group_id",
    "group_index", "joins", "periodic", "eta", "expires", "runtime", "result", "exception", "error", "traceback",
)  # fmt: skip


def past_task(row: TaskRow) -> PastTask:
    """A row of the index, for people."""
    begun = row.received_at if row.sent_at is None else row.sent_at
    waited = None if row.started_at is None or begun is None else max(0.0, row.started_at - begun)
    return PastTask(
        **{name: getattr(row, name) for name in _AS_KEPT},
        follows=_following(row.follows),
        first=_of_key(row.key),
        sent=_time(row.sent_at),
        received=_time(row.received_at),
        started=_time(row.started_at),
        ended=_time(row.ended_at),
        waited=waited,
        stamps=json.loads(row.stamps) if row.stamps else {},
        steps=tuple(Step(_at(at), event, worker) for at, event, worker in json.loads(row.steps)),
        can_run_again=row.message is not None,
        cursor=str(row.key),
        message=_message(row.message),
    )


def _message(written: str | None) -> KeptMessage | None:
    """The message that a worker told of; None for one that is none: any user of the broker may have sent that."""
    if written is None:
        return None
    try:
        kept = KeptMessage(**loads(written.encode(), JSON, "utf-8", _JSON))
    except (MessageError, TypeError):
        return None
    properties = (kept.content_type, kept.content_encoding, kept.correlation_id, kept.reply_to)
    is_one = (
        isinstance(kept.body, str)
        and isinstance(kept.headers, Mapping)
        and all(isinstance(text, (str, type(None))) for text in properties)
        and isinstance(kept.priority, (int, type(None)))
    )
    return kept if is_one else None


def _following(written: str | None) -> tuple[Following, ...]:
    """What is told of what follows; any user of the broker may have told it."""
    following = []
    for entry in json.loads(written) if written else ():
        try:
            one = Following(**entry)
        except TypeError:
            continue
        numbers, texts = (one.more, one.members or 0, one.size or 0), (one.how, one.task or "", one.id or "")
        if all(isinstance(number, int) for number in numbers) and all(isinstance(text, str) for text in texts):
            following.append(replace(one, how=short(one.how) or "", task=short(one.task), id=short(one.id)))
    return tuple(following)


def _past_worker(row: WorkerRow, now: float) -> PastWorker:
    last_heard = max(row.last_at, row.heard_at)  # its clock may be behind ours
    silence = now - last_heard
    return PastWorker(
        hostname=row.hostname,
        is_online=row.online,
        is_gone=row.online and silence > 3 * (row.frequency or 60.0) + 5,
        since=_at(row.first_at),
        last_heard=_at(last_heard),
        software=row.software,
        processed=row.processed,
        active=row.active,
    )


def _unix(moment: Moment) -> float:
    if isinstance(moment, timedelta):
        return time.time() - moment.total_seconds()
    return moment.timestamp() if isinstance(moment, datetime) else float(moment)


def _key(cursor: str) -> int:
    if not (cursor.isascii() and cursor.isdigit() and len(cursor) < 20 and int(cursor) < 1 << 63):
        raise ConfigurationError(f"`after` is the cursor of a task that was found, not {cursor[:100]!r}")
    return int(cursor)


def _at(moment: float) -> datetime:
    return datetime.fromtimestamp(moment, timezone.utc)


def _time(moment: float | None) -> datetime | None:
    return None if moment is None else _at(moment)


def _of_key(key: int) -> datetime:
    return _at((key >> 10) / 1e6)
