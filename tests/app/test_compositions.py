"""Chains, groups and chords in every combination, inline and through a worker on the in-memory broker: the same values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from amqtask import AmqTask, Signature, chain, chord, group, signature
from amqtask.exceptions import ChordError, ConfigurationError
from amqtask.testing.worker import start_worker

Build = Callable[[Any], Any]


def make_app(**settings: Any) -> AmqTask:
    """An app with small tasks."""
    app = AmqTask("flows", broker="memory://", backend="cache+memory://", **settings)

    @app.task(name="add")
    def add(x: int, y: int) -> int:
        return x + y

    @app.task(name="double")
    def double(x: int) -> int:
        return 2 * x

    @app.task(name="total")
    def total(numbers: Any) -> int:
        return sum(total(each) if isinstance(each, (list, tuple)) else each for each in numbers)

    @app.task(name="same")
    def same(value: Any = "nothing") -> Any:
        return value

    @app.task(name="fail")
    def fail(*args: Any) -> None:
        raise ValueError("as told")

    @app.task(name="replaced", bind=True)
    def replaced(self: Any, x: int) -> Any:
        return self.replace(add.s(x, 100))

    @app.task(name="replaced_by_group", bind=True)
    def replaced_by_group(self: Any, x: int) -> Any:
        return self.replace(group(add.s(x, n) for n in range(3)))

    @app.task(name="replaced_by_chain", bind=True)
    def replaced_by_chain(self: Any, x: int) -> Any:
        return self.replace(add.s(x, 1) | group(double.s(), double.s()) | total.s())

    return app


class T:
    """The app's tasks by name."""

    def __init__(self, app: AmqTask) -> None:
        app.finalize()
        self.app = app

    def __getattr__(self, name: str) -> Any:
        return self.app.tasks[name]


# What is composed, and the value of its result.
COMPOSITIONS: dict[str, tuple[Build, Any]] = {
    "chain": (lambda t: t.add.s(1, 2) | t.add.s(3) | t.double.s(), 12),
    "chain of a list": (lambda t: chain([t.add.s(1, 2), t.add.s(3)]), 6),
    "chain of chains": (lambda t: chain(t.add.s(1, 1) | t.double.s(), t.double.s() | t.add.s(1)), 9),
    "immutable step": (lambda t: t.add.s(1, 2) | t.add.si(10, 10), 20),
    "group": (lambda t: group(t.add.s(n, n) for n in range(4)), [0, 2, 4, 6]),
    "group of groups": (lambda t: group(t.add.s(1, 1), group(t.add.s(2, 2), t.add.s(3, 3))), [2, 4, 6]),
    "group of chains": (lambda t: group(t.add.s(1, 1) | t.double.s(), t.add.s(2, 2) | t.double.s()), [4, 8]),
    "empty group": (lambda t: group(), []),
    "group in a group through a chain": (
        lambda t: group(t.add.s(1, 1) | group(t.double.s(), t.add.s(5)), t.same.s(1)),
        [[4, 7], 1],
    ),
    "chord": (lambda t: chord([t.add.s(1, 1), t.add.s(2, 2)], t.total.s()), 6),
    "chord of one": (lambda t: chord([t.add.s(1, 1)], t.total.s()), 2),
    "chord of none": (lambda t: chord([], t.total.s()), 0),
    "chord keeps the order": (lambda t: chord([t.same.s(n) for n in range(20)], t.same.s()), list(range(20))),
    "immutable body": (lambda t: chord([t.add.s(1, 1)], t.add.si(7, 7)), 14),
    "group and a task": (lambda t: group(t.add.s(1, 1), t.add.s(2, 2)) | t.total.s(), 6),
    "group and a group": (
        lambda t: group(t.add.s(1, 1), t.add.s(2, 2)) | group(t.total.s(), t.same.s()),
        [6, [2, 4]],
    ),
    "chain with a group in the middle": (
        lambda t: t.add.s(1, 1) | group(t.add.s(1), t.add.s(2)) | t.total.s() | t.double.s(),
        14,
    ),
    "chain that ends in a group": (lambda t: t.add.s(1, 1) | group(t.add.s(1), t.add.s(2)), [3, 4]),
    "chain with two groups": (
        lambda t: group(t.add.s(1, 1), t.add.s(2, 2)) | t.total.s() | group(t.add.s(1), t.add.s(2)) | t.total.s(),
        15,
    ),
    "two groups in a row": (
        lambda t: t.same.s(1) | group(t.add.s(1), t.add.s(2)) | group(t.total.s(), t.total.s()) | t.total.s(),
        10,
    ),
    "chord with a chain as body": (
        lambda t: chord([t.add.s(1, 1), t.add.s(2, 2)], t.total.s() | t.double.s() | t.add.s(1)),
        13,
    ),
    "chord with a group as body": (
        lambda t: chord([t.same.s(1), t.same.s(2)], group(t.total.s(), t.same.s())),
        [3, [1, 2]],
    ),
    "chord in a chain": (
        lambda t: t.add.s(1, 1) | chord([t.add.s(1), t.add.s(2)], t.total.s()) | t.double.s(),
        14,
    ),
    "chord in a chord": (
        lambda t: chord([chord([t.same.s(1), t.same.s(2)], t.total.s()), t.same.s(10)], t.total.s()),
        13,
    ),
    "chord as body": (
        lambda t: chord([t.same.s(1), t.same.s(2)], chord([t.total.s(), t.total.s()], t.total.s())),
        6,
    ),
    "chains in a chord": (
        lambda t: chord([t.add.s(1, 1) | t.double.s(), t.add.s(2, 2) | t.double.s() | t.double.s()], t.same.s()),
        [4, 16],
    ),
    "groups in a chord": (lambda t: chord([group(t.same.s(1), t.same.s(2)), t.same.s(3)], t.same.s()), [1, 2, 3]),
    "group at the end of a chain in a chord": (
        lambda t: chord([t.same.s(1) | group(t.add.s(1), t.add.s(2)), t.same.s(9)], t.same.s()),
        [[2, 3], 9],
    ),
    "chord with a group as body, in a chord": (
        lambda t: chord([chord([t.same.s(1)], group(t.total.s(), t.total.s())), t.same.s(9)], t.same.s()),
        [[1, 1], 9],
    ),
    "deep": (
        lambda t: (
            group(
                group(t.same.s(1), t.same.s(2)) | t.total.s(), t.same.s(3) | group(t.add.s(1), t.add.s(2)) | t.total.s()
            )
            | t.total.s()
            | group(t.double.s(), t.double.s())
            | t.total.s()
        ),
        48,
    ),
    "map": (lambda t: t.double.map([1, 2, 3]), [2, 4, 6]),
    "starmap": (lambda t: t.add.starmap([(1, 1), (2, 2)]), [2, 4]),
    "chunks": (lambda t: t.add.chunks(zip(range(5), range(5), strict=True), 2), [[0, 2], [4, 6], [8]]),
    "map in a chain": (lambda t: t.double.map([1, 2]) | t.total.s(), 6),
    "chunks as a group": (lambda t: t.add.chunks([(1, 1), (2, 2), (3, 3)], 2).group() | t.total.s(), 12),
    "replaced": (lambda t: t.replaced.s(1) | t.double.s(), 202),
    "replaced by a group": (lambda t: t.replaced_by_group.s(1) | t.total.s(), 6),
    "replaced by a chain with a chord": (lambda t: t.replaced_by_chain.s(1) | t.add.s(1), 9),
    "replaced in a chord": (
        lambda t: chord([t.replaced.s(1), t.replaced_by_group.s(1), t.same.s(5)], t.same.s()),
        [101, [1, 2, 3], 5],
    ),
}


@pytest.fixture(scope="module")
def inline() -> T:
    """Tasks that are run by their caller."""
    return T(make_app())


@pytest.fixture(scope="module")
def worked() -> Iterator[T]:
    """Tasks that a worker runs."""
    app = make_app()
    with start_worker(app, pool="threads", concurrency=2):
        yield T(app)


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_a_composition_run_inline_gives_its_value(inline: T, name: str) -> None:
    build, value = COMPOSITIONS[name]

    assert build(inline).apply().get() == value


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_a_composition_run_by_a_worker_gives_its_value(worked: T, name: str) -> None:
    build, value = COMPOSITIONS[name]

    assert build(worked).apply_async().get(timeout=10) == value


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_a_composition_that_travelled_as_json_gives_its_value(worked: T, name: str) -> None:
    import json  # noqa: PLC0415

    build, value = COMPOSITIONS[name]
    travelled = signature(json.loads(json.dumps(build(worked))), app=worked.app)

    assert travelled.apply_async().get(timeout=10) == value


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_a_frozen_composition_keeps_its_result(worked: T, name: str) -> None:
    build, value = COMPOSITIONS[name]
    composed = build(worked)
    frozen = composed.freeze() if not hasattr(composed, "group") else composed.group().freeze()

    published = composed if not hasattr(composed, "group") else None
    if published is not None:
        published.apply_async()
        assert frozen.get(timeout=10) == value


ERRORS: dict[str, tuple[Build, type[Exception]]] = {
    "first step of a chain": (lambda t: t.fail.s() | t.double.s() | t.double.s(), ValueError),
    "middle step of a chain": (lambda t: t.same.s(1) | t.fail.s() | t.double.s(), ValueError),
    "member of a group": (lambda t: group(t.same.s(1), t.fail.s()), ValueError),
    "member of a chord": (lambda t: chord([t.same.s(1), t.fail.s()], t.total.s()), ChordError),
    "member of a chord with a chain as body": (lambda t: chord([t.fail.s()], t.total.s() | t.double.s()), ChordError),
    "body of a chord": (lambda t: chord([t.same.s(1)], t.fail.s()), ValueError),
    "chain in a chord": (
        lambda t: chord([t.fail.s() | t.double.s() | t.double.s(), t.same.s(1)], t.total.s()),
        ChordError,
    ),
    "chord in a chord": (lambda t: chord([chord([t.fail.s()], t.total.s()), t.same.s(1)], t.total.s()), ChordError),
    "before a chord": (lambda t: t.fail.s() | group(t.double.s(), t.double.s()) | t.total.s(), ValueError),
    "after a chord": (lambda t: group(t.same.s(1)) | t.fail.s() | t.double.s(), ValueError),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_inline_is_the_result(inline: T, name: str) -> None:
    build, kind = ERRORS[name]

    with pytest.raises(kind, match="as told"):
        build(inline).apply().get()


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_in_a_worker_is_the_result(worked: T, name: str) -> None:
    build, kind = ERRORS[name]

    with pytest.raises(kind, match="as told"):
        build(worked).apply_async().get(timeout=10)


def test_what_could_not_run_says_so_to_whoever_has_only_its_id(worked: T) -> None:
    result = (worked.fail.s() | worked.double.s() | worked.double.s()).apply_async()

    for each in (result, result.parent, result.parent.parent):
        with pytest.raises(ValueError, match="as told"):
            worked.app.AsyncResult(each.id).get(timeout=10)


def test_a_chords_result_has_its_header_as_parent(worked: T) -> None:
    result = chord([worked.same.s(1), worked.same.s(2)], worked.total.s()).apply_async()

    assert result.get(timeout=10) == 3
    assert result.parent.get(timeout=10) == [1, 2]


def test_links_run_with_the_result_of_the_end() -> None:
    app = make_app()
    seen: list[Any] = []

    @app.task(name="note")
    def note(value: Any) -> None:
        seen.append(value)

    @app.task(name="note_error")
    def note_error(request: Any, error: BaseException, trace: str) -> None:
        seen.append(type(error).__name__)

    tasks = T(app)
    (tasks.add.s(1, 1) | tasks.double.s()).apply(link=note.s())
    chord([tasks.same.s(1)], tasks.total.s()).apply(link=note.s())
    (tasks.fail.s() | tasks.double.s()).apply(link_error=note_error.s())
    chord([tasks.fail.s()], tasks.total.s()).apply(link_error=note_error.s())
    with start_worker(app, pool="threads", concurrency=2):
        linked = (tasks.add.s(2, 2) | tasks.double.s()).apply_async(link=note.s())
        assert linked.get(timeout=10) == 8
        assert linked.children[0].get(timeout=10) is None
        failed = chord([tasks.fail.s(), tasks.same.s(1)], tasks.total.s()).apply_async(link_error=note_error.s())
        with pytest.raises(ChordError):
            failed.get(timeout=10)
    assert seen[:4] == [4, 1, "ValueError", "ChordError"]
    assert sorted(seen[4:], key=str) == [8, "ChordError"]


def test_add_to_chord_makes_the_body_wait_for_one_more() -> None:
    app = make_app()

    @app.task(name="adds", bind=True)
    def adds(self: Any, x: int) -> int:
        self.add_to_chord(app.tasks["same"].s(x + 1))
        return x

    tasks = T(app)
    with start_worker(app, pool="threads", concurrency=2):
        result = chord([tasks.adds.s(1), tasks.same.s(10)], tasks.total.s()).apply_async()
        assert result.get(timeout=10) == 13


def test_eager_compositions_run_at_once() -> None:
    tasks = T(make_app(task_always_eager=True))

    result = (tasks.same.s(1) | group(tasks.add.s(1), tasks.add.s(2)) | tasks.total.s()).delay()

    assert result.get() == 5


def test_options_of_a_composition_reach_the_tasks_they_are_for() -> None:
    app = make_app()
    tasks = T(app)
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
    tasks = T(app)

    begun, result = app.workflows.prepared(chord([tasks.add.s(1, 1), tasks.add.s(2, 2)], tasks.total.s()), (), {}, {})

    one, two = begun.calls
    assert one.options["group_id"] == two.options["group_id"]
    assert (one.options["group_index"], two.options["group_index"]) == (0, 1)
    body = one.options["chord"]
    assert body["task"] == "total"
    assert body["chord_size"] == 2
    assert body["options"]["task_id"] == result.id
    assert begun.chords == {one.options["group_id"]: 2}


def test_an_empty_chain_is_refused(inline: T) -> None:
    with pytest.raises(ConfigurationError, match="at least one task"):
        chain().apply_async()


def test_what_is_no_signature_is_refused(inline: T) -> None:
    with pytest.raises(TypeError, match="a signature is wanted"):
        group(1, 2)  # type: ignore[arg-type, unused-ignore]


def test_group_options_are_kept_by_members_that_are_frozen(inline: T) -> None:
    found = group(inline.add.s(1, 1), inline.add.s(2, 2))
    found.freeze("the-group")

    assert [member.options["group_id"] for member in found.tasks] == ["the-group"] * 2
    assert isinstance(found.tasks[0], Signature)
