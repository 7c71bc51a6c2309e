"""`amqtask flower`: what Flower is told, and what is said where it is not."""

from __future__ import annotations

import importlib.util
import ssl
from typing import Any

import pytest

from amqtask import AmqTask
from amqtask.cli.base import Globals
from amqtask.cli.flower import celery_settings, told_among
from amqtask.cli.main import run


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CELERY_BROKER_URL", "AMQTASK_BROKER_URL", "CELERY_RESULT_BACKEND", "AMQTASK_RESULT_BACKEND"):
        monkeypatch.delenv(name, raising=False)


def make_app(broker: str = "amqp://h//", **settings: Any) -> AmqTask:
    return AmqTask("watched", broker=broker, set_as_current=False, **settings)


@pytest.mark.skipif(importlib.util.find_spec("flower") is not None, reason="Flower is installed here")
def test_how_to_install_it_is_said_where_it_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["flower", "--port=5555"], make_app()) == 1

    assert 'pip install "flower>=2"' in capsys.readouterr().err


def test_flower_is_told_what_workers_know() -> None:
    app = make_app(
        "amqp://me:p%40ss@one/shop;amqp://me:p%40ss@two:5673//",
        backend="redis://r/0",
        control_exchange="mine",
        event_exchange="mineev",
        task_default_queue="work",
    )

    told = celery_settings(app)

    assert told["broker_url"] == "amqp://me:p%40ss@one:5672/shop;amqp://me:p%40ss@two:5673/%2F"
    assert told["result_backend"] == "redis://r/0"
    assert (told["control_exchange"], told["event_exchange"], told["task_default_queue"]) == ("mine", "mineev", "work")
    assert "broker_use_ssl" not in told


def test_flower_is_told_how_to_speak_tls() -> None:
    told = celery_settings(make_app("amqps://h//?cacertfile=/ca.pem&server_hostname=rabbit"))

    assert told["broker_url"].startswith("amqps://")
    assert told["broker_use_ssl"] == {
        "ca_certs": "/ca.pem",
        "cert_reqs": ssl.CERT_REQUIRED,
        "server_hostname": "rabbit",
    }


@pytest.mark.parametrize("words", [("--broker=amqp://b//",), ("--broker", "amqp://b//"), ("-b", "amqp://b//")])
@pytest.mark.parametrize("path", [("-A", "proj"), ("--app=proj",)])
def test_application_and_broker_may_stand_among_flowers_options(words: tuple[str, ...], path: tuple[str, ...]) -> None:
    settings = Globals()

    assert told_among(("--port=1", *words, *path, "--broker-api=http://m"), settings) == (
        "--port=1",
        "--broker-api=http://m",
    )
    assert (settings.app, settings.broker) == ("proj", "amqp://b//")


def test_what_stands_before_flower_holds() -> None:
    settings = Globals(app="proj", broker="amqp://a//")

    assert told_among(("--port=1",), settings) == ("--port=1",)
    assert (settings.app, settings.broker) == ("proj", "amqp://a//")
