"""Rate limits: Celery's notation, runs spread out, other tasks untouched."""

from __future__ import annotations

import itertools

import pytest

from amqtask.exceptions import ConfigurationError
from amqtask.execution.request import Request
from amqtask.worker.lines import MOST_HELD, Throttle, TokenBucket, parse_rate


def always(request: Request) -> bool:
    return True


@pytest.mark.parametrize(
    ("limit", "rate"),
    [(None, 0), ("", 0), (0, 0), ("0", 0), (5, 5), ("10/s", 10), ("120/m", 2), ("3600/h", 1), ("7", 7)],
)
def test_rates_are_read_as_celery_writes_them(limit: str | float | None, rate: float) -> None:
    assert parse_rate(limit) == rate


@pytest.mark.parametrize("limit", ["ten/s", "5/d", "/m"])
def test_another_notation_is_a_clear_error(limit: str) -> None:
    with pytest.raises(ConfigurationError, match="rate limit"):
        parse_rate(limit)


def test_a_bucket_gives_its_rate_and_no_burst() -> None:
    bucket = TokenBucket(10.0)
    taken = [step / 100 for step in range(1000) if bucket.take(step / 100)]

    assert len(taken) == pytest.approx(100, abs=1)
    assert min(later - earlier for earlier, later in itertools.pairwise(taken)) > 0.05


def test_a_bucket_that_was_idle_has_one_token_only() -> None:
    bucket = TokenBucket(10.0)
    assert bucket.take(0.0)

    assert [bucket.take(100.0), bucket.take(100.0)] == [True, False]


def request(number: int, task: str = "limited") -> Request:
    return Request(number=number, id=f"id-{number}", task=task)


def test_a_few_over_the_limit_are_held_and_the_others_sent_away_one_after_the_other() -> None:
    away: list[tuple[int, float]] = []
    throttle = Throttle(lambda request, seconds: away.append((request.number, seconds)))
    throttle.set_rate("limited", "10/s")

    passed = [throttle.lets_pass(request(number), now=50.0) for number in range(10)]

    assert passed == [True] + [False] * 9
    assert len(throttle) == MOST_HELD
    assert [number for number, _ in away] == [5, 6, 7, 8, 9]
    assert [seconds for _, seconds in away] == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])


def test_a_slow_rate_holds_nothing() -> None:
    away: list[float] = []
    throttle = Throttle(lambda request, seconds: away.append(seconds))
    throttle.set_rate("limited", "1/m")

    for number in range(3):
        throttle.lets_pass(request(number), now=50.0)

    assert len(throttle) == 0
    assert away == pytest.approx([60.0, 120.0])


def test_tasks_without_a_limit_pass() -> None:
    throttle = Throttle(lambda request, seconds: None)
    throttle.set_rate("limited", "1/m")

    assert all(throttle.lets_pass(request(number, "free"), now=50.0) for number in range(5))


def test_held_requests_come_out_at_the_rate() -> None:
    throttle = Throttle(lambda request, seconds: None)
    throttle.set_rate("limited", "10/s")
    for number in range(3):
        throttle.lets_pass(request(number), now=50.0)

    assert throttle.next_ready(50.05, always) is None
    assert throttle.wait(50.05, always) == pytest.approx(0.05)
    first, second = throttle.next_ready(50.1, always), throttle.next_ready(50.1, always)
    assert first is not None
    assert first.number == 1
    assert second is None


def test_lifting_the_limit_frees_what_is_held() -> None:
    throttle = Throttle(lambda request, seconds: None)
    throttle.set_rate("limited", "1/s")
    for number in range(2):
        throttle.lets_pass(request(number), now=50.0)
    throttle.set_rate("limited", None)

    assert throttle.next_ready(50.0, always) is not None
    assert not throttle
