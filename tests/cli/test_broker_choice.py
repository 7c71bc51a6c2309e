"""Which broker and result backend count: producer and worker must never disagree."""

from __future__ import annotations

import pytest

from amqtask import AmqTask
from amqtask.cli.main import run

VARIABLES = ("CELERY_BROKER_URL", "AMQTASK_BROKER_URL", "CELERY_RESULT_BACKEND", "AMQTASK_RESULT_BACKEND")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def make_app(broker: str | None = None, backend: str | None = None) -> AmqTask:
    return AmqTask("choice", broker=broker, backend=backend, set_as_current=False)


def hosts(app: AmqTask) -> list[str]:
    return [address.host for address in app.broker_addresses]


def test_the_application_s_broker_counts_and_ours_in_the_environment_is_a_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AMQTASK_BROKER_URL", "amqp://environment//")
    app = make_app(broker="amqp://application//")

    assert hosts(app) == ["application"]
    assert hosts(make_app()) == ["environment"]
    assert run(["report"], app) == 0
    assert "application" in capsys.readouterr().out


def test_celery_s_variable_wins_over_the_application_as_with_celery(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELERY_BROKER_URL", "amqp://environment//")
    monkeypatch.setenv("CELERY_RESULT_BACKEND", "cache+memory://")
    app = make_app(broker="amqp://application//", backend="rpc://")

    assert hosts(app) == ["environment"]
    assert app.backend_url == "cache+memory://"


def test_the_command_line_wins_over_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CELERY_BROKER_URL", "AMQTASK_BROKER_URL"):
        monkeypatch.setenv(name, "amqp://environment//")
    monkeypatch.setenv("CELERY_RESULT_BACKEND", "rpc://")
    app = make_app(broker="amqp://application//")

    assert run(["-b", "amqp://told//", "--result-backend", "cache+memory://", "report"], app) == 0

    assert hosts(app) == ["told"]
    assert app.backend_url == "cache+memory://"
