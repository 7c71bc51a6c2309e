"""The first page: queues that grow, the oldest that waits, what fires, waits and run times."""

from __future__ import annotations

import time
from pathlib import Path

from amqtask import AmqTask
from amqtask.console.alerts import Facts, QueueFacts, Watch
from amqtask.console.web import console
from tests.console.test_alerts import told
from tests.console.test_console import EVIL, Client


def test_it_shows_what_grows_what_waits_and_what_fires(tmp_path: Path) -> None:
    app = AmqTask("shop", broker="memory://", set_as_current=False)
    app.conf.update(history_url=f"sqlite:///{tmp_path}/index.sqlite3", task_history=True)
    now = time.time()
    app.history.index.take(
        [
            told("a", "sent", now - 130, queue=EVIL),
            told("b", "sent", now - 70, queue="other"),
            told("b", "started", now - 68, queue="other"),
            told("b", "succeeded", now - 64, queue="other", runtime=4.0),
            told("later", "received", now - 70, queue="other", eta="2026-01-01T00:00:00+00:00"),
            told("later", "started", now - 10, queue="other"),
        ]
    )
    clock = now
    ready = 0
    watch = Watch(
        app,
        find=lambda firing, at: Facts(
            queues=(QueueFacts(EVIL, ready, 1, False, "mail.dead", 2), QueueFacts("empty", 0, 1, False))
        ),
        clock=lambda: clock,
    )
    for minutes_ago, number in ((14, 100), (5, 500), (0, 1700)):
        clock, ready = now - minutes_ago * 60, number
        watch.turn()

    client = Client(console(app))
    seen = client.get("/api/overview").json()
    (queue,) = seen["queues"]
    assert (queue["queue"], queue["ready"], queue["growth"]) == (EVIL, 1700, 1600)
    assert 125 < queue["waits"] < 200
    assert ([alert["rule"] for alert in seen["alerts"]], seen["runtime"], seen["waited"]) == (
        ["dead-letters"],
        4.0,
        2.0,
    )
    assert max(bar["waited"] or 0 for bar in seen["plot"]) == 2.0
    page = client.get("/").text
    assert (EVIL in page, "+1,600" in page, "Mean wait" in page, "2 dead letters in mail.dead" in page) == (
        False, True, True, True,
    )  # fmt: skip
    assert client.get("/?hours=24").status_code == 200
    app.close()
