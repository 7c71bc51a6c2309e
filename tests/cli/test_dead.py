"""What goes back to work from a dead-letter queue."""

from __future__ import annotations

from amqtask.cli.dead import back_to_work
from amqtask.message import Delivery, Properties


def test_a_message_goes_back_as_it_was_published_but_for_what_belongs_to_that_time() -> None:
    headers = {
        "task": "t", "id": "a", "mine": 1, "x-amqtask-queue": "work", "x-amqtask-reason": "poison", "x-delivery-count": 6,
        "timestamp_in_ms": 1_700_000_000_000,
    }  # fmt: skip
    message = back_to_work(
        Delivery(b"[]", Properties(headers=headers), "", "work.dead", False, "work.dead", 1, 1), "work"
    )

    assert message.routing_key == "work"
    assert message.properties.headers == {"task": "t", "id": "a", "mine": 1}
