"""Stamps travel with every task of a composition."""

from __future__ import annotations

from typing import Any

from amqtask import AmqTask, StampingVisitor, canvas, chain, chord, group
from amqtask.testing.suites.compositions import Tasks, define
from amqtask.testing.worker import start_worker


def make_tasks(**settings: Any) -> tuple[AmqTask, Tasks]:
    app = define(AmqTask("stamps", broker="memory://", backend="cache+memory://", **settings))

    @app.task(name="stamps", bind=True)
    def stamps(self: Any, *args: Any) -> Any:
        return self.request.stamps

    return app, Tasks(app)


class Numbered(StampingVisitor):
    """Counts what it sees, and says where."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_signature(self, sig: Any, **headers: Any) -> dict[str, Any]:
        self.seen.append(sig.task)
        return {"number": len(self.seen), "stamped_headers": ["number"]}

    def on_chord_body(self, chord: Any, **headers: Any) -> dict[str, Any]:
        return {"place": "body"}

    def on_callback(self, callback: Any, **headers: Any) -> dict[str, Any]:
        return {"place": "callback"}


def test_a_stamp_reaches_every_task() -> None:
    app, tasks = make_tasks()
    composed = chord([tasks.stamps.s(), tasks.same.s(1) | tasks.stamps.s()], tasks.same.s())
    composed.stamp(customer="seven")

    with start_worker(app, pool="threads", concurrency=2):
        assert composed.apply_async().get(timeout=60) == [{"customer": "seven"}, {"customer": "seven"}]


def test_a_visitor_stamps_each_part_in_its_own_way() -> None:
    _, tasks = make_tasks()
    visitor = Numbered()
    composed = chord([tasks.add.s(1, 1), tasks.double.s(2)], tasks.total.s())

    composed.stamp(visitor)

    assert visitor.seen == ["add", "double", "total"]
    assert [member.options["number"] for member in composed.tasks] == [1, 2]
    assert composed.body is not None
    assert composed.body.options["place"] == "body"
    assert sorted(composed.body.options["stamped_headers"]) == ["number", "place"]


def test_callbacks_are_stamped_too() -> None:
    _, tasks = make_tasks()
    call = tasks.add.s(1, 1)
    call.link(tasks.double.s())

    call.stamp(Numbered())

    (callback,) = call.options["link"]
    assert callback.options["place"] == "callback"


def test_the_last_stamp_of_a_name_counts_unless_they_are_appended() -> None:
    _, tasks = make_tasks()
    once, both = tasks.add.s(1, 1), tasks.add.s(1, 1)

    once.stamp(by="first").stamp(by="second")
    both.stamp(by="first").stamp(by="second", append_stamps=True)

    assert once.options["by"] == "second"
    assert both.options["by"] == ["second", "first"]


def test_a_stamp_stays_when_the_call_says_otherwise() -> None:
    _, tasks = make_tasks()
    call = tasks.add.s(1, 1).stamp(by="me")

    assert call.clone(by="another").options["by"] == "me"


def test_groups_and_chains_hand_stamps_down() -> None:
    _, tasks = make_tasks()
    composed = group(chain(tasks.add.s(1, 1), tasks.double.s()), tasks.add.s(2, 2)).stamp(where="here")

    members = composed.tasks
    assert [step.options["where"] for step in members[0].tasks] == ["here", "here"]
    assert members[1].options["where"] == "here"


def test_a_replacement_carries_the_stamps_of_the_task_it_replaces() -> None:
    app, tasks = make_tasks()

    @app.task(name="hands_over", bind=True)
    def hands_over(self: Any) -> Any:
        return self.replace(tasks.stamps.s())

    with start_worker(app, pool="threads", concurrency=1):
        assert hands_over.s().stamp(by="me").apply_async().get(timeout=60) == {"by": "me"}


def test_an_extended_result_has_the_stamps() -> None:
    app, tasks = make_tasks(result_extended=True)

    with start_worker(app, pool="threads", concurrency=1):
        result = tasks.add.s(1, 1).stamp(by="me").apply_async()
        assert result.get(timeout=60) == 2
    assert app.backend is not None
    meta = app.backend.find(result.id)
    assert meta is not None
    assert (meta.extra["stamped_headers"], meta.extra["by"]) == (["by"], "me")


def test_the_visitor_is_where_celerys_users_import_it() -> None:
    names: Any = canvas

    assert names.StampingVisitor is StampingVisitor
    assert names.subtask is names.signature
