"""Alerts: each fires once and is resolved once, whatever restarts; what comes to a real HTTP server and a real SMTP server."""

from __future__ import annotations

import email
import json
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from amqtask import AmqTask
from amqtask.beat.operating import Schedules
from amqtask.console import notices
from amqtask.console.access import Access
from amqtask.console.alerts import (
    CALM_SECONDS,
    FactFinder,
    Facts,
    QueueFacts,
    Watch,
    problems,
    rules,
    unknown,
)
from amqtask.console.web import console
from amqtask.exceptions import ConfigurationError
from tests.console.test_console import EVIL, LOCAL, Client

QUIET = Facts(queues=(), failures_per_minute=0.0, late={})
DEAD = Facts(queues=(QueueFacts("mail", 0, 1, False, "mail.dead", 3),), failures_per_minute=0.0, late={})


class Hook:
    """A webhook: what came, and what it answers."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.status = 200
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if hook.status == 200:
                    hook.bodies.append(json.loads(body))
                self.send_response(hook.status)
                self.send_header("Location", "http://localhost:1/")
                self.end_headers()

            do_GET = do_POST

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook/s3cret"


class MailServer(socketserver.ThreadingTCPServer):
    """Takes mail over SMTP (RFC 5321), as far as smtplib speaks it without options."""

    daemon_threads = True

    def __init__(self) -> None:
        self.mails: list[Message] = []
        super().__init__(("127.0.0.1", 0), _Session)


class _Session(socketserver.StreamRequestHandler):
    server: MailServer

    def handle(self) -> None:
        self.wfile.write(b"220 here\r\n")
        while line := self.rfile.readline():
            word = line.split(b" ")[0].strip().upper()
            if word == b"DATA":
                self.wfile.write(b"354 go on\r\n")
                lines = list(iter(self.rfile.readline, b".\r\n"))
                self.server.mails.append(email.message_from_bytes(b"".join(lines)))
            self.wfile.write(b"221 bye\r\n" if word == b"QUIT" else b"250 ok\r\n")
            if word == b"QUIT":
                return


@contextmanager
def served(server: socketserver.BaseServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def hook() -> Iterator[Hook]:
    made = Hook()
    with served(made.server):
        yield made


class Watched:
    """An application that is watched; the test tells the facts and the time."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.app = AmqTask("shop", broker="memory://", set_as_current=False)
        self.app.conf.update(history_url=f"sqlite:///{folder}/index.sqlite3", **settings)
        self.facts = QUIET
        self.now = 1_000_000.0
        self.restart()

    def restart(self) -> None:
        """Another console, with nothing in memory."""
        self.app.history.close()
        self.watch = Watch(self.app, find=lambda firing, now: self.facts, clock=lambda: self.now)

    def after(self, seconds: float, facts: Facts) -> None:
        self.now += seconds
        self.facts = facts
        self.watch.turn()


@pytest.fixture
def watched(tmp_path: Path, hook: Hook) -> Iterator[Watched]:
    made = Watched(tmp_path, console_alert_to=[hook.url], console_url="https://console.example/ops/")
    yield made
    made.app.close()


def test_an_alert_is_told_once_and_resolved_once_whatever_restarts(watched: Watched, hook: Hook) -> None:
    watched.after(0, QUIET)
    for _ in range(3):
        watched.after(15, DEAD)
        watched.restart()
    assert [(body["state"], body["rule"], body["subject"]) for body in hook.bodies] == [
        ("firing", "dead-letters", "mail.dead")
    ]
    assert hook.bodies[0] | {"since": "", "id": 0} == {
        "app": "shop", "state": "firing", "rule": "dead-letters", "subject": "mail.dead",
        "text": "3 dead letters in mail.dead", "since": "", "until": None,
        "url": "https://console.example/ops/alerts", "id": 0,
    }  # fmt: skip

    watched.after(15, QUIET)
    watched.after(CALM_SECONDS - 1, QUIET)
    assert len(hook.bodies) == 1  # it may come back at once
    watched.after(1, QUIET)
    watched.restart()
    watched.after(15, QUIET)
    assert [body["state"] for body in hook.bodies] == ["firing", "resolved"]
    assert hook.bodies[1]["until"] > hook.bodies[1]["since"]

    watched.after(15, DEAD)
    assert [body["state"] for body in hook.bodies] == ["firing", "resolved", "firing"]


def test_two_consoles_tell_once(watched: Watched, hook: Hook) -> None:
    other = Watch(watched.app, find=lambda firing, now: DEAD, clock=lambda: watched.now)
    watched.after(0, DEAD)
    other.turn()

    assert len(hook.bodies) == 1


def test_a_destination_that_is_away_is_told_later_in_order(watched: Watched, hook: Hook) -> None:
    hook.status = 503
    watched.after(0, DEAD)
    hook.status = 302  # not followed
    watched.after(15, QUIET)
    watched.after(CALM_SECONDS, QUIET)
    page = Client(console(watched.app)).get("/alerts").text
    assert ("HTTP status 302" in page, "s3cret" in page, "webhook 127.0.0.1" in page) == (True, False, True)

    hook.status = 200
    watched.restart()
    watched.after(60, QUIET)
    assert [body["state"] for body in hook.bodies] == ["firing", "resolved"]
    watched.after(600, QUIET)
    assert len(hook.bodies) == 2


class _Mute(socketserver.BaseRequestHandler):
    """Takes connections, and says nothing until the other end is tired of it."""

    asked = 0

    def handle(self) -> None:
        type(self).asked += 1
        while self.request.recv(1000):
            pass


@pytest.mark.parametrize("kind", ["webhook", "mail"])
def test_a_destination_that_hangs_is_asked_once_at_a_look(
    kind: str, tmp_path: Path, hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notices, "ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(_Mute, "asked", 0)
    dead = tuple(QueueFacts(f"q{number}", 0, 1, False, f"q{number}.dead", 1) for number in range(8))
    facts = Facts(queues=dead, failures_per_minute=0.0, late={})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Mute) as server, served(server):
        host, port = server.server_address[:2]
        hangs = f"http://127.0.0.1:{port}/" if kind == "webhook" else "mailto:ops@example.org"
        mail = {"host": host, "port": port, "from": "amqtask@example.org"}
        watched = Watched(tmp_path, console_alert_to=[hangs, hook.url], console_mail=mail)
        watched.after(0, facts)

        assert len(hook.bodies) == 8
        assert _Mute.asked == 1
        watched.after(3600, facts)
        assert (len(hook.bodies), _Mute.asked) == (8, 2)
        watched.app.close()


def test_a_watch_that_is_stopped_tells_nobody_else(watched: Watched, hook: Hook) -> None:
    watched.watch.stop()
    watched.after(0, DEAD)
    assert hook.bodies == []

    watched.restart()
    watched.after(15, DEAD)
    assert len(hook.bodies) == 1


def test_a_problem_must_last_as_long_as_its_rule_says(watched: Watched, hook: Hook) -> None:
    lonely = Facts(queues=(QueueFacts("mail", 5, 0, False),), failures_per_minute=0.0, late={})
    watched.after(0, lonely)
    watched.after(119, lonely)
    watched.after(1, QUIET)
    watched.after(15, lonely)
    watched.after(119, lonely)
    assert hook.bodies == []
    watched.after(1, lonely)
    assert [body["text"] for body in hook.bodies] == ["mail: 5 messages, and no worker consumes it"]


def test_what_cannot_be_known_resolves_nothing(watched: Watched, hook: Hook) -> None:
    watched.after(0, DEAD)
    away = Facts(queues=None, failures_per_minute=0.0, late=None, broker_silent=61.0)
    watched.after(15, away)
    watched.after(300, away)

    assert [body["rule"] for body in hook.bodies] == ["dead-letters", "broker-away"]
    assert unknown(away) == {"queue-wait", "dead-letters", "no-worker", "beat-late"}


def test_an_unexpected_error_is_told_once_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amqtask.console.alerts.LOOK_SECONDS", 0.0)
    app = AmqTask("shop", broker="memory://", set_as_current=False)
    app.conf.update(history_url=f"sqlite:///{tmp_path}/index.sqlite3")
    goes_wrong = iter("aaabb")

    def find(firing: object, now: float) -> Facts:
        if (text := next(goes_wrong, None)) is None:
            watch.stop()
            return QUIET
        raise LookupError(text)

    watch = Watch(app, find=find)
    watch.run()
    app.close()

    told = [record for record in caplog.records if "trying again" in record.getMessage()]
    assert [record.getMessage().split(" (")[0] for record in told] == [
        "alerts: LookupError: a",
        "alerts: LookupError: b",
    ]
    assert not any(record.exc_info for record in caplog.records)


def test_limits_can_be_others_for_all_or_for_some() -> None:
    known = rules({"queue-wait": {"above": 100, "of": {"mail": 10}}, "dead-letters": False, "failures": {"for": 5}})
    waiting = tuple(QueueFacts(name, 1, 1, name == "paused", waits=50.0) for name in ("mail", "video", "paused"))

    found = list(problems(known, Facts(queues=waiting, failures_per_minute=11.0)))
    assert [problem.key for problem in found] == [("queue-wait", "mail"), ("failures", "")]
    assert (known["failures"].above, known["failures"].hold, "dead-letters" in known) == (10.0, 5.0, False)


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("console_alerts", {"dead": False}, "there is no rule 'dead'"),
        ("console_alerts", {"failures": 5}, "is False, or a mapping with above, for, of"),
        ("console_alerts", {"failures": {"above": "many"}}, "is a number from 0 on, not 'many'"),
        ("console_alert_to", ["ftp://host/s3cret"], "not one that begins with ftp"),
        ("console_alert_to", ["mailto:ops@example.org"], "console_mail needs host and from"),
    ],
)
def test_what_is_wrong_in_the_settings_is_said(tmp_path: Path, setting: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says) as raised:
        Watched(tmp_path, **{setting: value})
    assert "s3cret" not in str(raised.value)


def test_slack_and_mail_get_hostile_names_as_text(tmp_path: Path, hook: Hook) -> None:
    server = MailServer()
    with served(server):
        watched = Watched(
            tmp_path,
            console_alert_to=[f"slack+{hook.url}", "mailto:ops@example.org"],
            console_mail={"host": "127.0.0.1", "port": server.server_address[1], "from": "amqtask@example.org"},
        )
        name = f"{EVIL}\r\nBcc: all@example.org\r\n<!channel>"
        watched.after(0, Facts(queues=(QueueFacts("q", 0, 1, False, name, 1),), failures_per_minute=0.0, late={}))
        watched.app.close()

    (slack,) = hook.bodies
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in slack["text"]
    assert "<!channel>" not in slack["text"]
    (mail,) = server.mails
    assert (mail["To"], mail["Bcc"], mail["From"]) == ("ops@example.org", None, "amqtask@example.org")
    assert str(mail["Subject"]).startswith("[shop] FIRING dead-letters: 1 dead letter in")
    assert "dead letter" in str(mail.get_payload())


def test_the_page_shows_what_fires_what_fired_and_who_is_told(watched: Watched, hook: Hook) -> None:
    client = Client(console(watched.app, access=Access(operators=frozenset({"local"}))))
    name = f"{EVIL}.dead"
    watched.after(0, Facts(queues=(QueueFacts("q", 0, 1, False, name, 1),), failures_per_minute=0.0, late={}))
    page = client.get("/alerts").text
    assert (EVIL in page, "1 dead letter in &lt;script&gt;" in page, "queue-wait" in page) == (False, True, True)
    assert [alert["subject"] for alert in client.get("/api/alerts").json()["firing"]] == [name]
    watched.after(1, QUIET)
    watched.after(CALM_SECONDS, QUIET)
    shown = client.get("/api/alerts").json()
    assert (shown["firing"], [alert["subject"] for alert in shown["past"]]) == ([], [name])

    before = len(hook.bodies)
    assert client.post("/do/alert-test", data={"back": "/alerts"}, headers={"Origin": LOCAL}).status_code == 303
    assert [body["state"] for body in hook.bodies[before:]] == ["test"]
    hook.status = 500
    refused = client.post("/api/do/alert-test", headers={"Origin": LOCAL})
    assert (refused.status_code, "HTTP status 500" in refused.json()["error"]) == (400, True)


def told(task_id: str, kind: str, at: float, **fields: Any) -> dict[str, Any]:
    event = {"type": f"task-{kind}", "uuid": task_id, "timestamp": at, "hostname": "w1@host", "name": "shop.send"}
    return {**event, "queue": "mail", **fields}


def test_facts_come_from_the_broker_the_history_and_the_schedule(tmp_path: Path) -> None:
    app = AmqTask("shop", broker="memory://", set_as_current=False)
    app.conf.update(
        history_url=f"sqlite:///{tmp_path}/index.sqlite3", task_history=True, task_default_queue="mail",
        beat_scheduler="memory", beat_schedule={"often": {"task": "shop.send", "schedule": 60.0}},
    )  # fmt: skip
    app.task(name="shop.send")(lambda: None)
    app.send_task("shop.send")
    now = datetime.now(timezone.utc).timestamp()
    app.history.index.take(
        [
            told("purged", "sent", now - 900),
            told("done", "sent", now - 600),
            told("done", "received", now - 590),
            told("waits", "sent", now - 500),
            told("later", "sent", now - 550, eta="2030-01-01T00:00:00+00:00"),
            *(told(f"f{number}", "failed", now - 1, exception="E()") for number in range(10)),
            told("run", "received", now - 300, periodic="often"),
        ]
    )
    finder = FactFinder(app)

    facts = finder.find({}, now)
    assert facts.queues is not None
    (queue,) = facts.queues
    assert (queue.name, queue.ready, queue.consumers, queue.dead_queue) == ("mail", 1, 0, "mail.dead")
    assert queue.waits is not None
    assert 500 <= queue.waits < 510
    assert (facts.failures_per_minute, facts.broker_silent < 5) == (2.0, True)
    assert facts.late == {"often": 0.0}  # what was due before anybody looked is not judged
    assert finder.find({}, now + 200).late == {"often": 140.0}

    app.history.index.take([told("next", "received", now + 150, periodic="often")])
    assert finder.find({}, now + 200).late == {"often": 0.0}
    firing = {("beat-late", "often"): {"began_at": now + 160}}
    late = FactFinder(app).find(firing, now + 200).late or {}
    assert late["often"] > 1000  # a console that starts anew does not take it for resolved
    Schedules(app).pause("often")
    assert finder.find(firing, now + 200).late == {}
    app.close()
