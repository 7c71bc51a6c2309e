"""Signatures as programs for Celery make and change them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from amqtask import AmqTask, Signature, chain, chord, group, shared_task, signature
from amqtask.testing.suites.compositions import COMPOSITIONS, Tasks, define


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
