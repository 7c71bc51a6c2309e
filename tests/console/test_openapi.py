"""The document of the JSON API: each listed path is there, and answers as it is described, with no field more or less."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from amqtask import Breaker, Concurrency, Rate
from amqtask.console.actions import ACTIONS
from amqtask.console.notices import AlertLog, Problem, note_depths
from amqtask.console.openapi import FIELDS, PAGES
from amqtask.flow.contract import Entry
from amqtask.protocol.message import Message
from amqtask.testing.worker import start_worker
from amqtask.worker.finisher import copied_properties
from tests.console.test_console import Shown

# Something for each place in a path.
PLACES = {"{task_id}": "bad", "{some_id}": "root", "{action}": "rerun"}
# Lists that have nothing here.
EMPTY = frozenset({"follows", "destinations"})


@pytest.fixture
def shown(tmp_path: Path) -> Iterator[Shown]:
    """With something in each list of each page."""
    made = Shown(tmp_path)
    made.app.conf.update(
        beat_scheduler="memory",
        beat_schedule={name: {"task": "shop.send", "schedule": 60.0} for name in ("often", "never")},
    )
    now = time.time()
    _limit(made)
    _die(made)
    made.app.send_task("shop.send", ("x@y",), countdown=600)
    message = {"body": "W1tdLCB7fSwgbnVsbF0=", "headers": {"id": "bad"}, "content_type": "application/json"}
    made.tell(now, "bad", "failed", exception="ValueError('x')", parent_id="good", message=message)
    made.tell(now, "child", "succeeded", parent_id="bad", rerun_of="bad", stamps={"tenant": "7"}, periodic="often")
    _tell_workflow(made, now)
    heard = {"type": "worker-heartbeat", "freq": 2.0, "active": 0, "processed": 7, "hostname": "w1@host"}
    made.app.history.index.take([{**heard, "timestamp": now - 900}])
    made.do("pause", queue="mail")
    made.do("pause", queue="elsewhere")
    made.do("schedule-pause", name="never")
    _fire(made, now)
    _open_a_breaker(made)
    yield made
    made.app.close()


def _limit(made: Shown) -> None:
    """A task with limits, one of which was set and has a key that is used."""
    limits = [Rate("5/s"), Concurrency(1, by="who")]
    made.app.task(name="limited", limits=limits)(lambda who: None)
    made.app.finalize()
    made.app.limits.set("limited", "concurrency by who", 2, by="ann")
    gate = made.app.runtime.make_gate()
    assert gate is not None
    gate.enter("limited", "id", 1, {}, ("bob",), {})


def _open_a_breaker(made: Shown) -> None:
    """By a run that fails."""

    @made.app.task(name="shop.pay", breaker=Breaker(failures=1, pause=3600))
    def pay() -> None: ...

    plan = pay.flow_plan
    assert plan is not None
    entry = Entry(plan.scope, "id", "holder", None, (), guard=plan.guard)
    store = made.app.runtime.flow_store
    store.enter(entry, 30)
    store.leave(entry, 0.1, "free", "failure")


def _die(made: Shown) -> None:
    """A dead letter."""
    made.app.send_task("shop.send", ("x@y",))
    with made.app.broker.admin() as admin:
        (delivery,) = admin.browse("mail", 1)
    headers = {**delivery.properties.headers, "x-amqtask-reason": "unknown task"}
    properties = replace(copied_properties(delivery.properties), headers=headers)
    declarations = made.app.queues.declarations(made.app.queues["mail"])
    made.app.publisher.publish(Message(delivery.body, properties, "", "mail.dead", declarations))


def _tell_workflow(made: Shown, now: float) -> None:
    """A task that calls a chord of three, two of which are known; and what follows it is not told whole."""
    made.tell(now, "root", "succeeded", follows=[{"how": "chain", "more": 5}])
    body = {"how": "chord", "task": "shop.total", "id": "body", "size": 3}
    for number, task_id in enumerate(("one", "two")):
        of_group = {"parent_id": "root", "root_id": "root", "group_id": "g", "group_index": number, "follows": [body]}
        made.tell(now + 1, task_id, "succeeded", **of_group)


def _fire(made: Shown, now: float) -> None:
    """An alert that fires and could not be told, one that is over, and a queue with messages."""
    log = AlertLog(made.app.history.index)
    for subject in ("mail.dead", "other.dead"):
        log.fire(Problem("dead-letters", subject, "3 dead letters", 3, 0), now, ["hook"], {})
    notice = log.claim(now)
    assert notice is not None
    log.failed(notice, now, "no answer")
    log.resolve(log.firing()["dead-letters", "other.dead"]["id"], now, [], {})
    note_depths(made.app.history.index, {"mail": 3}, now)


@pytest.fixture
def document(shown: Shown) -> Any:
    return shown.client.get("/api/openapi.json").json()


def _check(answer: Any, operation: Any, components: Any) -> None:
    described = operation["responses"][str(answer.status_code)]["content"]["application/json"]["schema"]
    schema = {**described, "components": components}
    jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).validate(answer.json())


def _strict(schema: Any, name: str = "") -> Any:
    """The same schema, by which an answer has no field that is not described, and no empty list."""
    if isinstance(schema, list):
        return [_strict(one, name) for one in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: value if key == "enum" else _strict(value, name) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict):
        strict["properties"] = {key: _strict(value, key) for key, value in schema["properties"].items()}
        strict.setdefault("additionalProperties", False)
    if schema.get("type") == "array" and name not in EMPTY:
        strict["minItems"] = 1
    return strict


def test_each_path_answers_as_it_is_described_with_no_field_more(shown: Shown, document: Any) -> None:
    components = {"schemas": {name: _strict(one) for name, one in document["components"]["schemas"].items()}}
    # Lists that some rows have, and others not.
    for name, one in (
        ("Task", "follows"),
        ("Task", "steps"),
        ("Worker", "queues"),
        ("Worker", "paused"),
        ("Worker", "tasks"),
        ("Schedule", "runs"),
    ):
        components["schemas"][name]["properties"][one].pop("minItems", None)
    answers = {}
    with start_worker(shown.app, hostname="w1@here"):
        for path, operations in document["paths"].items():
            if "get" in operations:
                asked = path
                for place, value in PLACES.items():
                    asked = asked.replace(place, value)
                answers[path] = shown.client.get(asked, params={"state": "FAILURE"} if "/many/" in asked else {})
    for path, answer in answers.items():
        assert answer.status_code == 200, (path, answer.text)
        _check(answer, _strict(document["paths"][path]["get"]), components)
        assert "message" not in _names(answer.json()), path

    workflow = answers["/api/workflows/{some_id}"].json()["lines"]
    assert {line["kind"] for line in workflow} == {"task", "group", "expected", "hidden"}
    assert {row["state"] for row in answers["/api/workers"].json()["workers"]} == {"there", "gone"}
    assert [bool(row["paused"]) for row in answers["/api/schedules"].json()["entries"]] == [True, False]


def _names(value: Any) -> set[str]:
    """The names of all fields within a value."""
    if isinstance(value, list):
        return set().union(*map(_names, value)) if value else set()
    return set(value).union(*map(_names, value.values())) if isinstance(value, dict) else set()


def test_each_action_without_its_fields_is_an_error_as_described(shown: Shown, document: Any) -> None:
    actions = {path: told["post"] for path, told in document["paths"].items() if "post" in told}
    assert set(actions) == {f"/api/do/{name}" for name in ACTIONS}
    for path, operation in actions.items():
        answer = shown.client.post(path, json={})
        assert answer.status_code in (400, 404), path
        _check(answer, operation, document["components"])
        assert operation["summary"]
    answer = shown.client.post("/api/do/resume", json={"queue": "mail"})
    _check(answer, actions["/api/do/resume"], document["components"])


def test_what_is_not_there_and_who_may_not_ask_get_the_error_that_is_described(tmp_path: Path, document: Any) -> None:
    shown = Shown(tmp_path / "..", users={"ann": "scrypt$00$00"})
    for path, operations in document["paths"].items():
        (how, operation), *_ = operations.items()
        answer = shown.client.request(how.upper(), path, json={} if how == "post" else None)
        assert answer.status_code == 401, path
        _check(answer, operation, document["components"])
    shown.app.close()


def test_the_document_itself_is_right(document: Any) -> None:
    assert document["openapi"].startswith("3.1")
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    assert {f"/api{path}" for path in PAGES if path != "/"} <= set(document["paths"])
    assert set(FIELDS) <= set(ACTIONS)
