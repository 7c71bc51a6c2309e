"""Confirms and Returns: whatever order the broker answers in, each publish is settled once, and by its own answer."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amqtask.protocol.message import Message, Properties
from amqtask.transport.confirms import Confirms, Returns, Trusted


def published(count: int) -> Confirms[int]:
    """Outstanding items that are their own numbers."""
    confirms: Confirms[int] = Confirms()
    for number in range(1, count + 1):
        assert confirms.published(number) == number
    return confirms


def test_a_single_confirm_settles_one() -> None:
    confirms = published(3)

    assert confirms.settle(2, multiple=False) == [2]
    assert list(confirms.outstanding()) == [1, 3]


def test_a_multiple_confirm_settles_all_up_to_it() -> None:
    confirms = published(5)

    assert confirms.settle(2, multiple=False) == [2]
    assert confirms.settle(4, multiple=True) == [1, 3, 4]
    assert list(confirms.outstanding()) == [5]


def test_zero_means_all() -> None:
    assert published(3).settle(0, multiple=True) == [1, 2, 3]


def test_a_number_that_is_not_outstanding_settles_nothing() -> None:
    confirms = published(2)
    confirms.settle(1, multiple=False)

    assert confirms.settle(1, multiple=False) == []
    assert confirms.settle(9, multiple=False) == []
    assert confirms.settle(1, multiple=True) == []
    assert len(confirms) == 1


def test_a_multiple_confirm_beyond_the_last_does_not_settle_the_future() -> None:
    confirms = published(1)
    assert confirms.settle(7, multiple=True) == [1]

    number = confirms.published(99)

    assert confirms.settle(number, multiple=True) == [99]


steps = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), st.integers(1, 20)),
        st.tuples(st.just("single"), st.integers(0, 60)),
        st.tuples(st.just("multiple"), st.integers(0, 60)),
    ),
    max_size=40,
)


@given(steps)
def test_each_publish_is_settled_exactly_once_and_in_order(plan: list[tuple[str, int]]) -> None:
    confirms: Confirms[int] = Confirms()
    outstanding: list[int] = []
    last = 0
    for step, value in plan:
        if step == "publish":
            for _ in range(value):
                last += 1
                confirms.published(last)
                outstanding.append(last)
            continue
        if step == "single":
            expected = [number for number in outstanding if number == value]
        else:
            expected = [number for number in outstanding if number <= value or value == 0]
        assert confirms.settle(value, multiple=step == "multiple") == expected
        outstanding = [number for number in outstanding if number not in expected]
        assert list(confirms.outstanding()) == outstanding
        assert len(confirms) == len(outstanding)


def test_a_return_is_claimed_by_its_message_once() -> None:
    returns = Returns()
    returns.returned("id", "ex", "key")

    assert not returns.claim("id", "ex", "other key")
    assert not returns.claim("id", "", "key")
    assert not returns.claim(None, "ex", "key")
    assert returns.claim("id", "ex", "key")
    assert not returns.claim("id", "ex", "key")
    assert len(returns) == 0


def test_the_same_message_returned_twice_is_claimed_twice() -> None:
    returns = Returns()
    returns.returned("id", "", "key")
    returns.returned("id", "", "key")

    assert [returns.claim("id", "", "key") for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize("expiration", [5, 5.5, True, b"5", "", "-1", "٣", "9" * 20, ["5"], {"5": 5}, object()])
def test_a_message_with_an_odd_expiration_goes_alone_whatever_it_is(expiration: Any) -> None:
    assert not Trusted().covers(Message(b"", Properties(expiration=expiration), routing_key="q"))


@pytest.mark.parametrize("expiration", [None, "0", "60000"])
def test_a_message_with_a_plain_expiration_goes_with_others(expiration: str | None) -> None:
    assert Trusted().covers(Message(b"", Properties(expiration=expiration), routing_key="q"))


@pytest.mark.parametrize("exchange", [["ex"], {"ex": 1}, {"ex"}, 5, b"ex", None])
def test_a_message_to_an_odd_exchange_goes_alone_whatever_it_is(exchange: Any) -> None:
    assert not Trusted().covers(Message(b"", Properties(), exchange=exchange, routing_key="q"))


@pytest.mark.parametrize(
    ("mode", "together"), [(2, True), (1, True), (None, True), (3, False), ("2", False), ([2], False)]
)
def test_a_message_with_a_delivery_mode_that_there_is_not_goes_alone(mode: Any, together: bool) -> None:
    assert Trusted().covers(Message(b"", Properties(delivery_mode=mode), routing_key="q")) is together
