from __future__ import annotations

import pytest

from amqtask.ground.printable import clause, count, described
from amqtask.transport.errors import unreachable
from amqtask.transport.url import BrokerAddress


@pytest.mark.parametrize(("value", "words"), [([], "a list"), (1, "an int"), (object(), "an object"), ("", "a str")])
def test_a_value_is_described_with_its_article(value: object, words: str) -> None:
    assert described(value) == words


def test_one_is_not_many() -> None:
    assert [count(number, "task") for number in (0, 1, 2)] == ["0 tasks", "1 task", "2 tasks"]


def test_what_an_error_says_ends_without_a_full_stop_in_a_sentence() -> None:
    assert clause(ValueError("Connection refused.")) == "Connection refused"
    error = unreachable(ConnectionError("111 connecting to h:5672. Connection refused."), [BrokerAddress()])
    assert "Connection refused. Is RabbitMQ running" in str(error)
