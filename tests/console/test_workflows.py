"""The page of a workflow: what ran, what is to come and what that waits for, from the events of a worker in memory."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from amqtask import AmqTask, chain, chord, group
from amqtask.console.actions import cancel
from amqtask.console.web import console
from amqtask.console.workflow import Workflow
from amqtask.events.dispatcher import MOST_FOLLOWING, following
from amqtask.exceptions import TaskRevokedError
from amqtask.history.client import History
from amqtask.protocol.event import read_events
from amqtask.testing.worker import start_worker

EVIL = "<script>alert(1)</script>"
JSON = frozenset({"application/json"})


class Kept:
    """An application whose events are kept, and read into the index when somebody looks."""

    def __init__(self, folder: Path) -> None:
        self.app = AmqTask("flows", broker="memory://", result_backend="rpc://", set_as_current=False)
        self.app.conf.update(
            task_history=True, history_queue_type="quorum", history_url=f"sqlite:///{folder}/index.sqlite3",
            task_default_queue="work",
        )  # fmt: skip
        self.add = self.app.task(name="add")(lambda x, y: x + y)
        self.total = self.app.task(name="total")(sum)
        self.fail = self.app.task(name="fail")(self._fail)

    @staticmethod
    def _fail(*args: object) -> None:
        raise ValueError(EVIL)

    def take(self) -> None:
        """Read what was told into the index."""
        broker = self.app.memory_broker
        assert broker is not None
        events = [
            event
            for properties, body in broker.messages("amqtask.history")
            for event in read_events(body, properties.content_type, properties.content_encoding, JSON)
        ]
        self.app.history.index.take(events)

    def get(self, path: str) -> httpx.Response:
        self.take()

        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(app=console(self.app), client=("127.0.0.1", 1))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await client.get(path)

        return asyncio.run(ask())

    def lines(self, some_id: str) -> list[str]:
        """The lines of a workflow, short: depth, name or size, state, what it waits for."""
        return [shortly(line) for line in self.get(f"/api/workflows/{some_id}").json()["lines"]]


def shortly(line: dict[str, Any]) -> str:
    what: str = {
        "task": f"{line.get('task')} {line.get('state')}",
        "group": f"{'chord' if line.get('is_chord') else 'group'} of {line.get('count')} {line.get('states')}",
        "expected": f"({line.get('task')})",
        "hidden": f"+{line.get('count')}",
    }[line["kind"]]
    waits = f": {line['waits_for']}" if line.get("waits_for") else ""
    return str("  " * line["depth"]) + ("> " if line["is_next"] else "") + what + waits


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    made = Kept(tmp_path)
    yield made
    made.app.close()


def test_a_chain_shows_its_steps_before_they_are_there_and_when_they_are(kept: Kept) -> None:
    result = chain(kept.add.s(1, 1), group(kept.add.s(1), kept.add.s(2)), kept.total.s()).delay()
    first = result.parent.parent.id

    assert kept.lines(first) == [
        "add PENDING: waits for a worker in work",
        "> (chord of 2): waits for add",
        "> (total): waits for chord of 2",
    ]
    with start_worker(kept.app, pool="threads"):
        assert result.get(timeout=10) == 7
    assert kept.lines(first) == [
        "add SUCCESS",
        "> chord of 2 {'SUCCESS': 2}",
        "  add SUCCESS",
        "  add SUCCESS",
        "> total SUCCESS",
    ]
    assert kept.lines(result.id) == kept.lines(first)
    assert f'href="/workflows/{first}"' in kept.get(f"/tasks/{result.id}").text


def test_a_chord_says_what_its_body_waits_for_and_why_it_does_not_come(kept: Kept) -> None:
    result = chord([chain(kept.add.s(1, 1), kept.add.s(2)), kept.add.s(2, 2), kept.fail.s()], kept.total.s()).delay()
    member = result.parent.results[1].id

    assert kept.lines(member)[-1] == "> (total): waits for 3 of 3 members: 2 PENDING"
    with start_worker(kept.app, pool="threads"), pytest.raises(ValueError, match="script"):
        result.get(timeout=10)
    lines = kept.lines(member)
    assert lines[0] == "chord of 3 {'SUCCESS': 2, 'FAILURE': 1}"
    assert lines[1] == "  fail FAILURE"
    assert lines[-1] == "> (total): does not come as long as fail has not succeeded: FAILURE"
    assert "  > add SUCCESS" in lines  # the second step of the chain that is a member
    page = kept.get(f"/workflows/{member}").text
    assert (EVIL in page, "&lt;script&gt;" in page) == (False, True)


def test_what_is_within_a_group_is_shown_within_it(kept: Kept) -> None:
    result = group(chord([kept.add.s(number, 1) for number in range(3)], kept.total.s()), kept.add.s(4, 4)).delay()
    with start_worker(kept.app, pool="threads"):
        assert result.get(timeout=10) == [6, 8]

    assert kept.lines(result.id) == [
        "group of 2 {'SUCCESS': 2}",
        "  chord of 3 {'SUCCESS': 3}",
        "    add SUCCESS",
        "    add SUCCESS",
        "    add SUCCESS",
        "  > total SUCCESS",
        "  add SUCCESS",
    ]


def test_of_a_large_group_those_that_are_not_through_come_first(kept: Kept) -> None:
    result = group([kept.add.s(number, 1) for number in range(70)]).delay()

    lines = kept.lines(result.id)
    assert (len(lines), lines[0], lines[-1]) == (52, "group of 70 {'PENDING': 70}", "  +20")


def test_a_task_alone_is_no_workflow_and_nobody_has_none(kept: Kept) -> None:
    result = kept.add.delay(1, 1)

    assert "/workflows/" not in kept.get(f"/tasks/{result.id}").text
    assert kept.lines(result.id) == ["add PENDING: waits for a worker in work"]
    assert kept.get("/workflows/nobody").status_code == 404


def test_a_long_chain_tells_of_some_steps_and_how_many_more(kept: Kept) -> None:
    result = chain(kept.add.s(1, 1), *(kept.add.s(1) for _ in range(200))).delay()
    while result.parent is not None:
        result = result.parent

    lines = kept.lines(result.id)
    assert (len(lines), lines[-1]) == (MOST_FOLLOWING + 2, f"> +{200 - MOST_FOLLOWING}")


def told(task_id: str, **fields: Any) -> dict[str, Any]:
    event = {"type": "task-received", "uuid": task_id, "timestamp": time.time(), "hostname": "w1@host"}
    return {**event, "name": "add", "queue": "work", **fields}


def test_circles_and_nonsense_in_events_end_nowhere(kept: Kept) -> None:
    kept.app.history.index.take(
        [
            told("a", root_id="r", parent_id="b", group_id="g", follows=[{"how": "chord", "id": "b", "task": "t"}]),
            told("b", root_id="r", parent_id="a", group_id="h", joins="g", follows=[{"how": "chord", "id": "a"}]),
            told("c", root_id="r", parent_id="c", group_id="h", joins="h", follows=[{"x": 1}, "no", 5, {"id": [1]}]),
            told("d", root_id="r", group_id="g", follows="no list", group_index="0"),
        ]
    )

    lines = list(Workflow(kept.app.history.workflow("r")).lines())
    ids = [line["id"] for line in lines if line["kind"] == "task"]
    assert sorted(ids) == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b"[1,2,3]",
        b'[[],{},{"chain":5}]',
        b'[[],{},{"chain":[5,{"kwargs":3,"options":[]}],"chord":[1]}]',
    ],
)
def test_bodies_of_others_tell_nothing_that_harms(body: bytes) -> None:
    assert all(isinstance(entry, dict) for entry in following(body, "application/json", "utf-8"))
    assert following(body, "application/x-python-serialize", "binary") == []


def test_an_index_of_an_older_version_gets_the_columns_that_it_has_not(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite3"
    first = History(f"sqlite:///{path}")
    first.index.take([told("old")])
    first.close()
    with sqlite3.connect(path) as connection:
        for name in ("groups", "joins"):
            connection.execute(f"DROP INDEX amqtask_history_{name}")
        for column in ("group_id", "group_index", "joins", "follows"):
            connection.execute(f"ALTER TABLE amqtask_history DROP COLUMN {column}")
    connection.close()

    again = History(f"sqlite:///{path}")
    again.index.take([told("new", group_id="g")])
    assert [task.group_id for task in again.find()] == ["g", None]
    assert [task.id for task in again.workflow("g")] == ["new"]
    again.close()


@pytest.mark.parametrize("is_outer_first", [True, False])
def test_groups_are_nested_in_whichever_order_their_members_came(kept: Kept, is_outer_first: bool) -> None:
    outer = [told("w", group_id="outer", group_index=1)]
    inner = [told(task_id, group_id="inner") for task_id in ("x", "y")]
    body = [told("z", name="total", parent_id="y", root_id="x", joins="inner", group_id="outer", group_index=0)]
    for events in (outer, inner, body) if is_outer_first else (inner, body, outer):
        kept.app.history.index.take(events)

    lines = [shortly(line) for line in Workflow(kept.app.history.workflow("outer")).lines()]
    assert sorted(line.partition(" {")[0].partition(":")[0] for line in lines) == sorted(
        ["group of 2", "  chord of 2", "    add RECEIVED", "    add RECEIVED", "  > total RECEIVED", "  add RECEIVED"]
    )


def test_a_workflow_is_cancelled_by_the_id_of_any_of_its_tasks(kept: Kept) -> None:
    body = chord([kept.add.s(1, 1), kept.add.s(2, 2)], kept.total.s()).delay()
    other = kept.add.delay(2, 3)
    member = body.parent.results[0].id
    assert "Cancel and terminate" in kept.get(f"/workflows/{member}").text

    told = cancel(kept.app, {"id": member}, "somebody")

    assert told == f"the workflow of {member} is cancelled; 2 tasks of it known"
    with start_worker(kept.app, pool="threads"):
        for result in (*body.parent.results, body):
            with pytest.raises(TaskRevokedError, match="cancelled"):
                result.get(timeout=60, follow_parents=False)
        assert other.get(timeout=60) == 5
