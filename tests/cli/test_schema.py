"""`amqtask schema`: tasks described from their signatures. That programs work with it is shown in integration/test_schema.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest
from pydantic import BaseModel

from amqtask import AmqTask, Batch
from amqtask.cli.main import run
from amqtask.schemas import read_contracts


class Line(BaseModel):
    """One of an order."""

    sku: str
    count: int = 1


class Handle:
    """Nothing that JSON has."""


def made() -> AmqTask:
    """An application with tasks of all kinds."""
    app = AmqTask("shop", broker="amqp://user:secret@broker/shop", set_as_current=False)
    app.conf.task_routes = {"orders.*": {"queue": "orders"}}

    @app.task(name="orders.place", pydantic=True)
    def place(lines: list[Line], how: Literal["fast", "slow"] = "fast") -> Line:
        """Place an order."""
        return lines[0]

    @app.task(name="loose", bind=True)
    def loose(self: object, anything, /, *others: int, named=None, **more: str):  # type: ignore[no-untyped-def]
        return anything

    @app.task(name="odd")
    async def odd(handle: Handle) -> None:
        return None

    return app


def schema_of(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    """The document that the command prints."""
    assert run(["schema", *words], made()) == 0
    return json.loads(capsys.readouterr().out)


def test_calls_are_judged_by_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    schema = schema_of(capsys)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)

    def is_right(task: str, **arguments: object) -> bool:
        return bool(validator.is_valid({task: {"arguments": arguments}}))

    assert is_right("orders.place", lines=[{"sku": "a"}], how="slow")
    assert not is_right("orders.place", lines=[{"sku": 1}])
    assert not is_right("orders.place", lines=[], how="never")
    assert not is_right("orders.place")
    assert not is_right("orders.plaec", lines=[])
    assert is_right("loose", anything=object, more="text")
    assert not is_right("loose", anything=1, more=2)
    assert schema["properties"]["orders.place"]["description"] == "Place an order."
    assert schema["properties"]["orders.place"]["properties"]["arguments"]["properties"]["how"]["default"] == "fast"


def test_a_batch_task_takes_calls_of_any_kind() -> None:
    app = AmqTask("shop", set_as_current=False)
    app.task(name="insert", batch=Batch())(lambda calls: None)
    contracts = read_contracts([(app.tasks["insert"], None)], refs="#/", warn=print)
    (contract,) = contracts.tasks
    assert (contract.arguments, contract.rest, contract.named_rest) == ((), {}, {})


def test_only_some_tasks_and_slips(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(schema_of(capsys, "loose")["properties"]) == ["loose"]

    assert run(["schema", "orders.palce"], made()) == 2
    assert "orders.place" in capsys.readouterr().err


def test_what_has_no_schema_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["schema", "odd"], made()) == 0

    printed = capsys.readouterr()
    assert "odd: its argument 'handle' is" in printed.err
    assert json.loads(printed.out)["properties"]["odd"]["properties"]["arguments"]["properties"] == {"handle": {}}


def test_asyncapi_has_the_places_of_tasks_and_no_password(capsys: pytest.CaptureFixture[str]) -> None:
    document = schema_of(capsys, "--asyncapi", "--api-version", "2.1.0")

    assert (document["asyncapi"], document["info"]) == ("3.0.0", {"title": "shop", "version": "2.1.0"})
    assert document["servers"]["broker"] == {"host": "broker:5672", "protocol": "amqp", "pathname": "shop"}
    assert document["operations"]["orders.place"]["channel"] == {"$ref": "#/channels/orders"}
    assert document["channels"]["orders"]["bindings"]["amqp"]["queue"]["name"] == "orders"
    positional, named, _ = document["components"]["messages"]["loose"]["payload"]["items"]
    assert (positional["items"], positional["additionalItems"]) == ([{}], {"type": "integer"})
    assert named["additionalProperties"] == {"type": "string"}
    assert "secret" not in json.dumps(document)


def test_the_types_of_a_producer(tmp_path: Path) -> None:
    file = tmp_path / "producer.ts"
    assert run(["schema", "--typescript", "-o", str(file), "orders.place", "loose"], made()) == 0

    text = file.read_text()
    assert 'arguments: { lines: Line[]; how?: "fast" | "slow" };' in text
    assert "arguments: { anything: unknown; named?: unknown } & Record<string, unknown>;" in text
    assert "rest: number[];" in text


def test_without_pydantic_it_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    app = AmqTask("plain", broker="amqp://", set_as_current=False)
    monkeypatch.setitem(sys.modules, "pydantic", None)

    assert run(["schema"], app) == 1
    assert "pip install 'amqtask[pydantic]'" in capsys.readouterr().err


def test_a_producer_speaks_amqp_only(capsys: pytest.CaptureFixture[str]) -> None:
    app = AmqTask("plain", broker="redis://localhost", set_as_current=False)

    assert run(["schema", "--typescript"], app) == 1
    assert "speaks AMQP" in capsys.readouterr().err
