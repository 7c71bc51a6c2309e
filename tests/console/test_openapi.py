"""The document of the JSON API: each listed path is there, and answers as it is described."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from amqtask.console.actions import ACTIONS
from amqtask.console.openapi import FIELDS, PAGES
from amqtask.testing.worker import start_worker
from tests.console.test_console import Shown

# Something for each place in a path.
PLACES = {"{task_id}": "bad", "{some_id}": "bad", "{action}": "rerun"}


@pytest.fixture
def shown(tmp_path: Path) -> Iterator[Shown]:
    """With something on each page."""
    made = Shown(tmp_path)
    made.app.send_task("shop.send", ("x@y",), countdown=600)
    now = time.time()
    made.app.history.index.take(
        [
            {
                "type": "worker-heartbeat",
                "hostname": "w1@host",
                "timestamp": now,
                "freq": 2.0,
                "active": 0,
                "processed": 7,
            }
        ]
    )
    made.do("pause", queue="mail")
    yield made
    made.app.close()


@pytest.fixture
def document(shown: Shown) -> Any:
    return shown.client.get("/api/openapi.json").json()


def _resolved(schema: Any, document: Any) -> Any:
    return {**schema, "components": document["components"]}


def _check(answer: Any, operation: Any, document: Any) -> None:
    described = operation["responses"][str(answer.status_code)]["content"]["application/json"]["schema"]
    jsonschema.Draft202012Validator(_resolved(described, document)).validate(answer.json())


def test_each_path_answers_as_it_is_described(shown: Shown, document: Any) -> None:
    with start_worker(shown.app, hostname="w1@here"):
        for path, operations in document["paths"].items():
            if "get" not in operations:
                continue
            asked = path
            for place, value in PLACES.items():
                asked = asked.replace(place, value)
            assert "{" not in asked
            answer = shown.client.get(asked, params={"state": "FAILURE"} if "/many/" in asked else {})
            # The example is of no workflow.
            assert answer.status_code == 200 or "/workflows/" in asked, (path, answer.text)
            _check(answer, operations["get"], document)


def test_each_action_without_its_fields_is_an_error_as_described(shown: Shown, document: Any) -> None:
    actions = {path: told["post"] for path, told in document["paths"].items() if "post" in told}
    assert set(actions) == {f"/api/do/{name}" for name in ACTIONS}
    for path, operation in actions.items():
        answer = shown.client.post(path, json={})
        assert answer.status_code in (400, 404), path
        _check(answer, operation, document)
        assert operation["summary"]
    answer = shown.client.post("/api/do/resume", json={"queue": "mail"})
    _check(answer, actions["/api/do/resume"], document)


def test_what_is_not_there_and_who_may_not_ask_get_the_error_that_is_described(tmp_path: Path, document: Any) -> None:
    shown = Shown(tmp_path / "..", users={"ann": "scrypt$00$00"})
    for path, operations in document["paths"].items():
        (how, operation), *_ = operations.items()
        answer = shown.client.request(how.upper(), path, json={} if how == "post" else None)
        assert answer.status_code == 401, path
        _check(answer, operation, document)
    shown.app.close()


def test_the_document_itself_is_right(document: Any) -> None:
    assert document["openapi"].startswith("3.1")
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    assert {f"/api{path}" for path in PAGES if path != "/"} <= set(document["paths"])
    assert set(FIELDS) <= set(ACTIONS)
