"""Delayed messages: where they wait and when they go on; the broker's own way, simulated over what is declared."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amqtask.protocol.entities import Binding, Exchange, Queue
from amqtask.protocol.message import Delivery, Message, Properties
from amqtask.topology.delays import (
    EARLY_SECONDS,
    MARGIN_SECONDS,
    MAX_SECONDS,
    SIZES,
    STEP_SECONDS,
    UNTIL_HEADER,
    DelayPlan,
    addresses,
    digits,
    due_at,
    leaves_at,
    longest_former_wait,
    second_delay,
    seconds_left,
)

waits = st.floats(min_value=0.001, max_value=MAX_SECONDS, allow_nan=False)
NOW = 1_700_000_000.0
PLAN = DelayPlan(clock=lambda: NOW)


def task_message(exchange: str = "", routing_key: str = "work", priority: int | None = 3) -> Message:
    properties = Properties(
        headers={"task": "t", "x-death": [1]}, expiration="5000", priority=priority, correlation_id="id", app_id="a"
    )
    return Message(b"body", properties, exchange, routing_key, declare=(Queue("work"),))


def delivered(message: Message, queue: str = "q") -> Delivery:
    return Delivery(message.body, message.properties, message.exchange, message.routing_key, False, queue, 1, 1)


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
def test_without_any_worker_a_message_arrives_some_seconds_late_and_never_early(seconds: float, target: str) -> None:
    message = PLAN.delayed(task_message(target), seconds)

    passed, waited = journey(message, target)

    late = waited - Fraction(seconds)
    assert late + Fraction(1, 10**6) >= MARGIN_SECONDS
    assert late <= MARGIN_SECONDS + STEP_SECONDS
    assert len(passed) == len(set(passed)), "the broker drops what comes back to a queue"
    assert passed[-1].endswith(".to") == (target == "")


@given(waits)
def test_everything_is_declared_before_it_is_bound_or_led_to(seconds: float) -> None:
    check_order(PLAN.delayed(task_message(), seconds).declare)


def test_everything_that_delays_can_need_can_be_declared_in_its_order() -> None:
    check_order((Exchange("topics"), *PLAN.everything(["topics"])))


def check_order(declare: tuple[Binding | Queue | Exchange, ...]) -> None:
    known = {""}
    for entity in declare:
        if isinstance(entity, Binding):
            assert {entity.source.name, entity.destination} <= known
        elif isinstance(entity, Queue):
            assert entity.argument_map.get("x-dead-letter-exchange", "") in known
            known.add(entity.name)
        else:
            known.add(entity.name)


@given(waits, st.integers(0, 255) | st.none())
def test_no_message_asks_for_a_queue_that_is_not_among_the_forty_three(seconds: float, priority: int | None) -> None:
    everything = PLAN.everything()

    declared = PLAN.delayed(task_message(priority=priority), seconds).declare

    assert set(declared) - {Queue("work")} <= set(everything)
    assert len([entity for entity in everything if isinstance(entity, Queue)]) == 43


@given(waits)
def test_digits_are_no_more_than_the_wait_and_less_than_a_step_below_it(seconds: float) -> None:
    path = digits(seconds)

    assert 0 <= seconds - sum(digit * SIZES[level] for level, digit in path) < STEP_SECONDS
    assert [level for level, _ in path] == list(range(len(path)))[::-1]
    assert path[0][1] or len(path) == 1


@given(st.floats(min_value=1500, max_value=MAX_SECONDS, allow_nan=False))
def test_of_a_long_wait_enough_is_left_for_the_levels_that_workers_look_after(seconds: float) -> None:
    assert sum(digit * SIZES[level] for level, digit in digits(seconds) if level < 3) > 390


@pytest.mark.parametrize("seconds", [MAX_SECONDS + 1, 1e12, math.inf])
def test_the_longest_wait_is_cut_to_what_ttls_can_say(seconds: float) -> None:
    message = PLAN.delayed(task_message(), seconds)

    assert MAX_SECONDS <= journey(message, "")[1] <= MAX_SECONDS + STEP_SECONDS + MARGIN_SECONDS
    ttls = [entity.argument_map["x-message-ttl"] for entity in message.declare[1:] if isinstance(entity, Queue)]
    assert max(ttls) < 2**32
    assert message.properties.headers[UNTIL_HEADER] < 2**63


@pytest.mark.parametrize("seconds", [0, -5, math.nan])
def test_nothing_to_wait_for_is_the_message_itself(seconds: float) -> None:
    message = task_message()

    assert PLAN.delayed(message, seconds) is message


def test_what_the_target_needs_stays_declared_and_the_rest_untouched() -> None:
    before = task_message()

    after = PLAN.delayed(before, 10)

    assert after.declare[0] == Queue("work")
    assert (after.routing_key, after.body) == ("work", b"body")
    assert before.properties.headers == {"task": "t", "x-death": [1]}


def test_a_message_does_not_leave_a_queue_early_by_its_own_expiration() -> None:
    assert PLAN.delayed(task_message(), 10).properties.expiration is None


def test_a_second_journey_carries_nothing_of_the_first() -> None:
    first = PLAN.delayed(task_message(), 100_000)

    second = PLAN.delayed(Message(b"", first.properties, "", "work"), 1)

    assert second.properties.headers == {
        "task": "t",
        "amqtask-delay-to": "",
        "amqtask-delay-until": int(NOW + 1) * 1000,
        "amqtask-delay-0": "0",
    }


def test_all_priorities_share_the_queues_and_get_their_priority_back() -> None:
    # The head of a quorum queue is its highest priority since RabbitMQ 4, and only the head expires.
    for priority in (None, 0, 3, 255):
        waiting = PLAN.delayed(task_message(priority=priority), 2)
        assert waiting.properties.priority is None
        assert PLAN.addressed(delivered(waiting)).properties.priority == priority
        assert PLAN.undelayed(waiting).properties.priority == priority


def test_what_waited_goes_to_the_default_exchange_as_it_was_published() -> None:
    message = PLAN.addressed(delivered(PLAN.delayed(task_message(), 2)))

    assert (message.exchange, message.routing_key, message.body) == ("", "work", b"body")
    assert message.properties == Properties(
        headers={"task": "t", "amqtask-delay-until": int(NOW + 2) * 1000}, priority=3, correlation_id="id", app_id="a"
    )


def test_what_waited_for_a_named_exchange_goes_by_the_way_out_which_is_bound_to_it() -> None:
    waiting = PLAN.delayed(task_message("topics", "a.b"), 2)

    message = PLAN.addressed(delivered(waiting))

    way = [entity for entity in waiting.declare if isinstance(entity, Binding) and entity.destination == "topics"]
    assert way[0].source.name == message.exchange
    assert (message.routing_key, message.properties.headers["amqtask-delay-to"]) == ("a.b", "topics")


@given(st.floats(min_value=64, max_value=1400, allow_nan=False))
def test_a_message_of_a_higher_level_leaves_it_before_the_broker_hands_it_on(seconds: float) -> None:
    waiting = PLAN.delayed(task_message(), seconds)
    (level, digit), *_ = digits(seconds)

    leaves = leaves_at(waiting.properties.headers, level)

    assert leaves is not None
    assert leaves - NOW <= digit * SIZES[level] - EARLY_SECONDS + 0.001


def test_a_message_that_waits_on_is_due_when_it_was() -> None:
    waiting = PLAN.delayed(task_message("topics", "a.b"), 100)

    on = DelayPlan(clock=lambda: NOW + 70).delayed_on(delivered(waiting), 30)

    assert due_at(on.properties.headers) == NOW + 100
    assert (on.exchange, on.routing_key) == ("amqtask.delay.level.0", "a.b")
    assert PLAN.addressed(delivered(on)) == PLAN.addressed(delivered(waiting))


def test_a_message_that_finds_no_place_waits_each_time_for_longer_up_to_an_hour() -> None:
    message, waits = PLAN.delayed(task_message(), 1), []
    for _ in range(12):
        message = PLAN.delayed_again(delivered(message))
        due = due_at(message.properties.headers)
        assert due is not None
        waits.append(due - NOW)

    assert waits[:3] == [10.0, 20.0, 40.0]
    assert waits[-1] == 3600.0
    assert PLAN.addressed(delivered(message)) == PLAN.addressed(delivered(PLAN.delayed(task_message(), 3600)))


def test_a_message_that_a_fast_clock_forwarded_waits_for_what_that_clock_is_ahead() -> None:
    assert second_delay({"amqtask-delay-until": 1}, 2.0) == 4.0
    assert second_delay({}, 2.0) == 2.0
    assert second_delay({"amqtask-delay-until": 1}, 3600.0) == 3600.0


def test_quorum_levels_keep_a_message_until_the_next_has_it() -> None:
    for entity in PLAN.delayed(task_message(), 5000).declare[1:]:
        if isinstance(entity, Queue):
            asked = entity.argument_map
            assert asked["x-queue-type"] == "quorum"
            assert asked["x-overflow"] == "reject-publish"
            assert asked["x-dead-letter-strategy"] == "at-least-once"
            assert entity.durable


def test_classic_levels_ask_for_nothing_that_classic_queues_refuse() -> None:
    message = DelayPlan("mine", "classic").delayed(task_message(priority=0), 1)

    level = next(entity for entity in message.declare if isinstance(entity, Queue) and entity.name == "mine.0s")
    assert level.argument_map == {
        "x-queue-type": "classic",
        "x-message-ttl": 10000,
        "x-dead-letter-exchange": "mine.out",
    }


def test_the_same_wait_declares_the_same_things() -> None:
    assert PLAN.delayed(task_message(), 3).declare == PLAN.delayed(task_message(), 2.99).declare


def test_the_level_of_a_queue() -> None:
    plan = DelayPlan("p.q")

    assert {plan.level_of(found.queue.name) for found in plan.held() if found.level == 2} == {2}
    assert plan.level_of("p.q.0s") == 0
    assert plan.level_of("p.q.60s") == 0
    assert plan.level_of("p.q.64s") == 1
    assert plan.level_of("p.q.3000s") == 3
    assert plan.level_of("p.q.to") is None
    assert plan.level_of("images") is None


def test_messages_of_earlier_versions_are_found_in_their_queues() -> None:
    plan = DelayPlan("p.q")
    names = {name: level for level, name in plan.queue_names([0, 7, None])}

    for name, level in {"p.q.3.f.p7.2": 3, "p.q.0.1": 0, "p.q.1.a.pnone": 1}.items():
        assert plan.level_of(name) == names[name] == level
        assert plan.exchange_of(name) == f"p.q.{level}"
    headers = {"amqtask-delay-2": "3", "amqtask-delay-1": "2", "amqtask-delay-0": "0"}
    assert seconds_left(headers, 5, NOW) == 100.0
    assert seconds_left(headers, 1, NOW) == 100.0 % 32
    assert longest_former_wait({"amqtask-delay-0": [1]}, 5) == 0.0


def test_how_long_a_waiting_message_has_still_to_wait() -> None:
    headers = PLAN.delayed(task_message(), 100.0).properties.headers

    assert seconds_left(headers, 1, NOW + 40) == 60.0


def test_a_queue_s_addresses_are_its_name_and_its_keys_on_direct_exchanges() -> None:
    media = Exchange("media")
    assert addresses(Queue("plain")) == (("", "plain"),)
    assert addresses(Queue("images", exchange=media, routing_key="image")) == (("", "images"), ("media", "image"))
    assert addresses(Queue("all", exchange=Exchange("media", type="topic"), routing_key="#")) == (("", "all"),)
    more = (Binding(media, "images", "picture"), Binding(Exchange("news", type="fanout"), "images"))
    assert addresses(Queue("images", bindings=more)) == (("", "images"), ("media", "picture"))
