"""What a stranger may send to the console, and what may be broken around it: an answer that says so, and never a crash."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from amqtask import AmqTask
from amqtask.cli.base import print_json, print_table
from amqtask.cli.tasks import _print, _row, document
from amqtask.console import pages
from amqtask.console.actions import ACTIONS
from amqtask.console.openapi import FIELDS, PAGES, api_path
from amqtask.console.web import console
from amqtask.protocol.message import Message, Properties
from amqtask.remote.commands import inspect_command
from amqtask.testing.worker import start_worker
from amqtask.topology.delays import TO_HEADER, UNTIL_HEADER
from tests.conftest import full_disk
from tests.console.test_console import EVIL, LOCAL, Client, Shown

LONG = "x" * 1_000_000
TEXTS = [
    LONG[:5_000], EVIL, "\0", "'\"\\%_*", "-1", "9" * 400, "1e400", "9999-12-31T23:59:59+00:00", "0001-01-01T00:00:00",
    "\u202e\N{FULLWIDTH DIGIT ONE}", "[" * 5_000, "=", "../../etc/passwd", "NEAR(", "a " * 3_000,
]  # fmt: skip
PLACES = {"{task_id}": "bad", "{some_id}": "bad", "{action}": "rerun"}


@pytest.fixture
def shown(tmp_path: Path) -> Iterator[Shown]:
    made = Shown(tmp_path)
    yield made
    made.app.close()


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_no_search_breaks_a_page(shown: Shown, text: str) -> None:
    for path, (_, names, _) in PAGES.items():
        for place, value in PLACES.items():
            path = path.replace(place, value)
        # A page that asks workers waits for their answers: it is asked once.
        queries = (
            [dict.fromkeys(names, text)] if "delayed" in path else [{"task": "shop.send", name: text} for name in names]
        )
        for query in queries:
            answer = shown.client.get(api_path(path), params=query)
            assert answer.status_code in (200, 400), (path, query.keys(), answer.text[:500])
    assert EVIL not in shown.client.get("/tasks", params={"text": text, "notice": text}).text


ODD: list[Any] = [
    LONG[:20_000], EVIL, "\0", "\ud800", "", [], {}, [["x"], {"a": [1]}], {"\ud800": {"b": "\ud800"}}, -1, 0, 10**300,
    1e308, float("nan"), float("-inf"), True, None, "[" * 5_000, "9999-12-31T23:59:59-23:59",
    [{"how": "chord", "task": EVIL, "size": -1}],
    [{"how": "chain", "task": "\ud800", "id": "\ud800", "members": 10**300, "more": -1}],
]  # fmt: skip
EVENT_FIELDS = (
    "name", "queue", "args", "kwargs", "root_id", "parent_id", "rerun_of", "group_id", "group_index", "joins", "periodic",
    "follows", "eta", "expires", "retries", "stamps", "message", "hostname", "result", "exception", "traceback", "runtime",
    "requeue", "freq", "sw_ident", "sw_ver", "processed", "active", "clock", "pid", "utcoffset",
)  # fmt: skip


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_no_event_breaks_a_page_or_a_command(
    shown: Shown, odd: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    index, now = shown.app.history.index, time.time()
    kinds = (
        "sent",
        "received",
        "started",
        "retried",
        "rejected",
        "revoked",
        "failed",
        "succeeded",
        "\ud800\0" + LONG[:300],
    )
    for at, kind in enumerate(kinds):
        told = {"hostname": "w1@host", **dict.fromkeys(EVENT_FIELDS, odd), "timestamp": now + at}
        index.take(
            [
                {**told, "type": f"task-{kind}", "uuid": "odd", "hostname": "w1@host"},
                {**told, "type": f"task-{kind}", "uuid": f"ends {kind}"},
                {**told, "type": f"task-{kind}", "uuid": odd},
                {"type": f"task-{kind}", "uuid": "late", "timestamp": odd},
                {"type": f"task-{kind}", "timestamp": now},
                {**told, "type": f"worker-{('online', 'heartbeat', 'offline')[at % 3]}"},
            ]
        )
    monkeypatch.setattr(pages, "ANSWER_SECONDS", 0.01)
    tasks = shown.app.history.find(limit=100)
    paths = ["/", "/tasks", "/failures", "/workers", "/alerts", "/schedules", "/many/rerun?task=shop.send"]
    paths += [f"/{kind}/{quote(task.id)}" for task in tasks for kind in ("tasks", "workflows") if task.id]
    for path in paths:
        for address in (path, f"/api{path if path != '/' else '/overview'}"):
            assert shown.client.get(address).status_code == 200, address
    print_json([document(task) for task in tasks])
    print_table(("",) * 9, [_row(task) for task in tasks])
    for task in tasks:
        whole = shown.app.history.get(task.id)
        assert whole is not None
        _print(whole)
    assert "\0" not in capsys.readouterr().out


def test_fields_of_any_size_and_kind_are_refused_or_done(shown: Shown) -> None:
    fields = sorted({name.rstrip("?*") for written in FIELDS.values() for name in written.split()} - {""})
    for action in sorted(ACTIONS):
        for text in (LONG, "\ud800", "\0", "[" * 100_000):
            body = json.dumps(dict.fromkeys(fields, text)).encode()
            answer = shown.client.post(f"/api/do/{action}", content=body, headers={"Content-Type": "application/json"})
            assert (answer.status_code in (400, 413), len(answer.text) < 5_000) == (True, True), (
                action,
                answer.text[:500],
            )
    for body in (b"[" * 100_000, b"\xff", b'{"id": "\\ud800"}', b"1"):
        answer = shown.client.post("/api/do/rerun", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400
    assert shown.app.history.index.actions(10) == []

    # Of those that wait for workers' answers some, with one text.
    waiting = {name for name in ACTIONS if name.startswith(("worker-", "rate-", "pause", "resume", "send-", "revoke-"))}
    asked = [(action, text) for action in sorted(set(ACTIONS) - waiting) for text in ("y" * 4_000, EVIL, "-1")]
    for action, text in [
        *asked,
        *((action, EVIL) for action in ("pause", "send-now", "worker-grow", "worker-add-queue")),
    ]:
        form = {**dict.fromkeys(fields, text), "back": text}
        answer = shown.client.post(f"/do/{action}", data=form, headers={"Origin": LOCAL})
        assert answer.status_code in (303, 400, 404, 409), (action, answer.text[:500])
        assert len(answer.headers.get("location", "")) < 5_000


def test_arguments_of_a_megabyte_are_sent_and_nested_ones_are_refused(shown: Shown) -> None:
    answer = shown.client.post("/api/do/rerun", json={"id": "bad", "args": f'["{LONG}"]', "kwargs": "{}"})
    assert answer.status_code == 200, answer.text[:500]
    refused = shown.client.post("/api/do/rerun", json={"id": "bad", "args": "[" * 100_000})
    assert (refused.status_code, "not JSON" in refused.json()["error"]) == (400, True)
    with shown.app.broker.admin() as admin:
        assert admin.count("mail") == 1


def test_a_form_that_does_not_come_is_not_waited_for(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amqtask.console.web.FORM_SECONDS", 0.05)

    async def begun() -> AsyncIterator[bytes]:
        yield b"id="
        await asyncio.Event().wait()

    assert shown.client.post("/api/do/revoke", content=begun()).status_code == 408


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "POST"])
def test_other_methods_do_nothing(shown: Shown, method: str) -> None:
    for path in ("/", "/api/tasks", "/tasks/bad", "/live", "/static/console.css"):
        assert shown.client.request(method, path).status_code == 405
    if method != "POST":
        assert shown.client.request(method, "/api/do/pause", params={"queue": "mail"}).status_code == 405
    assert shown.app.control.pauses.read() == {}


def test_two_who_run_the_same_task_again_at_once_run_it_once(shown: Shown) -> None:
    kept = {"body": "W1siYUBiIl0sIHt9LCBudWxsXQ==", "content_type": "application/json", "headers": {"id": "twice"}}
    shown.tell(time.time(), "twice", "failed", exception="KeyError('x')", message=kept)

    async def ask_twice() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=console(shown.app), client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url=LOCAL) as client:
            return await asyncio.gather(*(client.post("/api/do/rerun", json={"id": "twice"}) for _ in range(2)))

    answers = asyncio.run(ask_twice())
    assert sorted(answer.status_code for answer in answers) == [200, 409], [answer.text for answer in answers]
    assert "local has just asked" in next(answer for answer in answers if answer.status_code == 409).json()["error"]
    with shown.app.broker.admin() as admin:
        assert admin.count("mail") == 1
    # One that was refused is no reason to wait.
    assert [shown.client.post("/api/do/rerun", json={"id": "good"}).status_code for _ in range(2)] == [400, 400]


def test_on_a_full_disk_it_is_read_and_nothing_is_done_or_lost(shown: Shown, tmp_path: Path) -> None:
    index = shown.app.history.index
    before = index.position()
    event = {"type": "task-sent", "hostname": "gen1@web", "timestamp": time.time(), "args": "x" * 5_000}
    with full_disk(max(file.stat().st_size for file in tmp_path.iterdir())):
        with pytest.raises(Exception, match="cannot be written"):
            index.take([{**event, "uuid": f"t{number}"} for number in range(2_000)], before=before, now=7)
        answers = [shown.client.post("/api/do/pause", json={"queue": "mail"}) for _ in range(200)]
        assert "no such address" in shown.page("/tasks")
    assert index.position() == before
    index.take([{**event, "uuid": "after"}], before=before, now=7)
    assert [task.id for task in shown.app.history.find(state="PENDING")] == ["after"]
    assert {answer.status_code for answer in answers} <= {200, 503}


def test_an_index_that_may_only_be_read_is_read(shown: Shown, tmp_path: Path) -> None:
    app = AmqTask("shop", broker="memory://", set_as_current=False)
    app.conf.update(history_url=f"sqlite:///file:{tmp_path}/index.sqlite3?mode=ro&uri=true", task_history=True)
    client = Client(console(app))
    for path in ("/", "/tasks", "/tasks/bad", "/failures", "/audit", "/api/tasks?text=address"):
        assert client.get(path).status_code == 200, path
    refused = client.post("/api/do/pause", json={"queue": "mail"})
    assert (refused.status_code, "cannot be written" in refused.json()["error"]) == (503, True)
    assert app.control.pauses.read() == {}
    app.close()


def test_a_kept_message_that_is_none_keeps_no_other_from_running_again(shown: Shown) -> None:
    headers = {"id": "again", "task": "shop.send"}
    for number, message in enumerate(
        [
            {"body": 5, "headers": headers},
            {"body": "W10", "headers": headers},
            {"body": "W10=", "headers": headers, "priority": 10**9},
            {"body": "W10=", "content_type": "application/json", "headers": headers},
        ]
    ):
        shown.tell(time.time(), f"again{number}", "failed", exception="KeyError('x')", message=message)

    answer = shown.client.post("/api/do/rerun-all", json={"error": "KeyError"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["done"].startswith("1 task run again; 3 tasks not")


@pytest.mark.parametrize(
    "queue", ["w@h.celery.pidbox", "amqtask.cancel", "amqtask.beat.shop", "7c1fd0b6-2d3d-4e0b-a7a5-7f4b6a6a1c11"]
)
def test_a_message_that_an_event_tells_is_not_published_to_a_mailbox(shown: Shown, queue: str) -> None:
    """Who may write events would have an operator give commands to workers, or forge what they keep."""
    body = "eyJtZXRob2QiOiAic2h1dGRvd24ifQ=="
    message = {"body": body, "content_type": "application/json", "headers": {"id": "bad", "task": "shop.send"}}
    shown.tell(time.time(), "bad", "failed", queue=queue, exception="KeyError('x')", message=message)

    answer = shown.client.post("/api/do/rerun-all", json={"error": "KeyError"})

    assert answer.status_code == 200, answer.text
    assert "no queue of tasks" in answer.text


def put(shown: Shown, message: Message) -> None:
    queue = shown.app.queues["mail"]
    shown.app.publisher.publish(replace(message, declare=(*shown.app.queues.declarations(queue), *message.declare)))


def test_a_dead_letter_of_any_id_keeps_no_other_from_running_again(shown: Shown) -> None:
    for odd in ([1], {"a": 1}, 5, b"\xff"):
        put(shown, Message(b"[]", Properties(headers={"id": odd, "task": "shop.send"}), "", "mail.dead"))
    kept = {"body": "W10=", "content_type": "application/json", "headers": {"id": "again", "task": "shop.send"}}
    shown.tell(time.time(), "again", "failed", exception="KeyError('x')", message=kept)

    answer = shown.client.post("/api/do/rerun", json={"id": "again"})
    assert (answer.status_code, answer.json()) == (200, {"done": "shop.send runs again"})


@pytest.mark.parametrize(
    "odd", [{"eta": "0001-01-01T00:00:00+23:59"}, {UNTIL_HEADER: -(2**62)}, {UNTIL_HEADER: 2**62}, {TO_HEADER: 5}]
)
def test_a_delayed_message_of_any_time_hides_no_other(shown: Shown, odd: dict[str, object]) -> None:
    for task_id, fields in (("odd", odd), ("other", {})):
        message = Message(b"[]", Properties(headers={"id": task_id, "task": "shop.send"}), "", "mail")
        delayed = shown.app.delays.delayed(message, 3600.0)
        delayed.properties.headers.update(fields)
        put(shown, delayed)

    answer = shown.client.get("/api/queues/delayed", params={"task": "shop.send"})
    assert answer.status_code == 200, answer.text
    assert {task["id"] for task in answer.json()["tasks"]} == {"odd", "other"}
    released = shown.client.post("/api/do/send-now", json={"id": "other"})
    assert released.json() == {"done": "1 delayed task sent now"}


ODD_ANSWERS: list[Any] = [
    {"uptime": "long", "paused": 5, "pool": [], "total": 3, "autoscaler": "x", "prefetch_count": [1]},
    {"uptime": 10**400, "paused": {}, "pool": {"processes": 5, "implementation": ["p"]}, "total": {"a": "b"}},
]


@pytest.mark.parametrize("stats", ODD_ANSWERS, ids=range(len(ODD_ANSWERS)))
def test_whatever_a_node_answers_the_page_of_workers_is_shown(
    shown: Shown, stats: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amqtask.remote.commands._custom", {})
    inspect_command(name="stats")(lambda state: stats)
    inspect_command(name="active_queues")(lambda state: [5, {}])
    inspect_command(name="active")(lambda state, safe: [5, {"id": [1]}, {"id": "x", "time_start": 1e300, "args": 5}])

    with start_worker(shown.app, hostname="odd@host"):
        assert "odd@host" in shown.page("/workers")
