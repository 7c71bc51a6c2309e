"""What is wanted beside what the management plugin reports."""

from __future__ import annotations

from typing import Any

import pytest

from amqtask.protocol.entities import Binding, Declaration, Exchange, Queue, arguments
from amqtask.topology.declarations import QueueDefaults, declarations, first_difference, work_queue
from amqtask.transport.inventory import by_kind, compare

MEDIA = Exchange("media", type="topic")
IMAGES = work_queue("images", QueueDefaults(), exchange=MEDIA, routing_key="media.image.*")


def api_queue(queue: Queue, **changes: Any) -> dict[str, Any]:
    """The plugin's object for a queue that is as wanted, but for the changed arguments."""
    given = {**queue.argument_map, **changes}
    return {
        "name": queue.name,
        "durable": queue.durable,
        "auto_delete": queue.auto_delete,
        "arguments": {name: value for name, value in given.items() if value is not None},
    }


def api_exchange(exchange: Exchange, **changes: Any) -> dict[str, Any]:
    """The plugin's object for an exchange."""
    own = {"name": exchange.name, "type": exchange.type, "durable": True, "auto_delete": False, "arguments": {}}
    return {**own, **changes}


def api_binding(binding: Binding) -> dict[str, Any]:
    """The plugin's object for a binding."""
    return {
        "source": binding.source.name,
        "destination": binding.destination,
        "destination_type": "queue",
        "routing_key": binding.routing_key,
        "arguments": dict(binding.arguments),
    }


def statuses(wanted: list[Declaration], **found: Any) -> list[tuple[str, str]]:
    """(status, detail) of each."""
    there: dict[str, Any] = {"queues": [], "exchanges": [], "bindings": [], **found}
    return [(finding.status, finding.detail) for finding in compare(wanted, **there)]


def test_all_is_there_as_wanted() -> None:
    wanted = declarations(IMAGES, QueueDefaults())
    exchanges, queues, bindings = by_kind(wanted)

    found = statuses(
        list(wanted),
        queues=[api_queue(queue) for queue in queues],
        exchanges=[api_exchange(exchange) for exchange in exchanges],
        bindings=[api_binding(binding) for binding in bindings],
    )

    assert len(found) == 4
    assert set(found) == {("ok", "")}


def test_what_is_not_there_is_missing() -> None:
    wanted = list(declarations(IMAGES, QueueDefaults()))

    assert set(statuses(wanted)) == {("missing", "")}


def test_every_difference_of_a_queue_is_named() -> None:
    found = api_queue(IMAGES, **{"x-queue-type": "classic", "x-delivery-limit": None, "x-max-length": 10})

    ((status, detail),) = statuses([IMAGES], queues=[found])

    assert status == "differs"
    assert detail.split("; ") == [
        "x-delivery-limit is not set, wanted 20",
        "x-max-length is 10, wanted not set",
        "x-queue-type is 'classic', wanted 'quorum'",
    ]


def test_an_exchange_of_another_type_differs() -> None:
    assert statuses([MEDIA], exchanges=[api_exchange(MEDIA, type="fanout")]) == [
        ("differs", "type is 'fanout', wanted 'topic'")
    ]


def test_a_classic_queue_need_not_say_so() -> None:
    queue = Queue("old", arguments=arguments({"x-queue-type": "classic"}))

    assert statuses([queue], queues=[api_queue(queue, **{"x-queue-type": None})]) == [("ok", "")]


def test_a_binding_under_another_key_is_missing() -> None:
    binding = Binding(MEDIA, "images", "media.image.*")
    other = api_binding(Binding(MEDIA, "images", "media.#"))

    assert statuses([binding], bindings=[other]) == [("missing", "")]
    assert statuses([binding], bindings=[other, api_binding(binding)]) == [("ok", "")]


@pytest.mark.parametrize(
    ("said", "difference"),
    [
        (
            "PRECONDITION_FAILED - inequivalent arg 'x-queue-type' for queue 'jobs' in vhost '/': received the value "
            "'quorum' of type 'longstr' but current is the value 'classic' of type 'longstr'",
            "x-queue-type is 'classic', wanted 'quorum'",
        ),
        (
            "PRECONDITION_FAILED - inequivalent arg 'x-max-length' for queue 'jobs' in vhost '/': received none but "
            "current is the value '1000' of type 'signedint'",
            "x-max-length is '1000', wanted not set",
        ),
        ("PRECONDITION_FAILED - something else", None),
    ],
)
def test_the_broker_s_words_for_a_difference(said: str, difference: str | None) -> None:
    assert first_difference(said) == difference
