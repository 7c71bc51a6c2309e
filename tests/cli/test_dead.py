"""What goes back to work from a dead-letter queue."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from amqtask import AmqTask, Unique
from amqtask.cli.base import print_json
from amqtask.cli.dead import _matching, _names, _retrying, _why, line_of
from amqtask.cli.migrate import Delayed, as_sent, is_wanted
from amqtask.cli.queues import age
from amqtask.flow.keys import UNIQUE
from amqtask.protocol.message import Delivery, Properties
from amqtask.services.rerunning import Pace, as_entry, back_to_work, has_expired, work_queue_of


def test_a_message_goes_back_as_it_was_published_but_for_what_belongs_to_that_time() -> None:
    headers = {
        "task": "t", "id": "a", "mine": 1, "x-amqtask-queue": "work", "x-amqtask-reason": "poison", "x-delivery-count": 6,
        "timestamp_in_ms": 1_700_000_000_000, "amqtask-unique": "k", "amqtask-unique-taken": 60,
        "amqtask-tickets": {"limit": 1},
    }  # fmt: skip
    message = back_to_work(
        Delivery(b"[]", Properties(headers=headers), "", "work.dead", False, "work.dead", 1, 1), "work"
    )

    assert message.routing_key == "work"
    assert message.properties.headers == {"task": "t", "id": "a", "mine": 1, "amqtask-unique": "k"}


# Header values as they come off the wire.
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text() | st.binary()
    | st.decimals() | st.datetimes(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
NAMES = (
    "task", "id", "x-death", "expires", "eta", "timestamp_in_ms", "x-amqtask-reason", "x-amqtask-queue", "x-amqtask-attempts",
    "x-amqtask-exception", "x-amqtask-host", "x-amqtask-died-at", "amqtask-delay-to", "amqtask-delay-0", "amqtask-delay-3",
    "amqtask-unique",
)  # fmt: skip
deaths = st.lists(
    st.dictionaries(st.sampled_from(["queue", "reason", "count", "time"]), values, max_size=3) | values, max_size=2
)
APP = AmqTask("tools", broker="memory://", set_as_current=False)
headers = st.dictionaries(st.sampled_from(NAMES), values | deaths, max_size=6)


@settings(deadline=None, max_examples=50)
@given(headers | st.none())
def test_whatever_a_message_says_commands_can_list_show_retry_and_move_it(found: dict[str, Any] | None) -> None:
    delivery = Delivery(b"\xff", Properties(headers=found), "", "work.dead", False, "work.dead", 1, 1)  # type: ignore[arg-type]

    entry = as_entry(delivery)
    hash(_why(delivery))
    print_json({**entry, "headers": delivery.properties.headers})
    list(_matching([delivery], "t", ("a",)))
    assert isinstance(work_queue_of(delivery, ".dead"), str)
    has_expired(found or {}, 0.0)
    age(None, found or {}, 0.0)
    line_of(entry)
    is_wanted(delivery, ("t",))
    _retrying(APP, None, (), None, [], Pace(APP, 0.5), {})(delivery)
    as_sent(delivery, "other")
    Delayed(APP, 3, None, ())(delivery)
    assert json.dumps(entry["id"]) != ""


def test_the_dead_letters_of_a_shard_are_those_of_its_queue() -> None:
    unasked: Any = None

    assert _names(APP, unasked, "work.fair.3", all_queues=False) == ["work.dead"]
    assert _names(APP, unasked, "work.dead", all_queues=False) == ["work.dead"]


def test_a_unique_call_whose_key_another_one_has_stays_and_that_is_told() -> None:
    app = AmqTask("unique", broker="memory://", set_as_current=False)

    @app.task(name="count", unique=Unique(by=()))
    def count(number: int) -> None: ...

    first = count.delay(1)
    key = app.caller.compose("count", (2,), {}, {}, count).properties.headers[UNIQUE]
    held: dict[str, str] = {}
    retried = _retrying(app, None, (), None, [], Pace(app, None), held)

    def goes(**headers: Any) -> bool:
        properties = Properties(headers={"task": "count", "id": "old", UNIQUE: key, **headers})
        return retried(Delivery(b"", properties, "", "work.dead", False, "work.dead", 1, 1)) is not None

    assert not goes()
    assert held == {"old": first.id}
    assert goes(**{UNIQUE: ["odd"]})
    assert goes(**{UNIQUE: "another's"})
    assert goes(task=5)
    app.runtime.flow_store.free(key, first.id)
    assert goes()
    assert count.delay(2).id != "old"  # nobody has it until that one runs
    app.close()
