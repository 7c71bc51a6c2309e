"""The plan: arguments of queues, their dead-letter queues, the order, and differences in words."""

from __future__ import annotations

from typing import Any

import pytest

from amqtask.protocol.entities import Binding, Exchange, Queue, arguments
from amqtask.topology.declarations import (
    QueueDefaults,
    dead_letter_queue,
    declarations,
    describe_difference,
    too_many,
    with_defaults,
    work_queue,
)

DEFAULTS = QueueDefaults()
TOPIC = Exchange("topics", type="topic")


def test_a_queue_is_quorum_with_a_delivery_limit_and_dead_letters_by_default() -> None:
    assert work_queue("jobs", DEFAULTS).argument_map == {
        "x-queue-type": "quorum",
        "x-delivery-limit": 20,
        "x-consumer-disconnected-timeout": 500,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": "jobs.dead",
        "x-overflow": "reject-publish",
        "x-dead-letter-strategy": "at-least-once",
    }


@pytest.mark.parametrize(
    ("asked", "defaults", "expected"),
    [
        ({"x-queue-type": "classic"}, QueueDefaults(dead_letter=False), {"x-queue-type": "classic"}),
        (
            {},
            QueueDefaults(queue_type="classic", dead_letter=False, max_priority=9),
            {"x-queue-type": "classic", "x-max-priority": 9},
        ),
        ({"x-queue-type": "stream"}, DEFAULTS, {"x-queue-type": "stream"}),
        (
            {"x-dead-letter-exchange": "mine", "x-delivery-limit": None, "x-consumer-disconnected-timeout": None},
            DEFAULTS,
            {"x-queue-type": "quorum", "x-dead-letter-exchange": "mine"},
        ),
        (
            {"x-max-length": 10, "x-overflow": "drop-head"},
            QueueDefaults(delivery_limit=None),
            {
                "x-queue-type": "quorum",
                "x-consumer-disconnected-timeout": 500,
                "x-max-length": 10,
                "x-overflow": "drop-head",
                "x-dead-letter-exchange": "",
                "x-dead-letter-routing-key": "jobs.dead",
            },
        ),
    ],
)
def test_what_is_asked_for_wins_over_the_defaults(
    asked: dict[str, Any], defaults: QueueDefaults, expected: dict[str, Any]
) -> None:
    assert work_queue("jobs", defaults, queue_arguments=asked).argument_map == expected


@pytest.mark.parametrize(
    "queue",
    [
        Queue("q", exclusive=True, durable=False),
        Queue("q", auto_delete=True),
        Queue("q", broadcast=True),
        Queue("q", passive=True),
    ],
)
def test_queues_that_go_away_or_belong_to_others_are_left_as_they_are(queue: Queue) -> None:
    assert with_defaults(queue, DEFAULTS) is queue


def test_taking_the_defaults_twice_changes_nothing() -> None:
    queue = work_queue("jobs", DEFAULTS)

    assert with_defaults(queue, DEFAULTS) == queue


def test_dead_letters_survive_being_read_often() -> None:
    dead = dead_letter_queue(work_queue("jobs", DEFAULTS), DEFAULTS)

    assert dead is not None
    assert dead.name == "jobs.dead"
    assert dead.argument_map["x-queue-type"] == "quorum"
    assert dead.argument_map["x-delivery-limit"] > 1000


@pytest.mark.parametrize(
    "asked",
    [{"x-dead-letter-exchange": "mine"}, {"x-dead-letter-routing-key": "elsewhere", "x-dead-letter-exchange": ""}],
)
def test_dead_letters_that_go_elsewhere_are_not_ours_to_declare(asked: dict[str, Any]) -> None:
    assert dead_letter_queue(work_queue("jobs", DEFAULTS, queue_arguments=asked), DEFAULTS) is None


def test_a_queue_without_an_exchange_needs_its_dead_letter_queue_and_itself() -> None:
    names = [
        entity.name for entity in declarations(work_queue("jobs", DEFAULTS), DEFAULTS) if isinstance(entity, Queue)
    ]

    assert names == ["jobs.dead", "jobs"]


def test_exchanges_come_before_queues_and_bindings_last() -> None:
    more = Binding(Exchange("more", type="headers"), "jobs", arguments=arguments({"a": 1}))
    queue = work_queue("jobs", DEFAULTS, exchange=TOPIC, routing_key="a.#", bindings=(more,))

    plan = declarations(queue, DEFAULTS)

    assert [type(entity).__name__ for entity in plan] == ["Exchange"] * 2 + ["Queue"] * 2 + ["Binding"] * 2
    assert plan[-2:] == (Binding(TOPIC, "jobs", "a.#"), more)


def test_the_brokers_own_exchanges_are_bound_but_not_declared() -> None:
    queue = work_queue("jobs", DEFAULTS, exchange=Exchange("amq.topic", type="topic"), routing_key="a")

    plan = declarations(queue, DEFAULTS)

    assert not [entity for entity in plan if isinstance(entity, Exchange)]
    assert isinstance(plan[-1], Binding)


def test_nobody_but_its_consumer_declares_a_broadcast_queue() -> None:
    queue = Queue("bcast.1", exchange=Exchange("all", type="fanout"), auto_delete=True, broadcast=True)

    assert declarations(queue, DEFAULTS) == (Exchange("all", type="fanout"),)


# As RabbitMQ 3.10 and 4 say it.
@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "PRECONDITION_FAILED - inequivalent arg 'x-queue-type' for queue 'jobs' in vhost '/': received the value "
            "'quorum' of type 'longstr' but current is the value 'classic' of type 'longstr'",
            ["x-queue-type 'classic'", "where 'quorum' was asked for"],
        ),
        (
            "PRECONDITION_FAILED - inequivalent arg 'x-delivery-limit' for queue 'jobs' in vhost '/': received the "
            "value '5' of type 'signedint' but current is none",
            ["x-delivery-limit not set", "where '5' was asked for"],
        ),
        (
            "PRECONDITION_FAILED - inequivalent arg 'x-max-priority' for queue 'jobs' in vhost '/': received none but "
            "current is the value '9' of type 'signedint'",
            ["x-max-priority '9'", "where not set was asked for"],
        ),
        (
            "PRECONDITION_FAILED - inequivalent arg 'durable' for queue 'jobs' in vhost '/': received 'true' but "
            "current is 'false'",
            ["durable 'false'", "where 'true' was asked for"],
        ),
        ("PRECONDITION_FAILED - something new", ["something new"]),
    ],
)
def test_a_difference_is_told_in_one_sentence(text: str, parts: list[str]) -> None:
    said = describe_difference(Queue("jobs"), text)

    assert said.startswith("queue 'jobs' exists")
    assert "used as found" in said
    for part in parts:
        assert part in said


def test_many_quorum_queues_are_worth_a_word_and_few_or_classic_ones_are_not() -> None:
    quorum = [work_queue(f"q{number}", DEFAULTS) for number in range(300)]
    classic = [work_queue(f"q{number}", DEFAULTS._replace(queue_type="classic")) for number in range(300)]

    assert too_many(quorum).startswith("300 quorum queues")
    assert too_many(quorum[:100]) == too_many(classic) == ""
