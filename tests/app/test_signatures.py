"""Signatures as programs for Celery make and change them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from amqtask import AmqTask, Signature, chain, chord, group, maybe_signature, shared_task, signals, signature
from amqtask.calls.signature import StampingVisitor
from amqtask.testing.suites.compositions import COMPOSITIONS, Tasks, define
from amqtask.testing.worker import start_worker


@pytest.fixture(scope="module")
def tasks() -> Tasks:
    """Tasks that are run by their caller."""
    return Tasks(define(AmqTask("signatures", broker="memory://", backend="cache+memory://")))


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_a_signature_is_rebuilt_from_its_dictionary_as_what_it_was(tasks: Tasks, name: str) -> None:
    build, _ = COMPOSITIONS[name]
    built = build(tasks)
    rebuilt = Signature.from_dict(json.loads(json.dumps(built)))

    assert type(rebuilt) is type(built)
    assert json.dumps(rebuilt) == json.dumps(built)


def test_a_signatures_fields_may_be_set(tasks: Tasks) -> None:
    call = tasks.add.s(1, 2)
    call.args = [3]
    call.kwargs = {"y": 4}
    call.options = {"priority": 2}
    call.immutable = True
    call.task = "total"

    assert call == {**tasks.total.si(3, y=4), "options": {"priority": 2}}


def test_a_task_may_stand_where_a_signature_does(tasks: Tasks) -> None:
    header = [tasks.same.s(1), tasks.same.s(2)]

    assert (group(header) | tasks.total).apply().get() == 3
    assert (tasks.same.s(2) | tasks.double | tasks.double).apply().get() == 8
    assert (tasks.total | tasks.double.s()).apply(([2, 3],)).get() == 10
    assert chord(header, tasks.total).apply().get() == 3
    assert chord(tasks.same, tasks.total).apply((4,)).get() == 4
    assert chain(tasks.same.s(1), tasks.double).apply().get() == 2
    assert group(tasks.same, tasks.double).apply((1,)).get() == [1, 2]


def test_a_task_may_be_a_callback(tasks: Tasks) -> None:
    seen: list[Any] = []

    @tasks.app.task(name="notes")
    def notes(value: Any) -> None:
        seen.append(value)

    tasks.same.apply((1,), link=notes)
    tasks.same.apply((2,), link=[notes, notes.s()])
    tasks.same.s(3).set(link=notes).apply()
    call = tasks.same.s(4)
    call.link(notes)
    call.apply()
    failing = tasks.fail.s()
    failing.link_error(notes)
    failing.apply()

    assert seen[:5] == [1, 2, 2, 3, 4]
    assert len(seen) == 6


def test_a_frozen_chain_has_the_id_of_its_last_task(tasks: Tasks) -> None:
    last = tasks.add.s(2).set(task_id="42")
    steps = tasks.same.s(4) | last

    assert steps.id is None
    result = steps.freeze()

    assert steps.id == result.id == "42"


def test_a_shared_task_is_found_by_name_before_the_application_was_used() -> None:
    @shared_task(name="shared_by_name")
    def shared(x: int) -> int:
        return 2 * x

    @shared_task(name="shared_errback")
    def errback(task_id: str) -> None:
        seen.append(task_id)

    seen: list[str] = []
    app = AmqTask("late", broker="memory://", task_always_eager=True)

    assert signature("shared_by_name", (1,), app=app).apply().get() == 2
    assert signature("shared_by_name", app=AmqTask("later", broker="memory://"))(2) == 4
    eager = AmqTask("latest", broker="memory://", task_always_eager=True)
    assert eager.send_task("shared_by_name", (3,)).get() == 6
    failing = signature("shared_by_name", ("no", "number"), app=app)
    failing.link_error(signature("shared_errback"))
    failed = failing.apply()
    assert seen == [failed.id]


def test_who_hears_of_received_tasks_sees_their_stamps_and_family() -> None:
    app = define(AmqTask("heard", broker="memory://", backend="cache+memory://"))
    named = Tasks(app)
    heard: list[Any] = []

    def note(request: Any, **_: Any) -> None:
        heard.append(request)

    signals.task_received.connect(note)
    try:
        with start_worker(app, pool="threads", concurrency=1):
            stamped = named.add.s(1, 1)
            stamped.stamp(shop="north")
            result = stamped.apply_async()
            assert result.get(timeout=60) == 2
            assert named.replaced.delay(1).get(timeout=60) == 101
    finally:
        signals.task_received.disconnect(note)
    first, *_, last = heard
    assert (first.task_id, first.task_name, first.name) == (result.id, "add", "add")
    assert (first.stamps, first.stamped_headers) == ({"shop": "north"}, ["shop"])
    assert (first.replaced_task_nesting, last.replaced_task_nesting) == (0, 1)
    assert (first.root_id, first.parent_id) == (first.id, None)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = first.nonsense


@pytest.mark.parametrize("build", [lambda t: t.add.s(1, 1), lambda t: group(t.same.s(1), t.same.s(2))])
def test_links_that_are_dictionaries_are_stamped(tasks: Tasks, build: Any) -> None:
    class OnLinks(StampingVisitor):
        def on_signature(self, sig: Any, **headers: Any) -> dict[str, Any]:
            return {}

        def on_callback(self, callback: Any, **headers: Any) -> dict[str, Any]:
            return {"called": True}

        def on_errback(self, errback: Any, **headers: Any) -> dict[str, Any]:
            return {"failed": True}

    composed = build(tasks)
    composed.link(dict(tasks.same.s()))
    composed.link_error(dict(tasks.same.s()))
    alone = tasks.add.s(1, 1)
    alone.options["link"] = dict(tasks.same.s())
    for each in (composed, alone):
        each.stamp(visitor=OnLinks())

    first = composed.tasks[0] if isinstance(composed, group) else composed
    assert first.options["link"][0]["options"]["called"] is True
    assert first.options["link_error"][0]["options"]["failed"] is True
    assert alone.options["link"][0]["options"]["called"] is True


def test_maybe_signature_takes_what_celerys_takes() -> None:
    """Celery's own tests of it: None stays None, and a clone is another object."""
    sig = signature("sums.add", (2, 2))

    assert maybe_signature(None) is None
    assert maybe_signature(None, clone=True) is None
    assert maybe_signature(sig) is sig
    assert maybe_signature(dict(sig)) == sig
    copied = maybe_signature(sig, clone=True)
    assert (copied, copied is sig) == (sig, False)
    with pytest.raises(TypeError):
        maybe_signature(5)  # type: ignore[call-overload]
