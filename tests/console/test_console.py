"""The console over an application in memory: what its pages show, who may do what, and that nothing is shown but text."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from markupsafe import escape
from starlette.applications import Starlette
from starlette.routing import Mount

from amqtask import AmqTask
from amqtask.console import pages
from amqtask.console.access import Access, fits, hashed
from amqtask.console.actions import ACTIONS
from amqtask.console.web import console
from amqtask.exceptions import QueueNotFound
from amqtask.history import search
from amqtask.protocol.message import Message, Properties
from amqtask.services.rerunning import has_expired
from amqtask.testing.worker import start_worker
from amqtask.worker.finisher import copied_properties

EVIL = "<script>alert(1)</script>"
LOCAL = "http://localhost"


class Client:
    """Asks an ASGI application, without a socket."""

    def __init__(self, served: Starlette) -> None:
        self._served = served

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(app=self._served, client=("127.0.0.1", 1))
            async with httpx.AsyncClient(transport=transport, base_url=LOCAL) as client:
                return await client.request(method, path, **options)

        return asyncio.run(ask())

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self.request("POST", path, **options)


class Shown:
    """A console with some history."""

    def __init__(self, folder: Path, **access: Any) -> None:
        self.app = AmqTask("shop", broker="memory://", set_as_current=False)
        self.app.conf.update(
            history_url=f"sqlite:///{folder}/index.sqlite3", task_history=True, task_default_queue="mail"
        )
        self.app.task(name="shop.send")(self.send)
        self.access = Access(**access)
        self.client = Client(console(self.app, access=self.access))
        now = time.time()
        self.tell(now, "good", "succeeded", result="'sent'", runtime=0.5)
        self.tell(now, "bad", "failed", exception="ValueError('no such address')", traceback="Traceback …\n\x1b[31mred")
        self.tell(now, "evil", "failed", name=EVIL, args=EVIL, exception=f"ValueError('{EVIL}')", traceback=EVIL)

    @staticmethod
    def send(address: str) -> str:
        return address

    def tell(self, now: float, task_id: str, end: str, **fields: Any) -> None:
        told = {"name": "shop.send", "args": "('a@b',)", "kwargs": "{}", "queue": "mail", **fields}
        self.app.history.index.take(
            [
                {"type": f"task-{kind}", "uuid": task_id, "timestamp": now + at, "hostname": "w1@host", **told}
                for at, kind in enumerate(("received", "started", end))
            ]
        )

    def page(self, path: str, **headers: str) -> str:
        answer = self.client.get(path, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.text

    def do(self, action: str, headers: dict[str, str] | None = None, **fields: str) -> Any:
        return self.client.post(f"/do/{action}", data=fields, headers={"Origin": LOCAL, **(headers or {})})


@pytest.fixture
def shown(tmp_path: Path) -> Iterator[Shown]:
    made = Shown(tmp_path)
    yield made
    made.app.close()


def test_each_page_shows_what_is_there(shown: Shown) -> None:
    shown.app.send_task("shop.send", ("x@y",))

    assert "ValueError" in shown.page("/")
    assert shown.page("/tasks?state=FAILURE").count("no such address") == 1
    assert "No task fits" in shown.page("/tasks?text=nowhere")
    bad = shown.page("/tasks/bad")
    assert "Traceback …" in bad
    assert "Run with other arguments" in bad
    assert "1 × shop.send: ValueError" in shown.page("/failures")
    assert "mail" in shown.page("/queues")
    assert "0 in mail.dead" in shown.page("/dead")
    assert "No worker answers" in shown.page("/workers")
    assert "Nothing yet" in shown.page("/audit")
    assert "htmx" in shown.page("/static/htmx.min.js")


@pytest.mark.parametrize("path", ["/", "/tasks", "/tasks/evil", "/failures?since=7d"])
def test_hostile_names_and_texts_are_shown_as_text(shown: Shown, path: str) -> None:
    page = shown.page(path)

    assert EVIL not in page
    assert "&lt;script&gt;" in page


def test_the_browser_is_told_to_run_no_others_scripts(shown: Shown) -> None:
    headers = shown.client.get("/").headers

    assert "default-src 'self'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert "<script>" not in shown.page("/tasks")


@pytest.mark.parametrize(
    "path", ["overview", "tasks?state=FAILURE", "tasks/bad", "failures", "queues", "dead", "workers", "audit"]
)
def test_each_page_is_there_as_json(shown: Shown, path: str) -> None:
    answer = shown.client.get(f"/api/{path}")

    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert isinstance(answer.json(), dict)
    assert "message" not in str(answer.json().get("task", {}).keys())


def test_what_is_not_there_is_said_so(shown: Shown) -> None:
    assert shown.client.get("/tasks/nobody").status_code == 404
    assert shown.client.get("/api/tasks/nobody").json() == {"error": "there is no such task in the history"}
    assert shown.do("nothing").status_code == 404
    assert shown.client.get("/tasks?after=x").status_code == 400


def test_a_queue_is_paused_and_resumed_and_that_is_written_down(shown: Shown) -> None:
    answer = shown.do("pause", queue="mail", back="/queues")
    assert (answer.status_code, answer.headers["location"].startswith("/queues?notice=mail+is+paused")) == (303, True)
    assert "paused</span>" in shown.page("/queues")
    assert shown.app.control.pauses.read()["mail"].by == "local"
    shown.do("resume", queue="mail")

    assert shown.app.control.pauses.read() == {}
    actions = shown.client.get("/api/audit").json()["actions"]
    assert [(one["who"], one["action"]) for one in actions] == [("local", "resume"), ("local", "pause")]


def test_a_task_runs_again_with_other_arguments(shown: Shown) -> None:
    answer = shown.client.post("/api/do/rerun", json={"id": "bad", "args": '["right@address"]', "kwargs": "{}"})
    assert answer.status_code == 200, answer.text
    with shown.app.broker.admin() as admin:
        (delivery,) = admin.browse("mail", 10)
    assert delivery.properties.headers["rerun_of"] == "bad"
    assert b"right@address" in delivery.body

    refused = shown.client.post("/api/do/rerun", json={"id": "bad"})
    assert (refused.status_code, "not kept" in refused.json()["error"]) == (400, True)
    assert shown.client.post("/api/do/rerun", json={"id": "bad", "args": "no json"}).status_code == 400
    assert "refused" in shown.page("/audit")


def test_all_that_a_search_has_run_again_after_a_page_that_says_how_many(shown: Shown) -> None:
    kept = {
        "body": "W1siYUBiIl0sIHt9LCBudWxsXQ==",
        "content_type": "application/json",
        "headers": {"id": "", "task": "shop.send"},
    }
    for task_id in ("a", "b", "c"):
        message = {**kept, "headers": {**kept["headers"], "id": task_id}}  # type: ignore[dict-item]
        shown.tell(time.time(), task_id, "failed", exception="KeyError('x')", message=message)

    asked = shown.client.get("/api/many/rerun?state=FAILURE&error=KeyError&terminate=yes").json()
    assert (asked["number"], asked["of"], asked["left_alone"]) == (3, {"FAILURE": 3}, 0)
    assert set(asked["fields"]) == {"state", "error", "after"}
    assert "Run again: 3" in shown.page("/many/rerun?error=KeyError")
    assert shown.client.get("/many/purge?error=KeyError").status_code == 404
    shown.tell(time.time() + 5, "late", "failed", exception="KeyError('x')", message=kept)

    answer = shown.client.post("/api/do/rerun-all", json={**asked["fields"], "number": "3", "rate": "0.01"})
    assert answer.json() == {"done": "3 tasks run again"}
    # The oldest now, the others wait in the broker for their turn.
    with shown.app.broker.admin() as admin:
        assert [delivery.properties.headers["id"] for delivery in admin.browse("mail", 10)] == ["a"]
        places = [name for _, name in shown.app.delays.queue_names(())]
        assert sum(_count(admin, name) for name in places) == 2


def test_of_very_many_the_newest_are_counted_and_all_are_meant(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "MOST_COUNTED", 2)
    for number in range(4):
        shown.tell(time.time() + number, f"k{number}", "failed", exception="KeyError('x')")

    asked = shown.client.get("/api/many/rerun?error=KeyError").json()
    assert (asked["number"], asked["more"], asked["of"]) == (3, True, {"FAILURE": 3})
    page = shown.page("/many/rerun?error=KeyError")
    assert ("more than 2 tasks" in page, "Run again: all" in page, 'name="number"' in page) == (True, True, False)
    assert shown.client.get("/api/many/rerun?error=ValueError").json()["more"] is False
    # None of those that were counted are meant; whether an older one is, nobody has looked.
    assert "Revoke: all" in shown.page("/many/revoke?error=KeyError")


def test_of_those_that_take_long_to_find_the_page_says_how_far_it_looked(
    shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(40):
        shown.tell(time.time() - 3600 + 60 * number, f"k{number}", "failed", exception="KeyError('price')")
    monkeypatch.setattr(search, "_FIRST", 5)
    monkeypatch.setattr(search, "LOOK_SECONDS", 0.0)

    asked = shown.client.get("/api/many/rerun?error=KeyError&text=price").json()
    assert (asked["more"], asked["looked_to"] is not None, 0 < asked["number"] < 40) == (True, True, True)
    page = shown.page("/many/rerun?error=KeyError&text=price")
    assert (f"at least {asked['number']} tasks" in page, 'name="number"' in page) == (True, False)


def _count(admin: Any, name: str) -> int:
    try:
        return int(admin.count(name))
    except QueueNotFound:
        return 0


@pytest.mark.parametrize("fields", [{}, {"state": "FAILURE", "rate": "0"}, {"state": "FAILURE", "rate": "nan"}])
def test_not_all_tasks_there_are_run_again_nor_at_no_rate(shown: Shown, fields: dict[str, str]) -> None:
    assert shown.client.post("/api/do/rerun-all", json=fields).status_code == 400


def test_what_has_not_ended_is_revoked(shown: Shown) -> None:
    shown.app.history.index.take(
        [
            {
                "type": "task-received",
                "uuid": "runs",
                "timestamp": time.time(),
                "hostname": "w1@host",
                "name": "shop.send",
            }
        ]
    )
    asked = shown.client.get("/api/many/revoke?task=shop.send").json()
    assert (asked["number"], asked["left_alone"]) == (1, 2)

    answer = shown.client.post("/api/do/revoke-all", json=asked["fields"])
    assert answer.json() == {"done": "1 task revoked"}


def test_failures_that_were_seen_are_told_apart(shown: Shown) -> None:
    group = next(one for one in shown.client.get("/api/failures").json()["groups"] if one["name"] == "shop.send")
    fields = {"task": group["name"], "error": group["error"], "last": group["last"]}
    assert shown.do("mark-seen", **fields).status_code == 303

    page = shown.page("/failures")
    assert "0 since local marked them as seen" in page
    assert page.index("<h2>Seen</h2>") < page.index("shop.send: ValueError")
    assert shown.do("mark-seen", **{**fields, "last": "yesterday"}).status_code == 400


def test_a_shard_is_paused_and_resumed_with_its_queue(shown: Shown) -> None:
    shown.app.conf.task_fair_shards = 2
    make: Any = shown.app.task(name="shop.fair", fair_by="tenant")
    make(lambda tenant: tenant)
    shown.app.control.pauses.pause("mail", "ann")

    rows = shown.client.get("/api/queues").json()["queues"]
    assert {row["queue"]: row["paused"]["by"] for row in rows} == dict.fromkeys(
        ["mail", "mail.fair.0", "mail.fair.1"], "ann"
    )
    assert shown.do("resume", queue="mail.fair.1").status_code == 303
    assert shown.app.control.pauses.read() == {}


def test_all_dead_letters_of_a_queue_go_back_to_work(shown: Shown) -> None:
    shown.app.send_task("shop.send", ("x@y",))
    with shown.app.broker.admin() as admin:
        (delivery,) = admin.browse("mail", 1)
        headers = {**delivery.properties.headers, "x-amqtask-reason": EVIL, "expires": "2020-01-01T00:00:00Z"}
        for number in range(3):
            properties = replace(
                copied_properties(delivery.properties), headers={**headers, "id": str(number), "task": EVIL}
            )
            shown.app.publisher.publish(
                Message(
                    delivery.body, properties, "", "mail.dead", shown.app.queues.declarations(shown.app.queues["mail"])
                )
            )
    assert EVIL not in shown.page("/dead")
    answer = shown.client.post("/api/do/retry-dead", json={"queue": "mail.dead", "all": "yes", "rate": "0.001"})

    assert answer.json() == {"done": "3 messages back to work"}
    with shown.app.broker.admin() as admin:
        assert (admin.count("mail.dead"), admin.count("mail")) == (0, 2)


def test_a_dead_letter_of_a_shard_runs_again_and_is_not_left_behind(shown: Shown) -> None:
    shard = shown.app.queues["mail.fair.3"]
    headers = {"id": "fair", "task": "shop.send", "x-amqtask-queue": shard.name}
    letter = Message(
        b"[[], {}, {}]", Properties(headers=headers), "", "mail.dead", shown.app.queues.declarations(shard)
    )
    shown.app.publisher.publish(letter)
    shown.tell(time.time(), "fair", "failed", queue=shard.name, exception="ValueError()")

    assert shown.client.post("/api/do/rerun", json={"id": "fair"}).json() == {"done": "shop.send runs again"}
    with shown.app.broker.admin() as admin:
        assert (admin.count("mail.dead"), admin.count(shard.name)) == (0, 1)


def test_a_queue_is_purged_only_when_its_name_is_typed(shown: Shown) -> None:
    shown.app.send_task("shop.send", ("x@y",))

    assert shown.do("purge", queue="mail", confirm="mial").status_code == 400
    assert shown.do("purge", queue="other", confirm="other").status_code == 400
    assert shown.do("purge", queue="mail", confirm="mail").status_code == 303
    with shown.app.broker.admin() as admin:
        assert admin.count("mail") == 0


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_page_of_another_site_changes_nothing(shown: Shown, headers: dict[str, str]) -> None:
    answer = shown.do("pause", headers, queue="mail")

    assert (answer.status_code, shown.app.control.pauses.read()) == (403, {})
    assert shown.client.get("/do/pause?queue=mail").status_code == 405


def test_without_users_it_is_for_this_machine_only(shown: Shown) -> None:
    assert shown.client.get("/", headers={"Host": "attacker.example"}).status_code == 403
    assert shown.client.get("/api/tasks", headers={"Host": "127.0.0.1:5556"}).status_code == 200


def test_users_log_in_and_some_only_look(tmp_path: Path) -> None:
    shown = Shown(tmp_path, users={"ann": hashed("sesame"), "bob": hashed("knock")}, operators=frozenset({"ann"}))
    client = shown.client
    assert client.get("/").status_code == 401
    assert client.get("/", auth=("ann", "wrong")).status_code == 401
    assert client.get("/", headers={"Authorization": "Basic %%%"}).status_code == 401
    assert client.get("/", auth=("ann", "sesame")).status_code == 200

    assert "Run with other arguments" not in client.get("/tasks/bad", auth=("bob", "knock")).text
    denied = client.post("/do/pause", data={"queue": "mail"}, auth=("bob", "knock"))
    assert (denied.status_code, shown.app.control.pauses.read()) == (403, {})
    assert client.post("/do/pause", data={"queue": "mail"}, auth=("ann", "sesame")).status_code == 303
    assert shown.app.control.pauses.read()["mail"].by == "ann"
    assert (fits("x", "no hash"), fits("x", hashed("x"))) == (False, True)
    shown.app.close()


def test_a_proxy_says_who_it_is(tmp_path: Path) -> None:
    shown = Shown(tmp_path, header="X-Forwarded-User")

    assert shown.client.get("/").status_code == 403
    assert ">ann" in shown.page("/", **{"X-Forwarded-User": "ann", "Host": "console.example"})
    shown.app.close()


def test_a_redirect_leads_to_no_other_site(shown: Shown) -> None:
    for back in ("//evil.example", "https://evil.example", "javascript:alert(1)"):
        assert shown.do("pause", queue="mail", back=back).headers["location"].startswith("/?notice=")


def test_it_can_be_mounted_in_another_application(shown: Shown) -> None:
    outer = Starlette(routes=[Mount("/ops", console(shown.app))])
    client = Client(outer)

    page = client.get("/ops/tasks").text
    assert 'href="/ops/static/console.css"' in page
    assert 'href="/ops/tasks/bad"' in page
    answer = client.post("/ops/do/pause", data={"queue": "mail", "back": "/queues"})
    assert answer.headers["location"].startswith("/ops/queues?notice=")
    assert client.get("/ops/static/console.css").status_code == 200


def test_a_form_of_any_size_is_not_read(shown: Shown) -> None:
    assert shown.do("rerun", id="bad", args="x" * 2_100_000).status_code == 413
    assert (
        shown.client.post("/api/do/rerun", content=b"[1]", headers={"Content-Type": "application/json"}).status_code
        == 400
    )


def test_delayed_tasks_are_seen_by_time_sent_now_and_revoked(shown: Shown) -> None:
    later = [shown.app.send_task("shop.send", (EVIL,), countdown=3600 * hours) for hours in (3, 1, 2)]
    shown.app.send_task(EVIL, countdown=50)

    told = shown.client.get("/api/queues/delayed?task=shop.send").json()
    assert [task["id"] for task in told["tasks"]] == [later[1].id, later[2].id, later[0].id]
    assert (told["total"], told["number"], told["is_part"]) == (4, 3, False)
    page = shown.page("/queues/delayed?task=shop.send&page=99")
    assert later[0].id in page
    assert EVIL not in shown.page("/queues/delayed")

    assert shown.client.post("/api/do/send-now", json={"id": later[1].id}).json() == {"done": "1 delayed task sent now"}
    assert shown.client.post("/api/do/revoke-delayed", json={}).status_code == 400
    answer = shown.client.post("/api/do/revoke-delayed", json={"all": "yes"})
    assert answer.json() == {"done": "3 delayed tasks revoked"}

    assert shown.client.get("/api/queues/delayed").json()["total"] == 0
    with shown.app.broker.admin() as admin:
        headers = [delivery.properties.headers for delivery in admin.browse("mail", 10)]
    assert len(headers) == 4
    assert [(one["eta"], bool(one["expires"])) for one in headers if one["id"] == later[1].id] == [(None, False)]
    # No worker runs what has expired.
    assert all(has_expired(one, time.time()) for one in headers if one["id"] != later[1].id)


def test_workers_are_told_what_to_do_and_answer(shown: Shown) -> None:
    def order(action: str, **fields: str) -> Any:
        return shown.client.post(f"/api/do/{action}", json={"worker": "w1@here", **fields}).json()

    with start_worker(shown.app, pool="threads", hostname="w1@here"):
        assert "Fewer slots" in shown.page("/workers")
        assert "pool" in order("worker-grow", n="2")["done"]
        (row,) = (row for row in shown.client.get("/api/workers").json()["workers"] if row["worker"] == "w1@here")
        assert (row["slots"], row["queues"]) == (3, ["mail"])
        assert "done" in order("worker-shrink")
        assert "add consumer letters" in order("worker-add-queue", queue="letters")["done"]
        assert "no longer consuming" in order("worker-remove-queue", queue="letters")["done"]
        assert "new rate limit" in order("rate-limit", task="shop.send", limit="10/m")["done"]
        assert shown.client.post("/api/do/rate-limit", json={"task": "shop.send"}).json() == {
            "done": "w1@here: rate limit disabled successfully"
        }
        assert order("worker-drain")["done"] == "w1@here takes no more tasks; it consumed mail"
        assert "worker_pool_restarts" in order("worker-restart")["error"]
        assert "unknown task" in order("rate-limit", task=EVIL)["error"]
        assert "from 1 to" in order("worker-grow", n="-1")["error"]
        assert "does not answer" in order("worker-shutdown", worker="nobody")["error"]
        assert "is missing" in shown.client.post("/api/do/worker-drain", json={}).json()["error"]
        assert "ends after" in order("worker-shutdown")["done"]


@pytest.mark.parametrize("action", sorted(ACTIONS))
@pytest.mark.parametrize("place", ["/do/", "/api/do/"])
def test_who_may_only_look_changes_nothing_and_no_other_site_does(tmp_path: Path, action: str, place: str) -> None:
    shown = Shown(tmp_path, header="X-Forwarded-User", operators=frozenset({"ann"}))
    shown.app.send_task("shop.send", ("x@y",))
    every = {
        "id": "bad", "queue": "mail", "confirm": "mail", "all": "yes", "task": "shop.send", "error": "ValueError",
        "state": "FAILURE", "name": "nightly", "worker": "w1@host", "last": "2026-11-30T12:00:00+00:00",
    }  # fmt: skip
    for headers in (
        {"X-Forwarded-User": "bob"},
        {"X-Forwarded-User": "ann", "Origin": "https://evil.example"},
        {"X-Forwarded-User": "ann", "Sec-Fetch-Site": "cross-site"},
        {},
    ):
        assert shown.client.post(f"{place}{action}", data=every, headers=headers).status_code == 403
        assert shown.client.get(f"{place}{action}", headers=headers).status_code in (403, 405)

    assert shown.app.history.index.actions(10) == []
    assert shown.app.control.pauses.read() == {}
    assert {group.unseen for group in shown.app.history.failures()} == {1}
    with shown.app.broker.admin() as admin:
        assert admin.count("mail") == 1
    shown.app.close()


def test_who_may_only_look_is_offered_nothing_to_do(tmp_path: Path) -> None:
    shown = Shown(tmp_path, header="X-Forwarded-User", operators=frozenset({"ann"}))
    shown.app.send_task("shop.send", ("x@y",), countdown=600)
    pages = ("/tasks/bad", "/failures", "/dead", "/queues", "/queues/delayed", "/workers", "/many/rerun?state=FAILURE")
    for path in pages:
        assert 'method="post"' not in shown.page(path, **{"X-Forwarded-User": "bob"}), path
    shown.app.close()


def test_hostile_names_of_workers_queues_and_searches_are_shown_as_text(shown: Shown) -> None:
    told = {"type": "worker-heartbeat", "hostname": EVIL, "timestamp": time.time() - 900, "freq": 2.0, "sw_ident": EVIL}
    shown.app.history.index.take([told])
    shown.do("mark-seen", task=EVIL, error="ValueError", last="2100-01-01T00:00:00+00:00", back="/failures")
    shown.do("pause", queue=EVIL)
    query = f"text={EVIL}&task={EVIL}&state={EVIL}&stamp=a={EVIL}&notice={EVIL}"
    for path in (
        "/",
        "/workers",
        "/audit",
        "/failures",
        "/queues",
        "/queues/delayed",
        "/tasks",
        "/many/rerun",
        "/many/revoke",
    ):
        page = shown.page(f"{path}?{query}" if path != "/failures" else "/failures?since=7d")
        assert EVIL not in page, path
        assert "&lt;script&gt;" in page, path


def test_a_worker_that_was_heard_of_and_does_not_answer_is_shown(shown: Shown) -> None:
    now, beat = time.time(), {"type": "worker-heartbeat", "freq": 2.0}
    shown.app.conf.update(task_history=True)
    shown.app.history.index.take(
        [
            {**beat, "hostname": "busy@host", "timestamp": now},
            {**beat, "hostname": "gone@host", "timestamp": now - 60},
            {**beat, "hostname": "left@host", "timestamp": now, "type": "worker-offline"},
        ]
    )

    states = {row["worker"]: row["state"] for row in shown.client.get("/api/workers").json()["workers"]}
    assert states == {"busy@host": "silent", "gone@host": "gone"}
    assert "It does not answer" in shown.page("/workers")


@pytest.mark.parametrize("host", ["[", "[::1", "localhost[", "evil.example", ":80"])
def test_a_host_that_is_none_of_this_machine_s_gets_nothing(shown: Shown, host: str) -> None:
    assert shown.client.get("/", headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("odd", [f"since={EVIL}", "since=yesterday", "until=9", "since=99999999999d", "stamp=tenant"])
def test_a_condition_that_cannot_be_read_stands_for_no_task_rather_than_for_all(shown: Shown, odd: str) -> None:
    shown.tell(time.time(), "one", "failed", exception="KeyError('x')")
    for path in ("/tasks", "/api/tasks", "/many/revoke", "/api/many/rerun"):
        answer = shown.client.get(f"{path}?{odd}")
        assert answer.status_code == 400, path
        assert EVIL not in answer.text or path.startswith("/api/")

    name, _, value = odd.partition("=")
    answer = shown.client.post("/api/do/revoke-all", data={name: value}, headers={"Origin": LOCAL})
    assert answer.status_code == 400
    assert "no time" in answer.text or "name=value" in answer.text


@pytest.mark.parametrize("since", ["1h", "90m", "2026-01-01", ""])
def test_how_long_ago_is_written_as_on_the_command_line(shown: Shown, since: str) -> None:
    shown.tell(time.time() - 60, "one", "failed", exception="KeyError('x')")

    assert "one" in {task["id"] for task in shown.client.get(f"/api/tasks?since={since}").json()["tasks"]}
    assert f">{since}</option>" in shown.page(f"/tasks?since={since}") or since in ("", "1h")


@pytest.mark.parametrize(
    ("shown_args", "offered"),
    [
        (
            "('ann@exmaple.org', 1.5, None, ['x'], {'y': (True,)})",
            '["ann@exmaple.org", 1.5, null, ["x"], {"y": [true]}]',
        ),
        ("()", "[]"),
        ("('much text...',)", ""),
        ("('much text…", ""),
        ("<hidden>", ""),
        ("(datetime.date(2026, 1, 1),)", ""),
        ("({1: 2},)", ""),
        ("(b'x', {3})", ""),
        ("(1e999,)", ""),
        ("'a text'", ""),
        ("(" * 5000, ""),
        ("(__import__('os').abort(),)", ""),
    ],
)
def test_arguments_are_offered_to_be_corrected_where_they_are_shown_whole(
    shown: Shown, shown_args: str, offered: str
) -> None:
    shown.tell(time.time(), "wrong", "failed", args=shown_args)

    assert shown.client.get("/api/tasks/wrong").json()["editable"].get("args", "") == offered
    assert f">{escape(offered)}</textarea>" in shown.page("/tasks/wrong")
