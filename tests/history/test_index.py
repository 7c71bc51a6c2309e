"""What events tell is found again: state, times, words, families; twice told is told once, and what is old is forgotten."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amqtask.exceptions import ConfigurationError
from amqtask.history import search
from amqtask.history.client import History
from amqtask.history.index import DELETED_AT_ONCE, IndexUnreachable, Overtaken
from amqtask.history.records import Batch

NOON = datetime(2026, 11, 30, 12, tzinfo=timezone.utc).timestamp()


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    made = History(f"sqlite:///{tmp_path}/index.sqlite3")
    yield made
    made.close()


def event(kind: str, at: float, task_id: str = "one", worker: str = "w1@host", **fields: Any) -> dict[str, Any]:
    return {"type": f"task-{kind}", "uuid": task_id, "timestamp": NOON + at, "hostname": worker, **fields}


def call(task_id: str = "one", at: float = 0.0, **fields: Any) -> list[dict[str, Any]]:
    """The events of one that succeeds after a second."""
    told = {"name": "shop.send", "args": "('a@b.example',)", "kwargs": "{}", "queue": "mail", **fields}
    return [
        event("sent", at, task_id, "gen1@web", **told),
        event("received", at + 0.25, task_id, **told),
        event("started", at + 0.5, task_id),
        event("succeeded", at + 1.5, task_id, result="'sent'", runtime=1.0),
    ]


def failed(task_id: str, at: float = 0.0, exception: str = "ValueError('no such address')", **fields: Any) -> Any:
    *begun, _ = call(task_id, at, **fields)
    return [*begun, event("failed", at + 1.5, task_id, exception=exception, traceback="Traceback …")]


def test_a_task_is_found_with_its_times(history: History) -> None:
    history.index.take(call())

    (task,) = history.find(task="shop.send")
    assert (task.id, task.state, task.queue, task.worker) == ("one", "SUCCESS", "mail", "w1@host")
    assert (task.args, task.result, task.runtime, task.waited) == ("('a@b.example',)", "'sent'", 1.0, 0.5)
    assert task.ended == datetime.fromtimestamp(NOON + 1.5, timezone.utc)
    assert [(step.event, step.worker) for step in task.steps] == [
        ("sent", "gen1@web"), ("received", "w1@host"), ("started", "w1@host"), ("succeeded", "w1@host"),
    ]  # fmt: skip


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_events_may_come_in_any_order_and_in_any_batches(history: History, order: tuple[int, ...]) -> None:
    events = call()
    for index in order:
        history.index.take([events[index]])

    (task,) = history.find()
    assert (task.state, task.name, task.result) == ("SUCCESS", "shop.send", "'sent'")
    assert [step.event for step in task.steps] == ["sent", "received", "started", "succeeded"]


def test_what_is_told_twice_counts_once(history: History) -> None:
    history.index.take(call())
    history.index.take(call())

    (task,) = history.find()
    (minute,) = history.minutes(NOON)
    assert len(task.steps) == 4
    assert (minute.sent, minute.succeeded, minute.runtime) == (1, 1, 1.0)


@pytest.mark.parametrize("is_first", [True, False])
def test_a_producer_whose_clock_is_ahead_does_not_undo_what_a_worker_told(history: History, is_first: bool) -> None:
    sent = [event("sent", 60, worker="gen1@web")]
    for events in (sent, call()[1:]) if is_first else (call()[1:], sent):
        history.index.take(events)

    assert history.find()[0].state == "SUCCESS"


def test_a_task_that_runs_again_loses_its_old_end(history: History) -> None:
    history.index.take(failed("one"))
    history.index.take([event("received", 10), event("started", 11)])

    (task,) = history.find()
    assert (task.state, task.exception, task.ended) == ("STARTED", None, None)
    assert [step.event for step in task.steps][-3:] == ["failed", "received", "started"]


def test_a_retry_keeps_why_it_is_retried(history: History) -> None:
    events = [
        *call()[:3],
        event("retried", 1, exception="OSError('down')", traceback="Traceback"),
        event("received", 5),
    ]
    history.index.take(events)

    (task,) = history.find()
    assert (task.state, task.exception) == ("RECEIVED", "OSError('down')")


def test_a_task_that_is_rejected_for_good_has_failed_and_one_that_is_requeued_comes_again(history: History) -> None:
    history.index.take([*failed("one"), event("rejected", 1.5, requeue=False)])
    history.index.take([*call("two")[:2], event("rejected", 1, "two", requeue=True)])

    assert {task.id: task.state for task in history.find()} == {"one": "FAILURE", "two": "RECEIVED"}


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({"state": "FAILURE"}, ["bad"]),
        ({"state": ["failure", "success"]}, ["late", "bad", "good"]),
        ({"task": "shop.bill"}, ["late"]),
        ({"queue": "mail", "state": "SUCCESS"}, ["good"]),
        ({"worker": "w1@host", "limit": 1}, ["late"]),
        ({"error": "ValueError"}, ["bad"]),
        ({"since": NOON + 100}, ["late"]),
        ({"until": datetime.fromtimestamp(NOON + 100, timezone.utc)}, ["bad", "good"]),
        ({"since": timedelta(days=36500), "root_id": "root"}, ["late"]),
        ({"text": "addr*"}, ["bad"]),
        ({"text": "addr"}, []),
        ({"text": "such address", "task": "shop.send", "queue": "mail"}, ["bad"]),
        ({"text": "address", "state": "FAILURE"}, ["bad"]),
        ({"text": "exam*"}, ["late", "bad", "good"]),
        ({"text": "b.exam*", "task": "shop.bill"}, ["late"]),
        ({"text": "example.b"}, []),
        ({"text": "*"}, []),
        ({"text": "**"}, []),
        ({"text": "' | \\' it's"}, []),
        ({"text": "a@b.example"}, ["late", "bad", "good"]),
        ({"text": "a@b.example", "state": "SUCCESS", "task": "shop.send"}, ["good"]),
        ({"text": '"; DROP OR (NEAR'}, []),
        ({"stamp": ("tenant", "7")}, ["late"]),
        ({"stamp": ("tenant", "8"), "text": "example"}, ["late"]),
        ({"stamp": ("tenant", "9")}, []),
        ({"text": "  "}, ["late", "bad", "good"]),
        ({"text": "exam*", "until": NOON + 100}, ["bad", "good"]),
        ({"text": "exam*", "since": NOON + 5, "until": NOON + 100}, ["bad"]),
        ({"stamp": ("tenant", "7"), "since": NOON + 300}, []),
        ({"stamp": ("tenant", "7"), "text": "example", "since": NOON + 100}, ["late"]),
        ({"state": ["failure", "success", "failure"], "text": "example", "limit": 2}, ["late", "bad"]),
        ({"state": []}, []),
    ],
)
def test_searches_find_what_fits_the_newest_first(history: History, wanted: dict[str, Any], found: list[str]) -> None:
    history.index.take([*call("good"), *failed("bad", 10)])
    history.index.take(call("late", 200, name="shop.bill", queue="bills", root_id="root", stamps={"tenant": [7, "8"]}))

    assert [task.id for task in history.find(**wanted)] == found


def test_a_burst_of_calls_that_are_sent_at_one_moment_is_kept_whole(history: History) -> None:
    for half in range(2):
        history.index.take([event("sent", 0, f"t{half}-{number}", name="shop.send") for number in range(1500)])

    assert len({task.id for task in history.find(limit=10_000)}) == 3000
    assert {round(task.first.timestamp() - NOON, 2) for task in history.find(limit=10_000)} == {0.0}


@pytest.mark.parametrize("few", [0, 1000])
@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"text": "b.example"},
        {"text": "example.b"},
        {"text": "send7@b.example"},
        {"text": "send7*"},
        {"text": "example", "stamp": ("tenant", "1")},
        {"text": "send3", "stamp": ("tenant", "1")},
        {"stamp": ("tenant", "1"), "queue": "bills"},
        {"state": "SUCCESS", "queue": "bills"},
        {"state": "REVOKED", "queue": "bills"},
        {"state": "REVOKED", "queue": "mail", "task": "shop.send"},
        {"state": ["REVOKED", "FAILURE"], "worker": "w1@host"},
        {"text": "example", "since": NOON + 600, "until": NOON + 1200},
    ],
    ids=str,
)
def test_pages_have_what_a_search_finds_however_little_time_there_is(
    history: History, monkeypatch: pytest.MonkeyPatch, wanted: dict[str, Any], few: int
) -> None:
    for number in range(40):
        told: dict[str, Any] = {"args": f"('send{number}@b.example',)", "queue": ("mail", "bills")[number % 4 == 0]}
        if number % 3 == 0:
            told["stamps"] = {"tenant": str(number % 2)}
        history.index.take((failed if number % 10 == 5 else call)(f"t{number}", number * 60.0, **told))
    history.index.take([event("revoked", 1000, "t3"), event("revoked", 1000, "t5")])
    monkeypatch.setattr(search, "_FEW", few)
    expected = [task.id for task in history.find(**wanted, limit=1000)]

    monkeypatch.setattr(search, "_FIRST", 5)
    for seconds in (0.0, 60.0):
        monkeypatch.setattr(search, "LOOK_SECONDS", seconds)
        found, after = list[str](), None
        for _ in range(100):
            page = history.page(**wanted, limit=3, after=after)
            found += [task.id for task in page.tasks]
            if page.next is None:
                break
            after = page.next
        assert found == expected
    assert [task.id for task in history.page(**wanted, limit=1000, is_whole=True).tasks] == expected


def test_pages_follow_each_other(history: History) -> None:
    history.index.take([told for number in range(25) for told in call(f"t{number}", number)])
    pages: list[list[str]] = []
    after: str | None = None
    while True:
        page = history.find(limit=10, after=after)
        if not page:
            break
        pages.append([task.id for task in page])
        after = page[-1].cursor

    assert [len(page) for page in pages] == [10, 10, 5]
    assert [name for page in pages for name in page] == [f"t{number}" for number in reversed(range(25))]
    with pytest.raises(ConfigurationError, match="cursor"):
        history.find(after="x")


def test_a_family_is_shown_whole_even_if_it_goes_in_circles(history: History) -> None:
    history.index.take(call("top", root_id="top"))
    history.index.take(call("middle", 1, root_id="top", parent_id="top"))
    history.index.take([*call("a", 2, parent_id="middle"), *call("b", 3, parent_id="middle")])
    history.index.take([*call("x", 4, parent_id="y"), *call("y", 4, parent_id="x")])

    middle, a, circle = history.get("middle"), history.get("a"), history.get("x")
    assert middle is not None
    assert a is not None
    assert circle is not None
    assert ([task.id for task in middle.parents], [task.id for task in middle.children]) == (["top"], ["a", "b"])
    assert [task.id for task in a.parents] == ["top", "middle"]
    assert [task.id for task in circle.parents] == ["y"]
    assert history.get("nobody") is None


def test_failures_are_grouped_by_task_and_exception(history: History) -> None:
    for number in range(3):
        history.index.take(failed(f"v{number}", number, f"ValueError('{number}')"))
    history.index.take(failed("k", 9, "shop.errors.Broken(1)", name="shop.bill"))
    history.index.take(failed("v0-again", 30, "ValueError('x')"))
    history.index.take(call("v0-again", 31)[1:])  # it went well at last

    first, second = history.failures()
    assert (first.name, first.error, first.count, first.example.id) == ("shop.send", "ValueError", 3, "v2")
    assert (second.name, second.error, second.count) == ("shop.bill", "shop.errors.Broken", 1)
    assert (first.last - first.first).total_seconds() == pytest.approx(2, abs=0.001)


def test_a_worker_that_says_nothing_more_is_gone(history: History) -> None:
    def said(kind: str, name: str, at: float, **fields: Any) -> dict[str, Any]:
        return {"type": f"worker-{kind}", "hostname": name, "timestamp": at, "freq": 2.0, "sw_ident": "x", **fields}

    now = datetime.now().timestamp()
    history.index.take([said("online", "gone", now - 60), said("heartbeat", "gone", now - 30, processed=4)])
    history.index.take([said("online", "there", now - 60), said("heartbeat", "there", now, active=2)])
    history.index.take([said("online", "left", now - 60), said("offline", "left", now - 30)])

    found = {worker.hostname: (worker.is_online, worker.is_gone) for worker in history.workers()}
    assert found == {"gone": (True, True), "there": (True, False), "left": (False, False)}


def test_a_worker_whose_clock_is_behind_is_there_while_it_is_heard(history: History) -> None:
    now, beat = datetime.now().timestamp(), {"type": "worker-heartbeat", "hostname": "w1@host", "freq": 2.0}
    history.index.take([{**beat, "timestamp": now - 3600, "active": 1}])
    assert history.workers()[0].is_gone  # what waited for the reader says nothing of now

    history.index.take([{**beat, "timestamp": now - 3598, "active": 2}], is_fresh=True)

    (worker,) = history.workers()
    assert (worker.active, worker.is_gone) == (2, False)
    assert worker.last_heard.timestamp() == pytest.approx(now, abs=600)
    history.index.forget(history.index.outdated(max_age=1800, max_bytes=10**9))
    assert history.workers() == [worker]


def test_a_worker_whose_clock_is_put_back_is_heard_on(history: History) -> None:
    now, beat = datetime.now().timestamp(), {"type": "worker-heartbeat", "hostname": "w1@host", "freq": 2.0}
    history.index.take([{**beat, "timestamp": now, "active": 1}], is_fresh=True)
    history.index.take([{**beat, "timestamp": now - 2, "active": 0}], is_fresh=True)  # an old one that comes again
    assert history.workers()[0].active == 1

    history.index.take([{**beat, "timestamp": now - 600, "active": 2}], is_fresh=True)
    history.index.take([{**beat, "timestamp": now - 598, "active": 3}], is_fresh=True)

    assert [worker.active for worker in history.workers()] == [3]


def test_a_batch_that_another_process_has_taken_in_is_refused_whole(history: History) -> None:
    history.index.take(call("one"), before=None, now=7)

    with pytest.raises(Overtaken):
        history.index.take(call("two", 5), before=None, now=9)

    assert (history.index.position(), [task.id for task in history.find()]) == (7, ["one"])


def forget(history: History, **limits: float) -> int:
    """Forget as the indexer does, to the end; how many tasks."""
    before = history.index.outdated(**limits)  # type: ignore[arg-type]
    total = deleted = history.index.forget(before)
    while deleted == DELETED_AT_ONCE:
        deleted = history.index.forget(before)
        total += deleted
    return total


def test_what_is_too_old_or_too_much_is_forgotten(history: History) -> None:
    for start in range(0, 2000, 500):
        history.index.take([told for number in range(start, start + 500) for told in call(f"t{number}", number)])

    assert forget(history, max_age=1000, max_bytes=10**9, now=NOON + 1999) == 999
    size = history.index.size()
    assert forget(history, max_age=10**6, max_bytes=size // 2, now=NOON + 1999) > 400
    assert history.index.size() <= size * 0.7
    assert history.find(limit=1)[0].id == "t1999"
    assert history.find(text="example", limit=10_000)[-1].id == history.find(limit=10_000)[-1].id


def test_the_oldest_is_forgotten_in_portions_with_its_stamps(history: History) -> None:
    stamped = [call(f"t{number}", number, stamps={"tenant": 7}) for number in range(DELETED_AT_ONCE + 20)]
    history.index.take([told for one in stamped for told in one])
    before = history.index.outdated(max_age=10, max_bytes=10**9, now=NOON + DELETED_AT_ONCE + 19)

    assert history.index.forget(before) == DELETED_AT_ONCE
    assert len(history.find(limit=10_000)) == 20
    assert history.index.forget(before) == 9
    assert len(history.find(stamp=("tenant", "7"), limit=10_000)) == 11
    assert history.index.forget(before) == 0


def test_the_oldest_that_waits_is_known_where_callers_tell(history: History) -> None:
    history.index.take([*call("done"), event("received", 30, "of a caller that tells nothing", queue="mail")])
    assert history.index.oldest_waiting("mail") is None

    history.index.take(
        [event("sent", at, name, queue="mail") for name, at in (("purged", -10), ("second", 6), ("first", 5))]
    )
    history.index.take([event("sent", 4, "delayed", queue="mail", eta="2026-12-24T18:00:00")])
    assert history.index.oldest_waiting("mail") == NOON + 5
    assert history.index.oldest_waiting("bills") is None


def test_hostile_events_are_kept_as_text_or_left_out(history: History) -> None:
    batch = history.index.take(
        [
            event(
                "received",
                0,
                "odd",
                name="<script>\x00\ud800",
                args="x" * 1_000_000,
                retries="many",
                stamps={str(number): "x" for number in range(10_000)},
                follows=[{"how": "chain", "task": "\ud800", "id": "\x00"}, {"task": ["x"]}, 3, {"\ud800": 1}],
                message=1,
            ),
            event("\ud800\x00", 2, "odd"),
            event("failed", 1, "odd", exception=["not", "text"], traceback="\x1b[31m"),
            event("received", 0, "i" * 1000),
            {"type": "task-received", "uuid": None, "timestamp": NOON},
            {"type": "task-received", "uuid": "x", "timestamp": "soon"},
            {"type": "task-received", "uuid": "x", "timestamp": float("nan")},
            {"type": "custom", "uuid": "x", "timestamp": NOON},
            {"type": "worker-online", "timestamp": NOON, "hostname": None},
        ]
    )

    found = history.get("odd")
    assert batch.skipped == 5
    assert found is not None
    assert (found.task.name, len(found.task.args or ""), found.task.retries) == ("<script>\ufffd?", 10_000, 0)
    assert (found.task.exception, found.task.traceback) == ("['not', 'text']", "\x1b[31m")
    assert [(one.task, one.id) for one in found.task.follows] == [("?", "\ufffd")]
    assert len(found.task.stamps) == 100
    assert [step.event for step in found.task.steps] == ["received", "failed", "?\ufffd"]


@pytest.mark.parametrize("odd", ["i" * 1000, "\x00\ud800", 7, ["a", "list"]])
def test_a_task_with_an_odd_id_may_be_told_of_again(history: History, odd: Any) -> None:
    for kind, at in (("received", 0), ("started", 1), ("succeeded", 2)):
        history.index.take([event(kind, at, odd, name="shop.send")])

    (task,) = history.find()
    assert (task.state, len(task.steps)) == ("SUCCESS", 3)


def test_what_a_clock_that_is_years_ahead_tells_counts_as_of_now(history: History) -> None:
    now, ahead = datetime.now().timestamp(), 30 * 365 * 86_400
    beat = {"type": "worker-heartbeat", "hostname": "w1@host", "freq": -1e9}
    for _ in range(2):
        history.index.take([event("sent", ahead), event("received", ahead + 1), {**beat, "timestamp": now + ahead}])
    changes = history.index.changes()
    history.index.take([*call("other", now - NOON), {**beat, "timestamp": now + 900, "active": 3}])

    assert history.index.changes() > changes
    (worker,) = history.workers()
    assert (worker.active, worker.is_gone) == (3, False)
    assert worker.last_heard.timestamp() == pytest.approx(now, abs=600)
    task, other = history.find()
    assert (other.id, task.id, task.state, len(task.steps)) == ("other", "one", "RECEIVED", 2)
    assert task.first.timestamp() == pytest.approx(now, abs=600)
    assert task.steps[0].at.year == 2056
    assert sum(minute.sent for minute in history.minutes(now - 120)) == 2
    assert history.index.outdated(max_age=-86_400 - 60, max_bytes=10**12) > int(other.cursor)


def test_the_longest_names_of_any_alphabet_are_kept_and_found(history: History) -> None:
    odd = "".join(map(chr, range(0x1F300, 0x1F300 + 300)))
    history.index.take(
        [
            event("received", 0, odd, odd, name=odd, queue=odd, parent_id=odd, stamps={odd: odd}),
            event("failed", 1, odd, odd, exception=f"{odd}()"),
        ]
    )

    (task,) = history.find(task=odd, queue=odd, worker=odd, state="FAILURE")
    assert history.find(stamp=(odd, odd)) == [task]
    assert odd.startswith((task.name or "")[:100])


def test_a_task_that_is_retried_for_ever_does_not_grow_for_ever(history: History) -> None:
    for number in range(0, 3000, 300):
        history.index.take([event("retried", step, exception="OSError()") for step in range(number, number + 300)])

    (task,) = history.find()
    assert len(task.steps) == 200
    assert (task.steps[0].at.timestamp(), task.steps[-1].at.timestamp()) == (NOON, NOON + 2999)


@given(
    st.dictionaries(
        st.sampled_from(["uuid", "name", "timestamp", "runtime", "eta", "stamps", "message", "freq"]),
        st.none()
        | st.text()
        | st.integers()
        | st.floats()
        | st.lists(st.integers())
        | st.dictionaries(st.text(), st.text()),
    )
)
def test_no_event_breaks_the_indexer(fields: dict[str, Any]) -> None:
    for kind in ("task-received", "task-failed", "task-own", "worker-heartbeat", ""):
        Batch().add_all([{"type": kind, "hostname": "h", "timestamp": NOON, "uuid": "x", **fields}])


def test_a_url_of_another_database_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"sqlite:/// or postgresql://"):
        History("mysql://host/db").find()
    with pytest.raises(ConfigurationError, match="history_url"):
        History("no url").find()
    with pytest.raises(IndexUnreachable, match="cannot be opened"):
        History(f"sqlite:///{tmp_path}/no/such/folder/x").find()


def test_tasks_are_counted_by_state_as_they_are_found(history: History) -> None:
    history.index.take([*call("good"), *failed("bad"), *failed("worse", exception="KeyError('tenant')")])
    until = history.now()
    history.index.take(failed("late", at=60))

    assert history.count() == {"FAILURE": 3, "SUCCESS": 1}
    assert history.count(after=until) == {"FAILURE": 2, "SUCCESS": 1}
    assert history.count(text="address", state="FAILURE", error="ValueError", after=until) == {"FAILURE": 1}
    assert history.count(stamp=("tenant", "7")) == {}


def test_a_count_may_stop_and_says_so(history: History) -> None:
    history.index.take([told for number in range(30) for told in call(f"t{number}", number)])
    history.index.take([told for number in range(3) for told in failed(f"f{number}", 100 + number)])

    assert history.count(most=10) == {"SUCCESS": 8, "FAILURE": 3}
    assert history.count(most=10, text="example", queue="mail") == {"SUCCESS": 8, "FAILURE": 3}
    assert history.count(most=33) == history.count() == {"SUCCESS": 30, "FAILURE": 3}
    assert history.count(most=10, state="SUCCESS") == {"SUCCESS": 11}
    assert history.count(most=10, state=["SUCCESS", "FAILURE"]).has_more
    assert (history.count(most=33).has_more, history.count().has_more, history.count().total) == (False, False, 33)
    assert history.count(state=()) == history.count(state=(), most=5) == {}


def test_a_count_with_a_most_looks_as_far_as_time_allows_and_says_how_far(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(40):
        history.index.take(call(f"t{number}", number * 60.0))
    monkeypatch.setattr(search, "_FIRST", 5)
    monkeypatch.setattr(search, "LOOK_SECONDS", 0.0)
    # PostgreSQL might find all of these few within its millisecond.
    monkeypatch.setattr(search, "can_be_stopped", lambda *_: False)

    some = history.count(most=30, text="example", queue="mail")
    assert some.looked_to is not None
    assert some == {"SUCCESS": len(history.find(text="example", since=some.looked_to, limit=100))}
    assert (some.has_more, 0 < some.total < 30) == (True, True)
    assert (few := history.count(most=2, text="example", queue="mail")) == {"SUCCESS": 3}
    assert (few.has_more, few.looked_to) == (True, None)
    assert history.count(text="example", queue="mail") == {"SUCCESS": 40}


def test_a_group_that_was_seen_is_new_again_with_its_next_failure(history: History) -> None:
    history.index.take([*failed("one"), *failed("two", at=5), *failed("other", exception="KeyError('x')")])
    group = next(group for group in history.failures() if group.error == "ValueError")
    assert (group.count, group.unseen, group.seen_by) == (2, 2, None)

    # What came between the look and the mark was not seen.
    history.index.take(failed("three", at=10))
    history.mark_seen(group.name, group.error, "ann", last=group.last)

    marked = {group.error: group for group in history.failures()}
    assert [(one.unseen, one.count, one.seen_by) for one in marked.values()] == [(1, 3, "ann"), (1, 1, None)]
    history.mark_seen(group.name, group.error, "bob", last=marked["ValueError"].last)
    assert [one.unseen for one in history.failures()] == [0, 1]
    # Sent long before, failed after the mark.
    history.index.take(
        [*call("slow", at=-60)[:3], event("failed", 30, "slow", exception="ValueError('no such address')")]
    )
    assert [one.unseen for one in history.failures()] == [1, 1]


def test_what_operators_do_is_noted(history: History) -> None:
    numbers = [history.index.begin_action(user, "pause", '{"queue": "mail"}') for user in ("ann", "bob")]
    history.index.end_action(numbers[0], "mail is paused")

    noted = [(one["id"], one["who"], one["outcome"]) for one in history.index.actions(10)]
    assert noted == [(numbers[1], "bob", None), (numbers[0], "ann", "mail is paused")]


def test_what_a_deletion_left_free_counts_no_more(history: History) -> None:
    for start in range(0, 3000, 500):
        history.index.take([told for number in range(start, start + 500) for told in call(f"t{number}", number)])
    size = history.index.size()

    # Each minute again: it must not go on when there is enough room.
    for _ in range(5):
        forget(history, max_age=10**6, max_bytes=size // 2, now=NOON + 2999)
    assert len(history.find(limit=10_000)) > 1_000


@pytest.mark.parametrize("task_id", ["i" * 1000, "a\0b", "\ud800", 5, ["a"]], ids=range(5))
def test_a_task_has_one_row_whatever_its_id_is(history: History, task_id: Any) -> None:
    for kind in ("received", "started", "succeeded"):
        history.index.take([event(kind, 1, task_id), event("received", 0, "other")])

    (task,) = history.find(state="SUCCESS")
    found = history.get(task_id) if isinstance(task_id, str) else history.get(task.id)
    assert found is not None
    assert found.task.id == task.id


def test_stamps_of_any_name_and_value_are_found(history: History) -> None:
    stamps: dict[str, Any] = {"\ud800": "x", "a\0b": "\0", "n" * 300: ["y", {"z": 1}]}
    for kind in ("received", "succeeded"):
        history.index.take([event(kind, 0, stamps=stamps)])

    for name, value in (("\ud800", "x"), ("a\0b", "\0"), ("n" * 300, "y"), ("n" * 300, "{'z': 1}")):
        assert [task.id for task in history.find(stamp=(name, value))] == ["one"]


def test_a_kept_message_has_the_times_in_its_headers(history: History) -> None:
    at = datetime(2026, 11, 30, 12, tzinfo=timezone.utc)
    history.index.take([event("received", 0, message={"body": "W10=", "headers": {"id": "one", "at": at}})])

    (task,) = history.by_ids(["one"])
    assert task.message is not None
    assert task.message.headers == {"id": "one", "at": at}


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("name", ["uuid", "hostname", "args", "exception", "follows", "stamps", "message", "eta"])
def test_what_is_within_each_other_too_deep_keeps_no_event_out(history: History, name: str) -> None:
    value = nested(100_000)
    fields = {name: {"x": value} if name in ("stamps", "message") else value}
    for kind in ("received", "failed"):
        history.index.take([{**event(kind, 0, "deep"), **fields}, event(kind, 0, "other")])

    assert {task.state for task in history.find()} == {"FAILURE"}


@pytest.mark.parametrize(
    "message",
    [
        {"body": 5, "headers": {}},
        {"headers": {}},
        {"body": "", "headers": [1]},
        {"body": "", "headers": {}, "priority": "x"},
    ],
)
def test_a_message_that_is_none_is_not_kept(history: History, message: dict[str, Any]) -> None:
    history.index.take([event("received", 0, message=message)])

    assert history.find()[0].message is None


def test_times_that_no_run_takes_count_for_nothing(history: History) -> None:
    for number in range(100):
        ended = event("succeeded", 2, f"t{number}", runtime=9e11 * (-1) ** number)
        history.index.take([*call(f"t{number}")[:3], ended])

    (minute,) = history.minutes(NOON)
    assert (minute.succeeded, minute.runtime) == (100, 0.0)
