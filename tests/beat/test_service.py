"""Beats that lead, follow, stop and fail, on an in-memory broker."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import datetime, timedelta

import pytest

from amqtask import Queue, Unique
from amqtask.beat import BeatLazyFunc
from amqtask.beat.contract import Entry
from amqtask.beat.scheduler import Due
from amqtask.beat.sender import AppSender
from amqtask.exceptions import AccessRefused
from amqtask.protocol.entities import arguments
from amqtask.transport.memory.broker import MemoryBroker
from tests.beat.bench import QUEUE, Bench, ListStore, entry


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.loop.close()


def test_what_is_due_is_sent_with_celerys_headers_and_recorded(bench: Bench) -> None:
    store = ListStore(entry(args=("hello",), kwargs={}, options={"headers": {"mine": 1}, "priority": 3}))
    beat = bench.beat(store)
    beat.start()
    bench.leading(beat)
    bench.until(11)
    bench.turn(lambda: len(store.runs) == 1)

    properties, _ = bench.broker.messages("amqtask")[0]
    headers = properties.headers
    assert headers["celery_beat_task"] is True
    assert headers["periodic_task_name"] == "tick"
    assert headers["task"] == "tasks.tick"
    assert headers["mine"] == 1
    assert properties.priority == 3
    assert not properties.reply_to
    assert bench.arguments(0) == (["hello"], {})
    run = store.runs[0]
    assert (run.name, run.task_id, run.total_run_count) == ("tick", headers["id"], 1)
    assert run.due_at.isoformat() == headers["periodic_task_due"]
    beat.stop()


def test_only_one_of_two_beats_sends_and_the_other_goes_on_where_it_ended(bench: Bench) -> None:
    first, second = bench.beat(ListStore(entry())), bench.beat(ListStore(entry()))
    first.start()
    bench.leading(first)
    second.start()
    bench.until(31)
    assert not second.is_leading
    assert len(bench.dues) == 3

    first.stop()
    bench.leading(second)
    bench.until(61)
    steps = [round(after - before, 1) for before, after in zip(bench.dues, bench.dues[1:], strict=False)]
    assert steps == [10.0] * 5
    second.stop()


def test_the_id_of_a_task_follows_from_entry_and_due_time(bench: Bench) -> None:
    beat = bench.beat(ListStore(entry()))
    beat.start()
    bench.leading(beat)
    bench.until(15)
    [(_, task_id, _)] = bench.sent
    due_at = beat.scheduler.positions["tick"].since

    another = AppSender(bench.app, QUEUE)
    assert another.task_id(Due(due_at, entry())) == task_id
    assert another.task_id(Due(due_at, entry("other"))) != task_id
    assert another.task_id(Due(due_at + timedelta(seconds=10), entry())) != task_id
    assert AppSender(bench.app, "other").task_id(Due(due_at, entry())) != task_id
    beat.stop()


def test_a_beat_that_the_broker_refuses_says_why_it_ends(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    ended: list[Exception] = []
    error = AccessRefused("the password is wrong")

    bench.beat(ListStore(), on_failed=ended.append).on_failed(error)

    assert "beat: cannot go on: the password is wrong" in caplog.text
    assert ended == [error]


def test_a_lost_connection_ends_leading_and_nothing_is_lost(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    beat = bench.beat(ListStore(entry()))
    beat.start()
    bench.leading(beat)
    bench.until(11)
    bench.broker.cut()
    bench.turn(lambda: not beat.is_leading)
    bench.leading(beat)
    bench.until(31)
    assert len(bench.dues) == len(set(bench.sent)) == 3
    assert "not leading any more" in caplog.text
    beat.stop()


def test_a_leader_whose_state_goes_to_another_beat_leads_no_more(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = bench.beat(ListStore(entry())), bench.beat(ListStore(entry()))
    first.start()
    bench.leading(first)
    second.start()
    bench.until(15)
    # As when the node of the first one was cut off for a while: its connection lives, and is not the one that gets the state.
    bench.broker.queue(QUEUE).subscribers.rotate(-1)
    bench.until(41)
    bench.until(91)

    assert [beat.is_leading for beat in (first, second)].count(True) == 1
    late = [due for due in bench.dues if due > 41]
    assert len(late) == len(set(late)) == 5
    assert "another beat" in caplog.text
    for beat in (first, second):
        beat.stop()


def test_a_deleted_queue_is_made_anew_and_the_schedule_goes_on(bench: Bench) -> None:
    beat = bench.beat(ListStore(entry()))
    beat.start()
    bench.leading(beat)
    bench.until(11)
    bench.broker.delete_queue(QUEUE)
    bench.turn(lambda: not beat.is_leading)
    bench.leading(beat)
    bench.until(31)
    assert [round(due - bench.dues[0], 1) for due in bench.dues] == [0, 10, 20]
    beat.stop()


def test_the_broker_holds_one_state_whatever_happened(bench: Bench) -> None:
    beats = [bench.beat(ListStore(entry(seconds=1))) for _ in range(3)]
    for beat in beats:
        beat.start()
    bench.until(10)
    leader = next(beat for beat in beats if beat.is_leading)
    for beat in beats:
        if beat is not leader:
            beat.stop()
    bench.until(12)
    bench.turn(lambda: not leader.is_busy)
    leader.stop()
    bench.turn(lambda: bench.broker.count(QUEUE) == 1)


def test_a_change_in_the_store_takes_effect_with_the_next_look(bench: Bench) -> None:
    store = ListStore(entry())
    beat = bench.beat(store)
    beat.start()
    bench.leading(beat)
    store.now = [entry("other", 1)]
    bench.passing(lambda: "other" in beat.scheduler.entries)
    bench.until(20)
    assert {name for name, _, _ in bench.sent} == {"other"}
    beat.stop()


def test_a_store_that_fails_is_said_once_and_what_it_told_before_is_sent(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    store = ListStore(entry())
    beat = bench.beat(store)
    beat.start()
    bench.leading(beat)
    store.error = RuntimeError("the database is away")
    bench.passing(lambda: "the database is away" in caplog.text)
    bench.until(30)
    store.error = None
    bench.passing(lambda: "answers again" in caplog.text)
    assert caplog.text.count("the schedule store fails") == 1
    assert bench.dues
    beat.stop()
    assert store.is_closed


def test_a_store_that_cannot_be_opened_fails_the_beat(bench: Bench) -> None:
    class Broken(ListStore):
        def entries(self) -> list[Entry]:
            raise RuntimeError("no such table")

    errors: list[Exception] = []
    beat = bench.beat(Broken(), on_failed=errors.append)
    beat.start()
    bench.turn(lambda: bool(errors))
    assert "no such table" in str(errors[0])
    beat.stop()


def test_an_entry_that_cannot_be_sent_is_said_and_the_others_go_on(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    entries = [
        entry("wrong arguments", kwargs={"nonsense": 1}),
        entry("wrong option", options={"quue": "x"}),
        entry("not writable", args=(object(),)),
        entry("right"),
    ]
    store = ListStore(*entries)
    beat = bench.beat(store)
    beat.start()
    bench.leading(beat)
    with caplog.at_level(logging.ERROR):
        bench.until(11)
    bench.turn(lambda: bool(store.runs))
    assert [name for name, _, _ in bench.sent] == ["right"]
    for name in ("wrong arguments", "wrong option", "not writable"):
        assert f"{name} (tasks.tick)" in caplog.text
    assert [run.name for run in store.runs] == ["right"]
    beat.stop()


def test_what_is_wrong_with_an_entry_is_told_when_beat_starts_and_once(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    def lazily() -> str:
        raise LookupError("no rate yet")

    wrong: dict[str, dict[str, object]] = {
        "unknown": {"options": {"quue": "x"}},
        "of no kind": {"options": {"priority": 999}},
    }
    store = ListStore(
        *(entry(name, 5.0, **fields) for name, fields in wrong.items()),
        entry("lazy", 5.0, args=(BeatLazyFunc(lazily),)),
        entry("right", 5.0),
    )
    beat = bench.beat(store)
    beat.start()
    bench.leading(beat)
    at_start = [record.getMessage() for record in caplog.records if "cannot be sent" in record.getMessage()]
    assert len(at_start) == 2
    assert "unknown (tasks.tick)" in at_start[0]
    assert "no option 'quue'" in at_start[0]
    assert "priority wants a whole number" in at_start[1]

    bench.until(31)
    told = [record for record in caplog.records if "cannot be sent" in record.getMessage()]
    assert "LookupError: no rate yet (test_service.py, line" in told[2].getMessage()
    assert len(told) == 3
    assert not any(record.exc_info for record in caplog.records)
    assert {name for name, _, _ in bench.sent} == {"right"}

    beat.stop()


def test_what_the_broker_refuses_stays_due_and_holds_up_nobody(bench: Bench) -> None:
    full = Queue("full", arguments=arguments({"x-max-length": 1, "x-overflow": "reject-publish"}))
    bench.app.conf.task_queues = [full]
    store = ListStore(entry("refused", 4, options={"queue": "full"}), entry("taken", 5))
    beat = bench.beat(store)
    beat.start()
    bench.leading(beat)
    bench.until(13)
    assert bench.broker.count("full") == 1
    assert len(bench.dues) == 2

    due = [datetime.fromisoformat(take_due(bench.broker))]
    for second in range(14, 22):
        bench.until(second)
        due += [datetime.fromisoformat(each) for each in [take_due(bench.broker)] if each]

    assert [round((each - due[0]).total_seconds()) for each in due[:4]] == [0, 4, 8, 12]
    assert len(bench.dues) == 4
    beat.stop()


def take_due(broker: MemoryBroker) -> str:
    """When the one message of the full queue was due; there is room for one more then."""
    if not broker.count("full"):
        return ""
    ((properties, _),) = broker.messages("full")
    broker.purge("full")
    return str(properties.headers["periodic_task_due"])


def test_a_lazy_argument_is_worked_out_when_the_task_is_sent(bench: Bench) -> None:
    numbers = iter(["one", "two"])
    beat = bench.beat(ListStore(entry(kwargs={"word": BeatLazyFunc(next, numbers)})))
    beat.start()
    bench.leading(beat)
    bench.until(21)
    assert [bench.arguments(number)[1] for number in (0, 1)] == [{"word": "one"}, {"word": "two"}]
    beat.stop()


def test_a_unique_task_is_not_sent_while_another_call_has_its_key(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.app.task(name="tasks.once", unique=Unique(by=()))(lambda: None)
    beat = bench.beat(ListStore(entry("once", task="tasks.once"), entry()))
    beat.start()
    bench.leading(beat)

    def ids() -> list[str]:
        return [task_id for name, task_id, _ in bench.sent if name == "once"]

    with caplog.at_level("INFO"):
        bench.passing(lambda: caplog.text.count("is not sent: call ") == 2)
    (first,) = ids()
    assert f"call {first}, which waits or runs" in caplog.text
    assert len(bench.sent) > 2
    sent = [properties for properties, _ in bench.broker.messages("amqtask") if properties.headers["id"] == first]
    bench.app.runtime.flow_store.free(sent[0].headers["amqtask-unique"], first)
    bench.passing(lambda: len(ids()) == 2)
    beat.stop()


def test_a_task_that_is_not_known_here_is_sent_by_its_name(bench: Bench) -> None:
    beat = bench.beat(ListStore(entry(task="elsewhere.run", options={"queue": "far"})))
    beat.start()
    bench.leading(beat)
    bench.until(11)
    assert bench.broker.count("far") == 1
    beat.stop()


def test_stopping_in_order_waits_for_what_is_on_its_way(bench: Bench) -> None:
    store = ListStore(entry(seconds=1))
    beat = bench.beat(store)
    beat.start()
    bench.leading(beat)
    bench.clock.advance(1)
    bench.turn(lambda: beat.is_busy)
    stopped: list[bool] = []
    beat.stop(lambda: stopped.append(True))
    bench.turn(lambda: bool(stopped))
    assert len(store.runs) == len(bench.sent) == 1
    assert store.is_closed


def test_an_answer_that_comes_after_the_end_does_no_harm(bench: Bench) -> None:
    beat = bench.beat(ListStore(entry()))
    beat.start()
    beat.stop()
    for _ in range(10):
        bench.loop.run_once(0.001)
    assert not beat.is_leading
