"""What is tried again, how often, and what its caller is told in the end."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from amqtask.backends.contract import RetryPolicy, retrying
from amqtask.exceptions import BackendUnreachable

QUICK = RetryPolicy(seconds=None, retries=3, first_pause=0.001, longest_pause=0.001)


class Store:
    """Fails so many times, then answers."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.calls = 0

    def ask(self) -> str:
        self.calls += 1
        if self.calls <= self.failures:
            raise ConnectionError("it is away")
        return "answer"


def asked(work: Callable[[], str], policy: RetryPolicy, *, is_transient: bool = True) -> str:
    return retrying(
        work,
        policy,
        errors=(ConnectionError,),
        is_transient=lambda error: is_transient,
        explain=lambda error: BackendUnreachable(f"the store: {error}"),
    )


def test_a_store_that_comes_back_is_asked_until_it_answers() -> None:
    store = Store(3)

    assert asked(store.ask, QUICK) == "answer"
    assert store.calls == 4


def test_after_the_last_retry_the_caller_is_told_why() -> None:
    store = Store(100)

    with pytest.raises(BackendUnreachable, match="it is away") as caught:
        asked(store.ask, QUICK)

    assert store.calls == 4
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_after_its_seconds_the_caller_is_told_why() -> None:
    store = Store(1_000_000)

    with pytest.raises(BackendUnreachable):
        asked(store.ask, RetryPolicy(seconds=0.05, first_pause=0.01, longest_pause=0.01))

    assert 1 <= store.calls < 10


def test_what_cannot_get_better_is_not_tried_again() -> None:
    store = Store(100)

    with pytest.raises(BackendUnreachable):
        asked(store.ask, QUICK, is_transient=False)

    assert store.calls == 1


def test_other_errors_pass() -> None:
    def broken() -> str:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        asked(broken, QUICK)


def test_trying_without_end_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        asked(Store(3).ask, QUICK)

    assert [record.getMessage() for record in caplog.records] == ["the store: it is away; trying again until it does"]
