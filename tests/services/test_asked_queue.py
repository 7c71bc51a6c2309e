"""add_consumer: what is asked for becomes a queue, and what cannot be one is refused."""

from __future__ import annotations

from typing import Any

import pytest

from amqtask.exceptions import ConfigurationError, PublishError
from amqtask.protocol.entities import Queue
from amqtask.services.command_context import asked_queue
from amqtask.topology.declarations import QueueDefaults

DEFAULTS = QueueDefaults()


def test_a_name_alone_is_looked_up_among_the_application_s_queues() -> None:
    assert asked_queue({"queue": "q", "exchange": None, "exchange_type": "direct", "durable": None}, DEFAULTS) == "q"


def test_an_exchange_makes_it_a_queue_with_the_usual_arguments() -> None:
    made = asked_queue({"queue": "q", "exchange": "x", "exchange_type": "topic", "routing_key": "k.#"}, DEFAULTS)

    assert isinstance(made, Queue)
    assert made.exchange is not None
    assert (made.exchange.name, made.exchange.type, made.routing_key) == ("x", "topic", "k.#")
    assert made.argument_map["x-queue-type"] == "quorum"


def test_options_are_the_queue_s() -> None:
    asked = {"queue": "q", "exclusive": True, "durable": False, "queue_arguments": {"x-max-length": 5}}
    made = asked_queue(asked, DEFAULTS)

    assert isinstance(made, Queue)
    assert (made.exclusive, made.durable, made.argument_map) == (True, False, {"x-max-length": 5})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "needs the name"),
        ({"queue": 5}, "needs the name"),
        ({"queue": "q", "alias": "r"}, "knows no option alias"),
        ({"queue": "q", "exchange": "x", "exchange_type": "fan-out"}, "no exchange type 'fan-out'"),
        ({"queue": "q", "queue_arguments": ["x-max-length"]}, "as a mapping"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        asked_queue(arguments, DEFAULTS)


@pytest.mark.parametrize(
    "arguments",
    [
        {"queue": "q" * 300},
        {"queue": "q" * 252},  # its dead letters' queue has a longer name
        {"queue": "line\nend"},
        {"queue": "q", "exchange": "x" * 300},
        {"queue": "q", "exchange": "x", "routing_key": "k" * 300},
        {"queue": "q", "queue_arguments": {"x-max-length": 10**30}},
        {"queue": "q", "queue_arguments": {"n" * 300: 1}},
    ],
)
def test_what_no_broker_can_have_is_refused_before_it_is_asked(arguments: dict[str, Any]) -> None:
    with pytest.raises(PublishError, match="cannot be declared"):
        asked_queue(arguments, DEFAULTS)
