"""`inspect`, `control` and `status`: which commands there are, and what their words mean."""

from __future__ import annotations

import time
from typing import Any

import pytest

from amqtask import AmqTask, control_command, inspect_command
from amqtask.cli.main import run
from amqtask.exceptions import ConfigurationError
from amqtask.remote.commands import BUILTIN
from amqtask.testing.worker import start_worker


@pytest.fixture(autouse=True)
def no_custom_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amqtask.remote.commands._custom", {})


@pytest.fixture
def app() -> AmqTask:
    return AmqTask("remote", broker="amqp://nobody//", set_as_current=False)


@pytest.mark.parametrize(
    ("command", "words", "arguments"),
    [
        ("ping", [], {}),
        ("query_task", ["a", "b"], {"ids": ["a", "b"]}),
        ("conf", ["true"], {"with_defaults": True}),
        ("memdump", ["5"], {"samples": 5}),
        ("objgraph", ["Request", "10"], {"type": "Request", "num": 10}),
        ("registered", ["rate_limit"], {"taskinfoitems": ["rate_limit"]}),
        ("revoke", ["a", "b"], {"task_id": ["a", "b"]}),
        ("terminate", ["SIGKILL", "a"], {"signal": "SIGKILL", "task_id": ["a"]}),
        ("revoke_by_stamped_headers", ["k=v"], {"headers": ["k=v"]}),
        ("time_limit", ["t", "60", "120"], {"task_name": "t", "soft": 60.0, "hard": 120.0}),
        ("rate_limit", ["t", "10/m"], {"task_name": "t", "rate_limit": "10/m"}),
        ("autoscale", ["10", "3"], {"max": 10, "min": 3}),
        ("add_consumer", ["q", "x", "topic", "k.#"],
         {"queue": "q", "exchange": "x", "exchange_type": "topic", "routing_key": "k.#"}),
    ],
)  # fmt: skip
def test_words_become_the_arguments_of_celery_s_commands(
    command: str, words: list[str], arguments: dict[str, Any]
) -> None:
    assert BUILTIN[command].read(words) == arguments


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("ping", ["all"]),
        ("rate_limit", ["t"]),
        ("pool_grow", ["many"]),
        ("conf", ["maybe"]),
        ("autoscale", ["1", "2", "3"]),
    ],
)
def test_words_that_do_not_fit_are_refused_with_what_the_command_takes(command: str, words: list[str]) -> None:
    with pytest.raises(ConfigurationError, match=f"{command} takes: "):
        BUILTIN[command].read(words)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "pimg"], "Did you mean 'ping'?"),
        (["inspect", "shutdown"], "not recognized"),
        (["inspect"], "Missing argument"),
        (["control", "rate_limit", "t"], "rate_limit takes:"),
        (["control", "shutdown", "--signal", "KILL"], "--terminate and --signal are for"),
        (["control", "shutdown", "--reload"], "--reload is for pool_restart"),
    ],
)
def test_usage_errors_are_said_before_anybody_is_asked(
    app: AmqTask, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert run(arguments, app) == 2
    assert said in capsys.readouterr().err


def test_lists_have_the_application_s_own_commands(app: AmqTask, capsys: pytest.CaptureFixture[str]) -> None:
    @inspect_command(args=[("most", int)], signature="[most=10]")
    def slowest(state: Any, most: int = 10) -> Any:
        """The slowest tasks so far."""

    @control_command(visible=False)
    def secret(state: Any) -> Any:
        """Not for everybody."""

    assert run(["inspect", "--list"], app) == 0
    inspect = capsys.readouterr().out
    assert run(["control", "--list"], app) == 0
    control = capsys.readouterr().out

    assert "slowest [most=10]" in inspect
    assert "The slowest tasks so far." in inspect
    assert "hello" not in inspect
    assert "terminate <signal>" in control
    assert "secret" not in control


def test_a_command_that_may_take_long_waits_for_the_nodes_that_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    @inspect_command(default_timeout=40.0)
    def drawn(state: Any) -> Any:
        return {"ok": "drawn"}

    @control_command(default_timeout=40.0)
    def refused(state: Any) -> Any:
        raise ValueError("not today")

    with start_worker(AmqTask("remote", broker="memory://", set_as_current=False)) as worker:
        began = time.monotonic()
        assert run(["inspect", "drawn"], worker.app) == 0
        assert run(["control", "refused"], worker.app) == 1
        assert time.monotonic() - began < 30

    printed = capsys.readouterr().out
    assert ("drawn" in printed, "not today" in printed, "1 node online." in printed) == (True, True, True)


def test_a_node_that_is_named_twice_is_waited_for_once() -> None:
    with start_worker(AmqTask("remote", broker="memory://", set_as_current=False)) as worker:
        control = worker.app.control
        (node,) = control.inspect(timeout=40, limit=1).ping()
        began = time.monotonic()
        answers = control.inspect([node] * 2, timeout=40).ping()

    assert answers == {node: {"ok": "pong"}}
    assert time.monotonic() - began < 30
