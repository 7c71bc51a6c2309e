"""Fair share: calls with different keys take turns, however many of one key wait."""

from __future__ import annotations

from typing import Any

import pytest

from amqtask import AmqTask, Broadcast, Fair, Queue, chain, group
from amqtask.exceptions import WrongValue
from amqtask.services.delayed import Which, release
from amqtask.testing.worker import start_worker
from amqtask.topology.declarations import base_of, dead_letter_queue
from integration.waiting import eventually


@pytest.fixture
def app() -> AmqTask:
    made = AmqTask("fair", broker="memory://", backend="cache+memory://", set_as_current=False)
    made.conf.task_default_queue = "work"
    made.conf.task_fair_shards = 8
    made.conf.worker_disable_prefetch = True  # or what comes ahead of time would depend on how fast it comes
    return made


def noting(app: AmqTask, fair_by: Any = "tenant", **options: Any) -> tuple[Any, list[str]]:
    """A task that notes for whom it ran, in order."""
    runs: list[str] = []

    @app.task(name="note", fair_by=fair_by, **options)
    def note(tenant: str, number: int = 0) -> str:
        runs.append(tenant)
        return tenant

    return note, runs


def waiting(app: AmqTask, queue: str = "work") -> dict[str, int]:
    """How many messages wait in the queue and each of its shards, where any do."""
    assert app.memory_broker is not None
    names = [queue, *(f"{queue}.fair.{number}" for number in range(app.conf.task_fair_shards))]
    return {name: count for name in names if (count := app.memory_broker.count(name))}


def test_another_s_backlog_moves_nobody_by_more_than_twice(app: AmqTask) -> None:
    note, runs = noting(app)
    for number in range(500):
        note.delay("big", number)
    small = [note.delay("small", number) for number in range(20)]
    assert sorted(waiting(app).values()) == [20, 500]

    with start_worker(app, concurrency=1):
        for result in small:
            result.get(timeout=60)

    assert [position for position, tenant in enumerate(runs) if tenant == "small"][-1] < 2 * 20 + 5


def test_tasks_without_it_take_turns_with_all_others(app: AmqTask) -> None:
    note, runs = noting(app)
    for number in range(200):
        note.delay("big", number)
    plain = app.task(name="plain")(lambda: runs.append("plain")).delay()
    assert waiting(app)["work"] == 1
    with start_worker(app, concurrency=1):
        plain.get(timeout=60)

    assert runs.index("plain") < 10


def test_a_key_always_has_the_same_shard_and_a_weight_more_than_one(app: AmqTask) -> None:
    note, _ = noting(app, Fair("tenant", weights={"gold": 3}))
    for number in range(60):
        note.delay("gold", number)
    assert sum(waiting(app).values()) == 60
    assert len(waiting(app)) == 3

    app.control.purge()
    for number in range(20):
        note.delay(tenant="plain", number=number)
    assert list(waiting(app).values()) == [20]


@pytest.mark.parametrize("fair_by", [("tenant", "number"), lambda tenant, number=0: f"{tenant}/{number}"])
def test_several_arguments_or_a_function_make_the_key(app: AmqTask, fair_by: Any) -> None:
    note, _ = noting(app, fair_by)
    for number in range(40):
        note.delay("one", number)

    assert len(waiting(app)) > 4


def test_members_of_workflows_and_children_are_shared_too(app: AmqTask) -> None:
    note, runs = noting(app)
    group(note.s("big", number) for number in range(5)).apply_async()
    note.s("big").apply_async(link=note.si("small"))
    assert "work" not in waiting(app)

    with start_worker(app, concurrency=1):
        result = chain(note.s("a"), note.si("b"))()
        assert result.get(timeout=60) == "b"
        eventually(lambda: len(runs) == 9)


def test_a_call_to_another_queue_is_not_shared(app: AmqTask) -> None:
    note, _ = noting(app)
    note.apply_async(("a",), queue="elsewhere")

    assert waiting(app) == {}
    assert waiting(app, "elsewhere") == {"elsewhere": 1}


def test_a_retry_stays_in_its_shard(app: AmqTask) -> None:
    attempts: list[str] = []

    @app.task(bind=True, name="again", fair_by="tenant", default_retry_delay=0.01)
    def again(self: Any, tenant: str) -> str:
        attempts.append(self.request.delivery_info["routing_key"])
        if len(attempts) == 1:
            raise self.retry()
        return tenant

    with start_worker(app, concurrency=1):
        assert again.delay("a").get(timeout=60) == "a"

    assert len(attempts) == 2
    assert len(set(attempts)) == 1
    assert base_of(attempts[0]) == "work"
    assert attempts[0] != "work"


def test_delayed_calls_of_a_queue_are_those_of_its_shards_too(app: AmqTask) -> None:
    note, _ = noting(app)
    note.apply_async(("a",), countdown=3600)
    assert waiting(app) == {}

    assert release(app, Which(queue="work")) == 1

    assert list(waiting(app).values()) == [1]


def test_workers_and_commands_know_the_shards_of_fair_queues_only(app: AmqTask) -> None:
    app.conf.task_queues = [Queue("work"), Queue("mail")]
    noting(app)

    names = [queue.name for queue in app.queues.consumed]
    assert names == ["work", *(f"work.fair.{number}" for number in range(8)), "mail"]

    app.queues.deselect(["work"])
    assert [queue.name for queue in app.queues.consumed] == ["mail"]
    app.queues.select(["work"])
    assert len(app.queues.consumed) == 9


def test_shards_are_queues_like_theirs_and_share_its_dead_letters(app: AmqTask) -> None:
    app.conf.task_queues = [Queue("work", queue_arguments={"x-max-length": 1000})]
    noting(app)
    _, shard, *_ = app.queues.consumed

    assert shard.argument_map["x-max-length"] == 1000
    assert shard.argument_map["x-dead-letter-routing-key"] == "work.dead"
    dead = dead_letter_queue(shard, app.queue_defaults)
    assert dead is not None
    assert dead.name == "work.dead"


def test_a_failed_message_of_a_shard_is_among_the_dead_letters_of_the_queue(app: AmqTask) -> None:
    note, _ = noting(app)
    note.apply_async(("a",), serializer="json", headers={})
    (shard,) = waiting(app)
    assert app.memory_broker is not None

    with start_worker(app, concurrency=1):
        app.send_task("unknown", ("a",), queue=shard)
        eventually(lambda: app.memory_broker is not None and app.memory_broker.count("work.dead") == 1)


@pytest.mark.parametrize(
    ("fair_by", "said"),
    [
        ("", "fair_by wants the name of an argument"),
        (7, "by wants the name of an argument, several, or a function, not 7"),
        ((), "fair_by wants the name of an argument"),
    ],
)
def test_what_cannot_be_a_key_is_refused(app: AmqTask, fair_by: Any, said: str) -> None:
    with pytest.raises(WrongValue, match=said):
        noting(app, fair_by)


def test_an_argument_that_there_is_not_is_refused_with_the_one_that_is_meant(app: AmqTask) -> None:
    note, _ = noting(app, "tenent")
    with pytest.raises(WrongValue, match=r"fair_by is by 'tenent', which is no argument of it\. Did you mean 'tenant'"):
        note.delay("a")


def test_a_follow_up_without_a_key_does_not_fail_the_task_before(
    app: AmqTask, caplog: pytest.LogCaptureFixture
) -> None:
    app.task(name="one")(lambda: 1)
    note, _ = noting(app, lambda tenant, number=0: tenant["name"])
    with pytest.raises(TypeError):
        note.delay(1)

    with start_worker(app, concurrency=1):
        assert chain(app.signature("one"), note.s())().get(timeout=60) == 1
    assert "a call of task note goes to queue work: it has no key for fair_by (TypeError" in caplog.text


@pytest.mark.parametrize(
    ("by", "key", "args"),
    [("number", 7, ("a", 7)), ("number", "7", ("a", 7)), (("tenant", "number"), ("a", 7), ("a", 7))],
)
def test_a_weight_is_found_by_the_key_or_its_text(app: AmqTask, by: Any, key: Any, args: Any) -> None:
    note, _ = noting(app, Fair(by, weights={key: 3}))
    for _ in range(60):
        note.delay(*args)
    assert len(waiting(app)) == 3


@pytest.mark.parametrize("weights", ["gold", [("gold", 2)], None])
def test_weights_are_a_dictionary(weights: Any) -> None:
    with pytest.raises(WrongValue, match="Fair: weights wants a dictionary"):
        Fair("tenant", weights=weights)


def test_a_shard_that_is_named_is_a_queue_like_its_queue(app: AmqTask) -> None:
    app.conf.task_queues = [Queue("work", max_priority=5)]
    app.conf.worker_queue_slots = {"work.fair.3": "1"}
    app.queues.select(["work.fair.2"])

    assert [queue.argument_map["x-max-priority"] for queue in app.queues.consumed] == [5]
    with start_worker(app, queues=["work.fair.2", "work.fair.3:1+"], concurrency=2) as worker:
        assert worker.division.stats() == {"work": {"slots": "1+", "running": 0}}


def test_a_queue_that_cannot_have_its_slots_has_no_shards_consumed(app: AmqTask) -> None:
    noting(app)
    with start_worker(app, queues=["other"]) as worker:
        (answer,) = app.control.add_consumer("work", slots="9+", reply=True)
        assert "keeps 9 slots free" in str(answer)
        assert [queue.name for queue in worker.consumed] == ["other"]

        app.control.add_consumer("work", slots="1", reply=True)
        assert len(worker.consumed) == 2 + 8


@pytest.mark.parametrize("weight", [0, 17, True, 1.5])
def test_a_weight_is_a_number_of_turns(weight: Any) -> None:
    with pytest.raises(WrongValue, match="the weight of 'gold' wants a whole number from 1 to 16"):
        Fair("tenant", weights={"gold": weight})


def test_a_queue_that_can_have_no_shards_is_told(app: AmqTask, caplog: pytest.LogCaptureFixture) -> None:
    app.conf.task_queues = [Broadcast("news")]
    note, _ = noting(app, queue="news")
    note.delay("a")

    assert [queue.name for queue in app.queues.consumed] == ["news"]
    assert "fair_by of task note has no effect" in caplog.text
