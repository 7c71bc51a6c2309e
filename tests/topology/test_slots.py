"""Slots of queues as people write them."""

from __future__ import annotations

import pytest

from amqtask import AmqTask
from amqtask.exceptions import ConfigurationError
from amqtask.topology.slots import QueueSlots, queue_slots, with_slots


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (2, QueueSlots(most=2)),
        ("20", QueueSlots(most=20)),
        ("2+", QueueSlots(reserved=2)),
        ("1-4", QueueSlots(reserved=1, most=4)),
        ("3-3", QueueSlots(reserved=3, most=3)),
    ],
)
def test_slots_are_read_and_shown_as_they_are_written(written: object, meant: QueueSlots) -> None:
    assert queue_slots(written) == meant
    assert str(meant) == str(written)


@pytest.mark.parametrize(
    ("item", "meant"),
    [
        ("default", ("default", None)),
        ("reports:2", ("reports", QueueSlots(most=2))),
        ("celery:high", ("celery:high", None)),
        ("tenant:7:", ("tenant:7", None)),
        ("tenant:7:2+", ("tenant:7", QueueSlots(reserved=2))),
        ("known:9", ("known:9", None)),
        ("known:9:3", ("known:9", QueueSlots(most=3))),
    ],
)
def test_an_item_of_q_is_a_queue_and_its_slots(item: str, meant: tuple[str, QueueSlots | None]) -> None:
    assert with_slots(item, {"known:9"}) == meant


@pytest.mark.parametrize("item", ["web:0", "web:-1", "web:2.5", "web:2x", "web:4-1", "web:0+", "web:+", "web: 2"])
def test_a_wrong_number_says_what_to_write(item: str) -> None:
    with pytest.raises(ConfigurationError, match=r"2 \(at most 2 slots\), 2\+ .* or 1-4 .* write .*:$") as raised:
        with_slots(item, ())
    assert item in str(raised.value)


@pytest.mark.parametrize("value", [{"web": 0}, {"web": True}, {"web": 2.5}, {"web": "two"}, {7: 2}, ["web:2"]])
def test_the_setting_says_what_it_wants(value: object) -> None:
    with pytest.raises(ConfigurationError, match=r"worker_queue_slots wants a dictionary of queues and 2 \(at most"):
        AmqTask("tests", broker="memory://", worker_queue_slots=value, set_as_current=False)
