"""What one message may ask for."""

from __future__ import annotations

from typing import Any

import pytest

from amqtask import AmqTask
from amqtask.exceptions import InvalidTaskError, QueueNotFound
from amqtask.execution.no_run import Bounds
from amqtask.testing.worker import start_worker

BOUNDS = Bounds(follow_ups=50, new_queues=3, known_queues={"known"})


def call(queue: str | None = None, **options: Any) -> dict[str, Any]:
    found = {**options, **({"queue": queue} if queue else {})}
    return {"task": "t", "args": [], "kwargs": {}, "options": found}


def group(*tasks: Any) -> dict[str, Any]:
    return {"task": "celery.group", "args": [], "kwargs": {"tasks": list(tasks)}, "options": {}}


def chain(*tasks: Any) -> dict[str, Any]:
    return {"task": "celery.chain", "args": [], "kwargs": {"tasks": list(tasks)}, "options": {}}


def chord(header: Any, body: Any) -> dict[str, Any]:
    return {"task": "celery.chord", "args": [], "kwargs": {"header": header, "body": body}, "options": {}}


@pytest.mark.parametrize(
    "embed",
    [
        {},
        {"callbacks": None, "errbacks": None, "chain": None, "chord": None},
        {"callbacks": [call()] * 25, "errbacks": [call()] * 25},
        {"callbacks": call("one")},
        {"callbacks": [call("one"), call("two"), call("three"), call("known"), call("one")]},
        # Of a chain only the next step is published now.
        {"chain": [call(f"q{n}") for n in range(1000)]},
        {"callbacks": [chain(*(call(f"q{n}") for n in range(1000)))]},
        {"chain": [group(*[call()] * 50)]},
        {"chain": [chord([call("a"), call("b")], call("c"))]},
        {"chain": [chord(group(call("a")), call())]},
        {"chord": {**call(), "chord_size": 2}},
    ],
)
def test_what_users_ask_for_passes(embed: dict[str, Any]) -> None:
    BOUNDS.check(embed)


@pytest.mark.parametrize(
    ("embed", "text"),
    [
        ({"callbacks": [call()] * 51}, "more than 50 follow-ups"),
        ({"errbacks": [call()] * 30, "callbacks": [group(*[call()] * 30)]}, "more than 50 follow-ups"),
        ({"chain": [group(*[group(*[call()] * 10)] * 10)]}, "more than 50 follow-ups"),
        ({"callbacks": [call(f"q{n}") for n in range(4)]}, "more than 3 queues"),
        ({"chain": [chord([call(f"q{n}") for n in range(4)], call())]}, "more than 3 queues"),
        ({"callbacks": 5}, "an int, not a list"),
        ({"callbacks": ["t"]}, "not a signature"),
        ({"callbacks": [{"task": 5}]}, "not a signature"),
        ({"callbacks": [{"task": "t", "options": [1]}]}, "no mapping"),
        ({"chain": "t"}, "a str, not a list"),
        ({"chain": [{"task": "celery.group", "kwargs": {"tasks": 5}}]}, "an int, not a list"),
        ({"chord": [1]}, "not a signature"),
        ({"chord": {**call(), "chord_size": 0}}, "chord_size"),
        ({"chord": {**call(), "chord_size": -1}}, "chord_size"),
        ({"chord": {**call(), "chord_size": "2"}}, "chord_size"),
        ({"chord": {**call(), "chord_size": True}}, "chord_size"),
        ({"chord": {**call(), "chord_size": 2.5}}, "chord_size"),
        ({"chord": {**call(), "chord_size": 10**30}}, "chord_size"),
    ],
)
def test_what_is_too_much_or_no_signature_is_refused(embed: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidTaskError, match=text):
        BOUNDS.check(embed)


CALLED: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("celery.group", (), {"tasks": [call()] * 50}),
    ("celery.group", ([call("known")],), {}),
    ("celery.chord", ([call()] * 50, call("other")), {}),
    ("celery.chain", (1,), {"tasks": [call(f"q{n}") for n in range(1000)]}),
    ("celery.chunks", (call(), list(range(500)), 10), {}),
]


@pytest.mark.parametrize(("task", "args", "kwargs"), CALLED)
def test_compositions_that_are_called_as_tasks_pass(task: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    BOUNDS.check_call(task, args, kwargs)


@pytest.mark.parametrize(
    ("task", "args", "kwargs", "text"),
    [
        ("celery.group", (), {"tasks": [call()] * 51}, "more than 50 follow-ups"),
        ("celery.group", ([call(f"q{n}") for n in range(4)],), {}, "more than 3 queues"),
        ("celery.chord", ([call(f"q{n}") for n in range(4)], call()), {}, "more than 3 queues"),
        ("celery.chord", (), {"header": group(*[call()] * 51)}, "more than 50 follow-ups"),
        ("celery.chain", (), {"tasks": [group(*[call()] * 51)]}, "more than 50 follow-ups"),
        ("celery.chunks", (call(), list(range(511)), 10), {}, "more than 50 follow-ups"),
        ("celery.chunks", (call(),), {"it": list(range(51)), "n": 0}, "more than 50 follow-ups"),
        ("celery.group", ("tasks",), {}, "a str, not a list"),
    ],
)
def test_what_they_publish_is_bounded(task: str, args: tuple[Any, ...], kwargs: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidTaskError, match=text):
        BOUNDS.check_call(task, args, kwargs)


def test_a_group_that_is_called_as_a_task_makes_no_queues_without_end() -> None:
    app = AmqTask("bounds", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.task(name="t")(lambda: None)
    members = [call(f"side{n}") for n in range(20)]
    with start_worker(app):
        result = app.send_task("celery.group", kwargs={"tasks": members})
        with pytest.raises(InvalidTaskError, match="more than 10 queues"):
            result.get(timeout=60)
    with app.broker.admin() as admin, pytest.raises(QueueNotFound):
        admin.count("side1")
    app.close()
