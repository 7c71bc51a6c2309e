"""Delay levels: the path of a message, simulated over what the plan declares."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amqtask.entities import Binding, Exchange, Queue
from amqtask.message import Message, Properties
from amqtask.topology.delays import MAX_SECONDS, DelayPlan, digits, longest_wait, units

waits = st.floats(min_value=0.001, max_value=MAX_SECONDS, allow_nan=False)


def task_message(exchange: str = "", routing_key: str = "work", priority: int | None = 3) -> Message:
    properties = Properties(headers={"task": "t", "x-death": [1]}, expiration="5000", priority=priority)
    return Message(b"body", properties, exchange, routing_key, declare=(Queue("work"),))


def journey(message: Message, target: str) -> tuple[list[str], Fraction]:
    """The queues the broker would lead it through to the target exchange, and the seconds it would wait."""
    queues = {entity.name: entity for entity in message.declare if isinstance(entity, Queue)}
    bindings = [entity for entity in message.declare if isinstance(entity, Binding)]
    headers = message.properties.headers
    place, passed, waited = message.exchange, list[str](), Fraction(0)
    while place != target:
        matching = [
            binding
            for binding in bindings
            if binding.source.name == place
            and all(headers.get(key) == value for key, value in binding.arguments if key != "x-match")
        ]
        assert len(matching) == 1, f"{place} leads to {matching}"
        place = matching[0].destination
        if not matching[0].to_exchange:
            passed.append(place)
            waited += Fraction(queues[place].argument_map["x-message-ttl"], 1000)
            place = queues[place].argument_map["x-dead-letter-exchange"]
    return passed, waited


@given(waits, st.sampled_from(["", "topics"]))
def test_a_message_arrives_at_its_target_after_the_wait_and_never_before(seconds: float, target: str) -> None:
    message = DelayPlan().delayed(task_message(target), seconds)

    passed, waited = journey(message, target)

    assert Fraction(seconds) - Fraction(1, 10**6) <= waited < Fraction(seconds) + Fraction(125, 1000)
    assert len(passed) == len(set(passed)), "the broker drops what comes back to a queue"
    assert len(passed) <= 7
    assert passed[-1].endswith(".to") == (target == "")


@given(waits)
def test_everything_is_declared_before_it_is_bound_or_led_to(seconds: float) -> None:
    known = {""}
    for entity in DelayPlan().delayed(task_message(), seconds).declare:
        if isinstance(entity, Binding):
            assert {entity.source.name, entity.destination} <= known
        elif isinstance(entity, Queue):
            onwards = entity.argument_map.get("x-dead-letter-exchange", "")
            assert onwards in known
            known.add(entity.name)
        else:
            known.add(entity.name)


@given(st.integers(0, 16**6 - 1))
def test_digits_say_the_number(count: int) -> None:
    path = digits(count)

    assert sum(digit * 16**level for level, digit in path) == count
    assert [level for level, _ in path] == list(range(len(path)))[::-1]
    assert not path or path[0][1]


@pytest.mark.parametrize(
    ("seconds", "count"),
    [(-1, 0), (0, 0), (0.001, 1), (0.125, 1), (0.126, 2), (1, 8), (0.1 + 0.2, 3), (0.75, 6), (1e-9, 1)],
)
def test_a_wait_is_rounded_up_to_eighths_of_a_second(seconds: float, count: int) -> None:
    assert units(seconds) == (count if seconds != 1e-9 else 0)


@pytest.mark.parametrize("seconds", [MAX_SECONDS + 1, 1e12, math.inf])
def test_the_longest_wait_is_cut_to_what_ttls_can_say(seconds: float) -> None:
    message = DelayPlan().delayed(task_message(), seconds)

    assert journey(message, "")[1] == Fraction(MAX_SECONDS)
    ttls = [entity.argument_map["x-message-ttl"] for entity in message.declare[1:] if isinstance(entity, Queue)]
    assert max(ttls) < 2**32


@pytest.mark.parametrize("seconds", [0, -5])
def test_nothing_to_wait_for_is_the_message_itself(seconds: float) -> None:
    message = task_message()

    assert DelayPlan().delayed(message, seconds) is message


def test_what_the_target_needs_stays_declared_and_the_rest_untouched() -> None:
    before = task_message()

    after = DelayPlan().delayed(before, 10)

    assert after.declare[0] == Queue("work")
    assert (after.routing_key, after.body, after.properties.priority) == ("work", b"body", 3)
    assert before.properties.headers == {"task": "t", "x-death": [1]}


def test_a_message_does_not_leave_a_level_early_by_its_own_expiration() -> None:
    assert DelayPlan().delayed(task_message(), 10).properties.expiration is None


def test_long_waits_are_spread_over_lanes_and_short_ones_are_not() -> None:
    def queues_of(seconds: float) -> set[str]:
        ids = [f"task-{number}" for number in range(100)]
        messages = [Message(b"", Properties(correlation_id=found), "", "work") for found in ids]
        declared = [entity for message in messages for entity in DelayPlan().delayed(message, seconds).declare]
        return {entity.name for entity in declared if isinstance(entity, Queue)} - {"amqtask.delay.to"}

    assert queues_of(31.875) == {"amqtask.delay.1.f.pnone", "amqtask.delay.0.f.pnone"}
    assert queues_of(32) == {f"amqtask.delay.2.1.pnone.{lane}" for lane in range(4)}


def test_a_second_journey_carries_nothing_of_the_first() -> None:
    plan = DelayPlan()
    first = plan.delayed(task_message(), 100_000)

    second = plan.delayed(Message(b"", first.properties, "", "work"), 1)

    assert second.properties.headers == {
        "task": "t",
        "amqtask-delay-to": "",
        "amqtask-delay-priority": "3",
        "amqtask-delay-0": "8",
    }


def test_no_two_priorities_share_a_queue() -> None:
    # The head of a quorum queue is its highest priority since RabbitMQ 4, and only the head expires.
    passed = [
        queue
        for priority in (0, 3, 9, None)
        for queue in journey(DelayPlan().delayed(task_message(priority=priority), 2), "")[0][:-1]
    ]

    assert len(set(passed)) == len(passed) == 4


def test_quorum_levels_keep_a_message_until_the_next_has_it() -> None:
    for entity in DelayPlan().delayed(task_message(), 5).declare[1:]:
        if isinstance(entity, Queue):
            asked = entity.argument_map
            assert asked["x-queue-type"] == "quorum"
            assert asked["x-overflow"] == "reject-publish"
            assert asked["x-dead-letter-strategy"] == "at-least-once"
            assert entity.durable


def test_classic_levels_ask_for_nothing_that_classic_queues_refuse() -> None:
    message = DelayPlan("mine", "classic").delayed(task_message(priority=0), 1)

    level = next(entity for entity in message.declare if isinstance(entity, Queue) and entity.name == "mine.0.8")
    assert level.argument_map == {
        "x-queue-type": "classic",
        "x-message-ttl": 1000,
        "x-dead-letter-exchange": "mine.out",
    }


def test_the_same_wait_declares_the_same_things() -> None:
    plan = DelayPlan()

    assert plan.delayed(task_message(), 3).declare == plan.delayed(task_message(), 2.99).declare
    assert all(isinstance(entity, (Exchange, Queue, Binding)) for entity in plan.delayed(task_message(), 3).declare)


def test_all_queues_that_delayed_messages_of_a_priority_may_wait_in() -> None:
    plan = DelayPlan("p")

    for priority in (0, None, 7):
        names = {name for _, name in plan.queue_names([priority])}
        for seconds in (0.125, 1, 30, 40, 3600, 86400 * 20, MAX_SECONDS):
            sent = plan.delayed(task_message(priority=priority), seconds)
            declared = {
                found.name
                for found in sent.declare
                if isinstance(found, Queue) and plan.level_of(found.name) is not None
            }
            assert declared <= names
            assert declared


def test_the_level_of_a_queue() -> None:
    plan = DelayPlan("p.q")

    assert plan.level_of("p.q.3.f.p7.2") == 3
    assert plan.level_of("p.q.0.1") == 0
    assert plan.level_of("p.q.to") is None
    assert plan.level_of("images") is None


def test_a_message_without_eta_waits_for_the_rest_of_its_levels() -> None:
    headers = DelayPlan("p").delayed(task_message(), 100.0).properties.headers

    assert longest_wait(headers, 5) == 100.0
    assert longest_wait(headers, 1) == 100.0 % 32
    assert longest_wait({}, 5) == 0.0
