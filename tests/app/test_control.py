"""`app.control`: the messages that leave, under Celery's names and in its form."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from amqtask.exceptions import ConfigurationError
from amqtask.protocol.message import Message
from amqtask.remote.control import Control
from amqtask.transport.broker import open_broker
from amqtask.transport.contract import BrokerOptions


class Publisher:
    """Keeps what was published."""

    def __init__(self) -> None:
        self.sent: list[Message] = []

    def publish(self, message: Message, *, timeout: float | None = None) -> None:
        self.sent.append(message)

    def publish_many(self, messages: Any, *, timeout: float | None = None) -> Any:
        raise NotImplementedError

    declare = publish_many

    def close(self) -> None: ...


@pytest.fixture
def publisher() -> Publisher:
    return Publisher()


@pytest.fixture
def control(publisher: Publisher) -> Control:
    broker = open_broker(BrokerOptions("amqp://nobody//"), {})
    return Control(broker, publisher, prefix="celery", accept=frozenset({"application/json"}))


@pytest.mark.parametrize(
    ("order", "method", "arguments"),
    [
        (lambda c: c.revoke("a"), "revoke", {"task_id": "a", "terminate": False, "signal": "SIGTERM"}),
        (lambda c: c.revoke(["a", "b"], terminate=True, signal="SIGKILL"),
         "revoke", {"task_id": ["a", "b"], "terminate": True, "signal": "SIGKILL"}),
        (lambda c: c.terminate("a"), "revoke", {"task_id": "a", "terminate": True, "signal": "SIGTERM"}),
        (lambda c: c.revoke_by_stamped_headers({"k": ["v"]}),
         "revoke_by_stamped_headers", {"headers": {"k": ["v"]}, "terminate": False, "signal": "SIGTERM"}),
        (lambda c: c.rate_limit("t", "1/s"), "rate_limit", {"task_name": "t", "rate_limit": "1/s"}),
        (lambda c: c.time_limit("t", soft=1, hard=2), "time_limit", {"task_name": "t", "soft": 1, "hard": 2}),
        (lambda c: c.add_consumer("q", options={"durable": True}), "add_consumer",
         {"queue": "q", "exchange": None, "exchange_type": "direct", "routing_key": None, "durable": True}),
        (lambda c: c.cancel_consumer("q"), "cancel_consumer", {"queue": "q"}),
        (lambda c: c.autoscale(3, 1), "autoscale", {"max": 3, "min": 1}),
        (lambda c: c.pool_grow(2), "pool_grow", {"n": 2}),
        (lambda c: c.pool_shrink(), "pool_shrink", {"n": 1}),
        (lambda c: c.pool_restart(), "pool_restart", {"modules": None, "reload": False, "reloader": None}),
        (lambda c: c.election("1", "task", {"task": "t"}), "election",
         {"id": "1", "topic": "task", "action": {"task": "t"}}),
        (lambda c: c.shutdown(), "shutdown", {}),
        (lambda c: c.broadcast("mine", {"a": 1}, b=2), "mine", {"a": 1, "b": 2}),
    ],
)  # fmt: skip
def test_orders_leave_with_celery_s_arguments(
    control: Control,
    publisher: Publisher,
    order: Callable[[Control], object],
    method: str,
    arguments: dict[str, Any],
) -> None:
    order(control)

    (message,) = publisher.sent
    body = json.loads(message.body)
    assert (body["method"], body["arguments"]) == (method, arguments)
    assert (body["destination"], body["pattern"], body["matcher"]) == (None, None, None)
    assert message.exchange == "celery.pidbox"
    assert set(body) == {"method", "arguments", "destination", "pattern", "matcher"}
    assert (message.properties.headers or {})["expires"] == pytest.approx(time.time() + 1.0, abs=60.0)


@pytest.mark.parametrize(
    ("whom", "sent"),
    [
        ({"destination": ["a@h", "b@h"]}, (["a@h", "b@h"], None, None)),
        ({"destination": "a@h"}, (["a@h"], None, None)),
        ({"pattern": "a@*"}, (None, "a@*", "glob")),
        ({"pattern": "a@.+", "matcher": "pcre"}, (None, "a@.+", "pcre")),
        ({"matcher": "pcre"}, (None, None, None)),
    ],
)
def test_those_who_are_meant_are_named_as_celery_names_them(
    control: Control, publisher: Publisher, whom: dict[str, Any], sent: tuple[Any, ...]
) -> None:
    control.broadcast("pool_grow", **whom)

    body = json.loads(publisher.sent[0].body)
    assert (body["destination"], body["pattern"], body["matcher"]) == sent


@pytest.mark.parametrize("whom", [{"pattern": "a", "matcher": "sql"}, {"pattern": "(", "matcher": "pcre"}])
def test_a_pattern_that_no_worker_can_read_is_refused(control: Control, whom: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        control.broadcast("shutdown", **whom)
