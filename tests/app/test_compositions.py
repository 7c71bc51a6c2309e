"""Chains, groups and chords in every combination, inline and through a worker on the in-memory broker: the same values."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from amqtask import AmqTask, Queue, Signature, chain, chord, group, signature
from amqtask.exceptions import ChordError, ConfigurationError, Ignore, Reject, TaskRevokedError
from amqtask.testing.suites.compositions import COMPOSITIONS, ERRORS, Tasks, define
from amqtask.testing.worker import start_worker

Build = Callable[[Any], Any]


def make_app(**settings: Any) -> AmqTask:
    """An app with small tasks."""
    return define(AmqTask("flows", broker="memory://", backend="cache+memory://", **settings))


@pytest.fixture(scope="module")
def inline() -> Tasks:
    """Tasks that are run by their caller."""
    return Tasks(make_app())


@pytest.fixture(scope="module")
def worked() -> Iterator[Tasks]:
    """Tasks that a worker runs."""
    app = make_app()
    with start_worker(app, pool="threads", concurrency=2):
        yield Tasks(app)


@pytest.mark.parametrize("name", [name for name in COMPOSITIONS if "added to" not in name])
def test_a_composition_run_inline_gives_its_value(inline: Tasks, name: str) -> None:
    build, value = COMPOSITIONS[name]

    assert build(inline).apply().get() == value


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_a_composition_run_by_a_worker_gives_its_value(worked: Tasks, name: str) -> None:
    build, value = COMPOSITIONS[name]

    assert build(worked).apply_async().get(timeout=60) == value


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_a_composition_that_travelled_as_json_gives_its_value(worked: Tasks, name: str) -> None:
    build, value = COMPOSITIONS[name]
    travelled = signature(json.loads(json.dumps(build(worked))), app=worked.app)

    assert travelled.apply_async().get(timeout=60) == value


@pytest.mark.parametrize("name", [name for name in COMPOSITIONS if name != "empty group"])
def test_a_composition_can_be_published_again(worked: Tasks, name: str) -> None:
    build, value = COMPOSITIONS[name]
    composed = build(worked)
    before = json.dumps(composed)

    first, second = composed.apply_async(), composed.apply_async()

    assert first.id != second.id
    assert (first.get(timeout=60), second.get(timeout=60)) == (value, value)
    assert json.dumps(composed) == before


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_a_frozen_composition_keeps_its_result(worked: Tasks, name: str) -> None:
    build, value = COMPOSITIONS[name]
    composed = build(worked)
    frozen = composed.freeze() if not hasattr(composed, "group") else composed.group().freeze()

    published = composed if not hasattr(composed, "group") else None
    if published is not None:
        published.apply_async()
        assert frozen.get(timeout=60) == value


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_inline_is_the_result(inline: Tasks, name: str) -> None:
    build, kind = ERRORS[name]

    with pytest.raises(kind, match="as told"):
        build(inline).apply().get()


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_in_a_worker_is_the_result(worked: Tasks, name: str) -> None:
    build, kind = ERRORS[name]

    with pytest.raises(kind, match="as told"):
        build(worked).apply_async().get(timeout=60)


@pytest.mark.parametrize("build", [lambda t: t.total.s(), lambda t: t.total.s() | t.double.s()])
def test_of_a_failed_chord_the_members_error_is_raised_and_the_chords_is_kept(worked: Tasks, build: Build) -> None:
    result = chord([worked.same.s(1), worked.fail.s()], build(worked)).apply_async()

    with pytest.raises(ValueError, match="as told"):
        result.get(timeout=60)
    with pytest.raises(ValueError, match="as told"):
        asyncio.run(_awaited(result))
    assert isinstance(result.result, ChordError)
    with pytest.raises(ChordError, match="as told"):
        worked.app.AsyncResult(result.id).get(timeout=60)


async def _awaited(result: Any) -> Any:
    return await result.aget(timeout=60)


def test_who_waits_for_the_header_of_a_chord_that_never_began_is_told(worked: Tasks) -> None:
    result = (worked.fail.s() | chord([worked.same.s(), worked.double.s()], worked.total.s())).apply_async()

    assert [type(error) for error in result.parent.get(timeout=60, propagate=False)] == [ValueError] * 2


def test_what_could_not_run_says_so_to_whoever_has_only_its_id(worked: Tasks) -> None:
    result = (worked.fail.s() | worked.double.s() | worked.double.s()).apply_async()

    for each in (result, result.parent, result.parent.parent):
        with pytest.raises(ValueError, match="as told"):
            worked.app.AsyncResult(each.id).get(timeout=60)


def test_a_chords_result_has_its_header_as_parent(worked: Tasks) -> None:
    result = chord([worked.same.s(1), worked.same.s(2)], worked.total.s()).apply_async()

    assert result.get(timeout=60) == 3
    assert result.parent.get(timeout=60) == [1, 2]


def test_links_run_with_the_result_of_the_end() -> None:
    app = make_app()
    seen: list[Any] = []

    @app.task(name="note")
    def note(value: Any) -> None:
        seen.append(value)

    @app.task(name="note_error")
    def note_error(request: Any, error: BaseException, trace: str) -> None:
        seen.append(type(error).__name__)

    tasks = Tasks(app)
    (tasks.add.s(1, 1) | tasks.double.s()).apply(link=note.s())
    chord([tasks.same.s(1)], tasks.total.s()).apply(link=note.s())
    (tasks.fail.s() | tasks.double.s()).apply(link_error=note_error.s())
    chord([tasks.fail.s()], tasks.total.s()).apply(link_error=note_error.s())
    with start_worker(app, pool="threads", concurrency=2):
        linked = (tasks.add.s(2, 2) | tasks.double.s()).apply_async(link=note.s())
        assert linked.get(timeout=60) == 8
        assert linked.children[0].get(timeout=60) is None
        failed = chord([tasks.fail.s(), tasks.same.s(1)], tasks.total.s()).apply_async(link_error=note_error.s())
        with pytest.raises(ValueError, match="as told"):
            failed.get(timeout=60)
    assert seen[:4] == [4, 1, "ValueError", "ChordError"]
    assert sorted(seen[4:], key=str) == [8, "ChordError"]


ENDS: dict[str, Build] = {
    "unknown": lambda t: Signature("nowhere", app=t.app),
    "ignored": lambda t: t.ignored.s(),
    "rejected": lambda t: t.rejected.s(),
    "expired": lambda t: t.same.s(1).set(expires=-1),
    "a result that cannot be written": lambda t: t.unwritable.s(),
}


@pytest.mark.parametrize("name", ENDS)
def test_however_a_member_ends_its_chord_does_too(name: str) -> None:
    app = make_app()

    @app.task(name="ignored")
    def ignored() -> None:
        raise Ignore

    @app.task(name="rejected")
    def rejected() -> None:
        raise Reject("no reason")

    @app.task(name="unwritable")
    def unwritable() -> object:
        return object()

    tasks = Tasks(app)
    with start_worker(app, pool="threads", concurrency=2):
        result = chord([tasks.same.s(1), ENDS[name](tasks)], tasks.total.s() | tasks.double.s()).apply_async()
        assert isinstance(result.get(timeout=60, propagate=False), ChordError)


def test_a_revoked_step_ends_the_rest_of_its_chain_and_its_chord() -> None:
    app = make_app()
    tasks = Tasks(app)
    composed = chord([tasks.same.s(1) | tasks.double.s() | tasks.double.s(), tasks.same.s(1)], tasks.total.s())
    result = composed.freeze()
    with start_worker(app, pool="threads", concurrency=2) as worker:
        worker.revoked.add([composed.tasks[0]["kwargs"]["tasks"][1].id], time.time())
        composed.apply_async()
        with pytest.raises(TaskRevokedError, match="revoked"):
            result.get(timeout=60)
        with pytest.raises(TaskRevokedError):
            app.AsyncResult(str(composed.tasks[0]["kwargs"]["tasks"][2].id)).get(timeout=60)


def test_callbacks_may_be_compositions() -> None:
    app = make_app()
    tasks = Tasks(app)
    with start_worker(app, pool="threads", concurrency=2):
        result = tasks.add.apply_async((1, 1), link=[group(tasks.double.s(), tasks.add.s(1)) | tasks.total.s()])
        assert result.get(timeout=60) == 2
        (child,) = result.children
        assert child.get(timeout=60) == 7


def test_compositions_leave_in_a_pipeline_too() -> None:
    app = make_app()
    tasks = Tasks(app)
    with start_worker(app, pool="threads", concurrency=2):
        with app.pipeline():
            results = [chord([tasks.same.s(n), tasks.same.s(1)], tasks.total.s()).delay() for n in range(5)]
        assert [result.get(timeout=60) for result in results] == [1, 2, 3, 4, 5]


def test_compositions_are_awaited() -> None:
    app = make_app()
    tasks = Tasks(app)

    async def ask() -> list[Any]:
        chained = await (tasks.add.s(1, 1) | group(tasks.double.s(), tasks.double.s()) | tasks.total.s()).adelay()
        grouped = await group(tasks.same.s(n) for n in range(3)).adelay()
        failed = await (tasks.fail.s() | tasks.double.s()).adelay()
        with pytest.raises(ValueError, match="as told"):
            await failed.aget(timeout=60)
        return [await chained.aget(timeout=60), await grouped.aget(timeout=60)]

    with start_worker(app, pool="threads", concurrency=2):
        assert asyncio.run(ask()) == [8, [0, 1, 2]]


def test_every_step_knows_its_root_and_its_parent() -> None:
    app = make_app()
    known: dict[str, tuple[Any, Any]] = {}

    @app.task(name="note_place", bind=True)
    def note_place(self: Any, *args: Any) -> None:
        known[self.request.id] = (self.request.root_id, self.request.parent_id)

    with start_worker(app, pool="threads", concurrency=2):
        result = (note_place.s() | note_place.s() | group(note_place.s(), note_place.s()) | note_place.s()).delay()
        assert result.get(timeout=60) is None
    header = result.parent
    second = header.parent
    first = second.parent
    assert known[first.id] == (first.id, None)
    assert known[second.id] == (first.id, first.id)
    assert [known[member.id] for member in header] == [(first.id, second.id)] * 2
    root, parent = known[result.id]
    assert root == first.id
    assert parent in [member.id for member in header]


def test_all_that_follows_a_chord_in_a_chain_has_the_chains_root() -> None:
    app = make_app()

    @app.task(name="place", bind=True)
    def place(self: Any, *args: Any) -> tuple[Any, Any]:
        return self.request.root_id, self.request.parent_id

    with start_worker(app, pool="threads", concurrency=2):
        header = group(place.si() | place.si(), place.si())
        result = (place.si() | header | place.si() | place.si() | group(place.si() | place.si(), place.si())).delay()
        last = result.get(timeout=60)
        second, first = result.parent, result.parent.parent
        members = first.parent
        root = members.parent
        assert root.get(timeout=60) == [root.id, None]
        assert [found[0] for found in members.get(timeout=60)] == [root.id] * 2
        assert first.get(timeout=60)[0] == root.id
        assert first.get(timeout=60)[1] in [member.id for member in members]
        assert second.get(timeout=60) == [root.id, first.id]
        assert [found[0] for found in last] == [root.id] * 2


def test_a_run_that_comes_again_adds_the_same_member_to_its_chord() -> None:
    app = make_app()
    added: list[str] = []

    @app.task(name="adds_and_dies", bind=True)
    def adds_and_dies(self: Any) -> int:
        first, second = (self.add_to_chord(tasks.same.s(n), lazy=len(added) < 2) for n in (10, 20))
        added.extend([first.id, second.id])
        if len(added) == 2:
            raise Reject("as if it had died", requeue=True)
        return 1

    tasks = Tasks(app)
    with start_worker(app, pool="threads", concurrency=2):
        result = chord([adds_and_dies.s(), tasks.same.s(2)], tasks.total.s()).apply_async()
        assert result.get(timeout=60) == 33
    assert added[:2] == added[2:]


def test_a_group_that_is_added_to_a_chord_is_one_member() -> None:
    app = make_app()

    @app.task(name="adds_a_group", bind=True)
    def adds_a_group(self: Any) -> int:
        member = self.add_to_chord(group(tasks.same.s(1), tasks.same.s(2)), lazy=True)
        member.delay()
        return 7

    tasks = Tasks(app)
    with start_worker(app, pool="threads", concurrency=2):
        result = chord([adds_a_group.s()], tasks.same.s()).apply_async()
        assert sorted(result.get(timeout=60), key=str) == [7, [1, 2]]


def test_a_result_draws_what_came_of_it() -> None:
    app = make_app()
    tasks = Tasks(app)
    with start_worker(app, pool="threads", concurrency=2):
        result = (tasks.add.s(1, 1) | tasks.double.s()).apply_async()
        assert result.get(timeout=60) == 4
        first = result.parent
        drawn = first.graph
        assert [str(each) for each in drawn.topsort()] == [result.id, first.id]
        assert drawn.to_dot().count("->") == 1


def test_eager_compositions_run_at_once() -> None:
    tasks = Tasks(make_app(task_always_eager=True))

    result = (tasks.same.s(1) | group(tasks.add.s(1), tasks.add.s(2)) | tasks.total.s()).delay()

    assert result.get() == 5


def test_options_of_a_composition_reach_the_tasks_they_are_for() -> None:
    app = make_app()
    tasks = Tasks(app)
    begun, _ = app.workflows.prepared(
        tasks.add.s(1, 1) | group(tasks.double.s(), tasks.double.s()), (), {}, {"queue": "first", "priority": 3}
    )

    (call,) = begun.calls
    assert call.options["queue"] == "first"
    assert call.options["priority"] == 3
    (step,) = call.options["chain"]
    assert step["task"] == "celery.group"


def test_a_chord_is_written_as_celery_reads_it() -> None:
    app = make_app()
    tasks = Tasks(app)

    begun, result = app.workflows.prepared(chord([tasks.add.s(1, 1), tasks.add.s(2, 2)], tasks.total.s()), (), {}, {})

    one, two = begun.calls
    assert one.options["group_id"] == two.options["group_id"]
    assert (one.options["group_index"], two.options["group_index"]) == (0, 1)
    body = one.options["chord"]
    assert body["task"] == "total"
    assert "chord_size" not in body
    assert body["options"]["task_id"] == result.id
    assert begun.chords == {one.options["group_id"]: 2}


def test_a_chord_that_is_counted_in_the_broker_says_its_size() -> None:
    app = define(AmqTask("flows", broker="amqp://"))
    tasks = Tasks(app)

    begun, _ = app.workflows.prepared(chord([tasks.add.s(1, 1), tasks.add.s(2, 2)], tasks.total.s()), (), {}, {})

    assert begun.calls[0].options["chord"]["chord_size"] == 2


def test_no_member_of_a_chord_is_published_before_the_queue_of_its_parts_is_there() -> None:
    app = define(AmqTask("flows", broker="amqp://"))
    tasks = Tasks(app)
    begun, _ = app.workflows.prepared(chord([tasks.add.s(n, n) for n in range(3)], tasks.total.s()), (), {}, {})

    messages = app.workflows.messages(begun)

    queues = [entity.name for message in messages for entity in message.declare if isinstance(entity, Queue)]
    assert sum(name.startswith("amqtask.chord.") for name in queues) == 3


def test_an_empty_chain_is_left_out_of_a_group_and_replaces_nothing() -> None:
    app = make_app()
    tasks = Tasks(app)

    @app.task(name="becomes_nothing", bind=True)
    def becomes_nothing(self: Any) -> Any:
        return self.replace(chain())

    with start_worker(app, pool="threads", concurrency=2):
        assert group(tasks.same.s(1), chain()).apply_async().get(timeout=60) == [1]
        assert chord([chain(), tasks.same.s(1)], tasks.total.s()).apply_async().get(timeout=60) == 1
        with pytest.raises(ConfigurationError, match="Cannot replace with an empty chain"):
            becomes_nothing.delay().get(timeout=60)


@pytest.mark.parametrize("publish", [chain.apply_async, chain.delay, chain.apply, chain.__call__])
@pytest.mark.parametrize("empty", [chain(), chain([]), chain(chain(), chain()), chain() | chain(), chain() | group()])
def test_an_empty_chain_runs_nothing_and_has_no_result(
    inline: Tasks, empty: Any, publish: Callable[[Any], Any]
) -> None:
    empty.bound_app = inline.app

    assert publish(empty) is None
    assert asyncio.run(empty.adelay()) is None


def test_an_empty_chain_runs_nothing_and_has_no_result_where_calls_run_at_once() -> None:
    assert chain(app=make_app(task_always_eager=True)).delay(1) is None


@pytest.mark.parametrize("publish", [group.apply_async, group.delay, group.apply])
def test_an_empty_group_has_an_empty_result(inline: Tasks, publish: Callable[[Any], Any]) -> None:
    found = publish(group([], app=inline.app))

    assert (found.get(timeout=60), found.join(timeout=60), len(found), found.ready()) == ([], [], 0, True)
    assert not group()


@pytest.mark.parametrize("empty", [chain(), group(), [chain()], chain(group())])
def test_an_empty_callback_runs_nothing(inline: Tasks, worked: Tasks, empty: Any) -> None:
    for tasks in (inline, worked):
        called = tasks.same.s(1).set(link=empty, link_error=empty)

        assert (called.apply() if tasks is inline else called.apply_async()).get(timeout=60) == 1


@pytest.mark.parametrize(
    "build", [lambda t: t.same.s(1) | chain(), lambda t: group(t.same.s(1), t.same.s(2)) | chain()]
)
def test_what_an_empty_chain_follows_is_what_there_is(worked: Tasks, build: Build) -> None:
    assert build(worked).apply_async().get(timeout=60) in (1, [1, 2])


@pytest.mark.parametrize("nothing", [group(), group([group()]), group(chain()), chain(group())])
def test_a_chain_begins_with_its_first_task(worked: Tasks, nothing: Any) -> None:
    """As in Celery: what runs nothing hands on nothing, and the first task gets the arguments of the call."""
    assert chain(nothing, worked.same.s()).delay(3).get(timeout=60) == 3
    assert chain(nothing, worked.same.s()).apply((3,)).get() == 3


def test_calls_in_chunks_of_none_are_refused(inline: Tasks) -> None:
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"chunks of {size} calls"):
            inline.add.chunks([(1, 2)], size)


def test_what_is_no_signature_is_refused(inline: Tasks) -> None:
    with pytest.raises(TypeError, match="a signature is wanted"):
        group(1, 2)  # type: ignore[arg-type, unused-ignore]


def test_group_options_are_kept_by_members_that_are_frozen(inline: Tasks) -> None:
    found = group(inline.add.s(1, 1), inline.add.s(2, 2))
    found.freeze("the-group")

    assert [member.options["group_id"] for member in found.tasks] == ["the-group"] * 2
    assert isinstance(found.tasks[0], Signature)
