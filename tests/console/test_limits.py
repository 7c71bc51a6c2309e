"""The page of limits: how far they are used, that other numbers are set and reset, and who may do that."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from amqtask import AmqTask, Concurrency, Rate
from amqtask.console.access import Access
from amqtask.console.web import console
from tests.console.test_console import EVIL, LOCAL, Client


class Limited:
    """The console of an application with limited tasks, of which one is used."""

    def __init__(self, folder: Path, **access: Any) -> None:
        self.app = AmqTask("shop", broker="memory://", set_as_current=False)
        self.app.conf.history_url = f"sqlite:///{folder}/index.sqlite3"
        self.sync = self.app.task(name="sync", limits=[Concurrency(1, by="tenant"), Rate("500/m")])(lambda tenant: None)
        self.client = Client(console(self.app, access=Access(**access)))
        self.app.finalize()
        gate = self.app.runtime.make_gate()
        assert gate is not None
        for number in range(3):
            gate.enter("sync", f"call-{number}", number, {}, (EVIL,), {})

    @property
    def rows(self) -> list[Any]:
        rows: list[Any] = self.client.get("/api/limits").json()["limits"]
        return rows

    def do(self, action: str, **fields: str) -> Any:
        return self.client.post(f"/do/{action}", data={**fields, "back": "/limits"}, headers={"Origin": LOCAL})


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[Limited]:
    made = Limited(tmp_path)
    yield made
    made.app.close()


def test_it_shows_how_far_limits_are_used(limited: Limited) -> None:
    of_tenants, rate = limited.rows

    assert (of_tenants["limit"], of_tenants["value"]) == ("concurrency by tenant", "1")
    assert (of_tenants["running"], of_tenants["waiting"]) == (1, 2)
    assert of_tenants["keys"] == [{"key": EVIL, "running": 1, "waiting": 2}]
    assert (rate["limit"], rate["value"], rate["running"]) == ("rate", "500/m, burst 8", 0)
    page = limited.client.get("/limits").text
    assert (EVIL in page, "&lt;script&gt;" in page) == (False, True)


def test_numbers_are_set_and_reset_and_that_is_written_down(limited: Limited) -> None:
    assert limited.do("limit-set", task="sync", limit="rate", value="5/s", burst="2").status_code == 303
    row = limited.rows[1]
    assert (row["value"], row["in_code"], row["by"]) == ("5/s, burst 2", "500/m, burst 8", "local")
    assert "the code says 500/m, burst 8" in limited.client.get("/limits").text
    limited.do("limit-reset", task="sync", limit="rate")
    assert (limited.rows[1]["value"], limited.rows[1]["by"]) == ("500/m, burst 8", None)
    for fields in (
        {"task": "sync", "limit": "rate", "value": "fast"},
        {"task": "sync", "limit": "rate", "value": "5/s", "burst": "x"},
        {"task": "sync", "limit": "concurrency by tenant", "value": "0"},
        {"task": "sync", "limit": "nothing", "value": "5"},
        {"task": "nobody", "limit": "rate", "value": "5/s"},
        {"task": "sync", "limit": "rate"},
    ):
        assert limited.do("limit-set", **fields).status_code == 400
    actions = limited.client.get("/api/audit").json()["actions"]
    assert [one["action"] for one in actions if "refused" not in one["outcome"]] == ["limit-reset", "limit-set"]


def test_those_who_look_change_nothing(tmp_path: Path) -> None:
    limited = Limited(tmp_path, header="X-User", operators=frozenset({"ann"}))

    bob = {"X-User": "bob", "Origin": LOCAL}
    fields = {"task": "sync", "limit": "rate", "value": "5/s"}
    assert limited.client.post("/do/limit-set", data=fields, headers=bob).status_code == 403
    page = limited.client.get("/limits", headers=bob)
    assert (page.status_code, "<button>Set" in page.text) == (200, False)
    limited.app.close()


def test_without_a_store_that_is_said(tmp_path: Path) -> None:
    limited = Limited(tmp_path)
    limited.app.conf.broker_url = "amqp://nowhere.invalid//"

    assert "need a store" in limited.client.get("/limits").text
    limited.app.close()
