"""`amqtask relay`: publishes what waits and ends, says what waits, and makes what failed due again."""

from __future__ import annotations

import json
import logging
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

from amqtask import AmqTask
from amqtask.cli.main import run
from amqtask.testing.worker import start_worker

if TYPE_CHECKING:
    from tests.outbox.conftest import Shop
else:
    Shop = Any


def test_once_publishes_what_waits(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    with shop.sessions.begin():
        ids = [shop.ship().id for _ in range(2)]

    assert run(["relay", "--once"], shop.app) == 0
    assert capsys.readouterr().out == "2 messages published, 0 failed\n"
    assert shop.sent() == ids


def test_status_names_what_could_not_be_published(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["relay", "--status"], shop.app) == 0
    assert capsys.readouterr().out == f"amqtask_outbox of sqlite:///{shop.path}: 0 rows waiting\n"

    with shop.sessions.begin():
        result = shop.ship(exchange="", routing_key="nowhere")
        shop.ship()
    assert run(["relay", "--once"], shop.app) == 1
    with shop.sessions.begin():
        shop.ship()
    capsys.readouterr()

    assert run(["relay", "--status"], shop.app) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "2 rows waiting, the oldest since 20" in lines[0]
    assert f"ship[{result.id}], 1 attempt: Unroutable: " in lines[1]
    assert len(lines) == 2

    assert run(["relay", "--status", "--json"], shop.app) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["waiting"], told["failing"], told["rows"][0]["task_id"]) == (2, 1, result.id)

    assert run(["relay", "--retry", "--json"], shop.app) == 0
    assert json.loads(capsys.readouterr().out) == {"due": 1}


def test_a_worker_says_that_somebody_must_relay(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), start_worker(shop.app):
        assert "wait in the outbox until something relays them: `amqtask relay`" in caplog.text

    caplog.clear()
    shop.app.conf.outbox_relay = True
    with caplog.at_level(logging.INFO), start_worker(shop.app):
        assert "until something relays them" not in caplog.text


def test_it_runs_until_it_is_told_to_end(shop: Shop, loggers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with shop.sessions.begin():
        result = shop.ship()
    publish_many = shop.app.publisher.publish_many

    def publish_and_end(messages: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return publish_many(messages, **options)

    monkeypatch.setattr(shop.app.publisher, "publish_many", publish_and_end)
    log = shop.path.with_suffix(".log")

    assert run(["relay", "--interval", "60", "-f", str(log)], shop.app) == 0
    assert shop.sent() == [result.id]
    assert f"relaying amqtask_outbox of sqlite:///{shop.path}" in log.read_text()


def test_an_application_without_an_outbox_is_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    app = AmqTask("none", broker="memory://", set_as_current=False)

    assert run(["relay"], app) == 1
    assert "the application has no outbox to relay: set `outbox`" in capsys.readouterr().err
