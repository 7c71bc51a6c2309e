"""Errbacks are called, whoever failed, however they were linked, and whatever they take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from amqtask import AmqTask, chord, group
from amqtask.testing.suites.compositions import Tasks, define
from amqtask.testing.worker import start_worker


class Scene(NamedTuple):
    """Tasks that a worker runs, and what was called."""

    tasks: Tasks
    called: list[tuple[Any, ...]]


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    app = define(AmqTask("errbacks", broker="memory://", backend="cache+memory://"))
    called: list[tuple[Any, ...]] = []

    @app.task(name="new_style")
    def new_style(request: Any, error: BaseException, trace: str, own: str = "") -> None:
        called.append(("new", request.id, own))

    @app.task(name="old_style")
    def old_style(task_id: str) -> None:
        called.append(("old", task_id, ""))

    @app.task(name="with_argument")
    def with_argument(task_id: str, own: str) -> None:
        called.append(("old", task_id, own))

    @app.task(name="bound", bind=True)
    def bound(self: Any, task_id: str, own: str = "") -> None:
        called.append(("old", task_id, own))

    @app.task(name="alone")
    def alone(own: str) -> None:
        called.append(("alone", None, own))

    with start_worker(app, pool="threads", concurrency=1):
        yield Scene(Tasks(app), called)


COMPOSED: dict[str, Callable[[Any], Any]] = {
    "a chord's header": lambda t: chord([t.fail.s(), t.same.s(1)], t.total.s()),
    "a header before a group": lambda t: chord([t.fail.s()], group(t.same.s(), t.same.s())),
    "a header before a chain": lambda t: chord([t.fail.s()], t.same.s() | t.same.s()),
    "a header before a group of chords": lambda t: chord(
        [t.fail.s()], group(chord([t.same.s()], t.total.s()), t.same.s())
    ),
    "a chord in a body that is a group": lambda t: chord(
        [t.same.s(1)], group(chord([t.fail.s()], t.total.s()), t.same.s())
    ),
    "a group in a header": lambda t: chord([group(t.fail.s(), t.same.s(1)), t.same.s(2)], t.total.s()),
    "a chain": lambda t: t.same.s(1) | t.fail.s() | t.same.s(),
    "a member of a group": lambda t: group(t.fail.s(), t.same.s(1)),
}
LINKED: dict[str, Callable[[Any, Any], Any]] = {
    "by method": lambda composed, errback: (composed.link_error(errback), composed.apply_async())[1],
    "as an option": lambda composed, errback: composed.apply_async(link_error=errback),
    "as a list": lambda composed, errback: composed.apply_async(link_error=[errback]),
    "as a dictionary": lambda composed, errback: composed.set(link_error=dict(errback)).apply_async(),
}
ERRBACKS: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "request, exc, traceback": (lambda t: t.new_style.s(), "new", ""),
    "request, exc, traceback and its own": (lambda t: t.new_style.s("own"), "new", "own"),
    "the id": (lambda t: t.old_style.s(), "old", ""),
    "the id and its own": (lambda t: t.with_argument.s("own"), "old", "own"),
    "the id and its own by name": (lambda t: t.with_argument.s(own="own"), "old", "own"),
    "itself and the id": (lambda t: t.bound.s(), "old", ""),
    "nothing of the failure": (lambda t: t.alone.si("own"), "alone", "own"),
}


def ended(scene: Scene, result: Any, count: int = 1) -> list[tuple[Any, ...]]:
    """What was called when all of it has ended: the one worker's slot takes one task after the other."""
    result.get(timeout=60, propagate=False)
    # An errback may be published a moment after the result; then no other one must come.
    for number in range(100):
        scene.tasks.same.delay(1).get(timeout=60)
        if number >= 3 and len(scene.called) >= count:
            break
    return list(scene.called)


@pytest.mark.parametrize("linked", LINKED)
@pytest.mark.parametrize("composed", COMPOSED)
def test_an_errback_is_called_for(scene: Scene, composed: str, linked: str) -> None:
    for errback, kind in ((scene.tasks.new_style.s(), "new"), (scene.tasks.old_style.s(), "old")):
        scene.called.clear()

        result = LINKED[linked](COMPOSED[composed](scene.tasks), errback)

        assert [call[0] for call in ended(scene, result)] == [kind]


@pytest.mark.parametrize("takes", ERRBACKS)
def test_an_errback_that_takes(scene: Scene, takes: str) -> None:
    make, kind, own = ERRBACKS[takes]
    for composed in (scene.tasks.fail.s(), COMPOSED["a chord's header"](scene.tasks)):
        scene.called.clear()
        composed.link_error(make(scene.tasks))

        result = composed.apply_async()

        task_id = None if kind == "alone" else result.id
        assert ended(scene, result) == [(kind, task_id, own)]


def test_a_failed_member_of_a_header_has_the_errback_too_where_the_setting_says_so(scene: Scene) -> None:
    app = scene.tasks.app
    app.conf.task_allow_error_cb_on_chord_header = True
    try:
        for errback in (scene.tasks.new_style.s("own"), scene.tasks.with_argument.s("own")):
            scene.called.clear()
            composed = chord(
                [scene.tasks.fail.s(), group(scene.tasks.fail.s()), scene.tasks.same.s(1)], scene.tasks.total.s()
            )
            composed.link_error(errback)

            result = composed.apply_async()

            assert [call[2] for call in ended(scene, result, 3)] == ["own"] * 3
    finally:
        app.conf.task_allow_error_cb_on_chord_header = False
