"""The page of periodic tasks: last runs, the next 24 hours, and that pausing, resuming and running by hand are done and noted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from amqtask import AmqTask
from amqtask.beat.operating import Schedules
from amqtask.console.access import Access
from amqtask.console.web import console
from amqtask.schedules import crontab
from tests.console.test_console import EVIL, LOCAL, Client
from tests.console.test_workflows import told


class Planned:
    """The console of an application with periodic tasks."""

    def __init__(self, folder: Path, **access: Any) -> None:
        self.app = AmqTask("shop", broker="memory://", set_as_current=False)
        self.app.conf.update(
            history_url=f"sqlite:///{folder}/index.sqlite3",
            task_history=True,
            beat_scheduler="memory",
            task_default_queue="work",
            beat_schedule={
                "nightly": {"task": "report", "schedule": crontab(minute=0, hour=3), "args": ("pdf",)},
                "often": {"task": "tick", "schedule": 60.0},
                "off": {"task": "tick", "schedule": 60.0, "enabled": False},
                EVIL: {"task": EVIL, "schedule": 3600.0, "kwargs": {"x": EVIL}},
            },
        )
        for name in ("report", "tick"):
            self.app.task(name=name)(lambda *args: None)
        self.client = Client(console(self.app, access=Access(**access)))
        self.app.history.index.take([told("run1", name="report", periodic="nightly")])

    @property
    def rows(self) -> dict[str, Any]:
        return {row["name"]: row for row in self.client.get("/api/schedules").json()["entries"]}


@pytest.fixture
def planned(tmp_path: Path) -> Iterator[Planned]:
    made = Planned(tmp_path)
    yield made
    made.app.close()


def test_it_shows_last_runs_and_the_next_24_hours(planned: Planned) -> None:
    shown = planned.client.get("/api/schedules").json()

    ahead = [one["name"] for one in shown["ahead"]]
    assert (ahead.count("nightly"), ahead.count("often"), ahead.count("off"), ahead.count(EVIL)) == (1, 24, 0, 24)
    assert shown["ahead"][-1]["due_at"] >= shown["ahead"][0]["due_at"]
    nightly = planned.rows["nightly"]
    assert [(run["id"], run["state"]) for run in nightly["runs"]] == [("run1", "RECEIVED")]
    assert (nightly["call"], nightly["paused"]) == ("report('pdf')", None)
    assert nightly["next_due_at"]
    assert planned.rows["off"]["next_due_at"] is None
    page = planned.client.get("/schedules").text
    assert ("disabled" in page, "Run now" in page) == (True, True)
    assert "run1" in planned.client.get("/tasks?periodic=nightly").text
    assert "run of" in planned.client.get("/tasks/run1").text


def test_hostile_names_are_shown_as_text(planned: Planned) -> None:
    page = planned.client.get("/schedules").text

    assert (EVIL in page, "&lt;script&gt;" in page) == (False, True)


def test_an_entry_is_paused_resumed_and_run_and_that_is_written_down(planned: Planned) -> None:
    def do(action: str, **fields: str) -> Any:
        return planned.client.post(f"/do/{action}", data={**fields, "back": "/schedules"}, headers={"Origin": LOCAL})

    assert do("schedule-pause", name="often").headers["location"].startswith("/schedules?notice=often+is+paused")
    row = planned.rows["often"]
    assert (row["paused"]["by"], row["next_due_at"]) == ("local", None)
    assert "paused</span>" in planned.client.get("/schedules").text
    do("schedule-resume", name="often")
    assert planned.rows["often"]["paused"] is None
    do("schedule-run", name="nightly")
    with planned.app.broker.admin() as admin:
        (delivery,) = admin.browse("work", 10)
    assert delivery.properties.headers["periodic_task_name"] == "nightly"

    assert do("schedule-run", name="nobody").status_code == 400
    assert do("schedule-pause").status_code == 400
    actions = planned.client.get("/api/audit").json()["actions"]
    assert [one["action"] for one in actions if "refused" not in one["outcome"]] == [
        "schedule-run", "schedule-resume", "schedule-pause",
    ]  # fmt: skip


def test_neither_other_sites_nor_those_who_look_change_anything(tmp_path: Path) -> None:
    planned = Planned(tmp_path, header="X-User", operators=frozenset({"ann"}))

    bob = {"X-User": "bob", "Origin": LOCAL}
    elsewhere = {"X-User": "ann", "Origin": "http://evil.example"}
    for headers in (bob, elsewhere):
        answer = planned.client.post("/do/schedule-pause", data={"name": "often"}, headers=headers)
        assert answer.status_code == 403
    assert Schedules(planned.app).pauses.read() == {}
    assert "Run now" not in planned.client.get("/schedules", headers={"X-User": "bob"}).text
    planned.app.close()


def test_a_scheduler_that_keeps_time_itself_says_so(planned: Planned) -> None:
    planned.app.conf.beat_scheduler = "tests.beat.test_own_schedulers:Rows"

    answer = planned.client.get("/schedules")
    assert (answer.status_code, "keeps its entries and their times to itself" in answer.text) == (200, True)
