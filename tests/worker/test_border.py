"""Whatever is delivered ends in one way, and what is delivered beside it is not touched."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amqtask import AmqTask
from amqtask.execution.no_run import MOST_TOLD
from amqtask.protocol.message import Delivery, Properties
from amqtask.testing.tasks import PlainTask, make_executor
from amqtask.transport.content import decode_table
from tests.worker.bench import Bench

LONG = "long " * 20_000


def _json(value: Any) -> bytes:
    return json.dumps(value, default=repr).encode()


leaves: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, -1, 0, 2**62, 1.5, float("nan"), float("-inf"), "", "a", "a\nb", "\x1b[2J", LONG, b"\xff", [], {}]
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["task", "id", "n"]), inner, max_size=3)
    ),
    max_leaves=6,
)
known = st.sampled_from(
    [
        "task", "id", "shadow", "eta", "expires", "group", "group_index", "retries", "timelimit", "root_id", "parent_id",
        "argsrepr", "origin", "ignore_result", "replaced_task_nesting", "stamped_headers", "stamps", "lang", "compression",
        "x-delivery-count", "x-death", "x-amqtask-chord", "amqtask-run", "timestamp_in_ms",
    ]
)  # fmt: skip
signatures = st.fixed_dictionaries(
    {"task": st.sampled_from(["t", "no.such", "celery.chain", "celery.group", "celery.chord", 5])},
    optional={"args": values, "kwargs": values, "options": values},
)
embeds = st.dictionaries(
    st.sampled_from(["callbacks", "errbacks", "chain", "chord"]), values | signatures | st.lists(signatures, max_size=2)
)
bodies = st.one_of(
    st.binary(max_size=30),
    st.builds(lambda embed: _json([[], {}, embed]), embeds),
    values.map(_json),
    st.builds(lambda fields: _json({"task": "t", "id": "v1", **fields}), st.dictionaries(known, values, max_size=3)),
)
properties = st.builds(
    Properties,
    content_type=st.sampled_from(["application/json", None, "text/plain", "\\xff"]),
    content_encoding=st.sampled_from(["utf-8", None, "punycode", "binary"]),
    headers=st.one_of(
        st.none(),
        st.dictionaries(known, values, max_size=6),
        st.dictionaries(known, values, max_size=4).map(lambda more: {"task": "t", "id": "i", **more}),
        st.binary(max_size=60).map(lambda raw: decode_table(len(raw).to_bytes(4, "big") + raw, 0)[0]),
    ),
    correlation_id=st.sampled_from([None, "c", "\\xff"]),
    reply_to=st.sampled_from([None, "reply"]),
)


@settings(deadline=None)
@given(properties, bodies, st.booleans())
def test_each_message_is_answered_once_and_good_ones_run(found: Properties, body: bytes, redelivered: bool) -> None:
    executor = make_executor(PlainTask(lambda *args, **kwargs: None, "t"))
    bench = Bench(slots=10, endings=executor)
    bench.deliver("good-1")
    bench.worker.on_delivery(Delivery(body, found, "", "q", redelivered, "q", 2, 1))
    bench.tag = 2
    bench.deliver("good-2")
    for number, request in list(bench.pool.running.items()):
        outcome = executor.execute(request)
        assert "internal error" not in outcome.reason
        bench.pool.end(number, **{k: v for k, v in outcome._asdict().items() if k != "number"})
    bench.loop.advance(1.0)
    bench.publisher.confirm_all()
    bench.loop.advance(1.0)

    assert {"good-1", "good-2"} <= set(bench.started)
    assert sorted(_acked(bench.frames)) == [1, 2, 3]
    for message in bench.publisher.sent:
        assert len(message.properties.headers.get("x-amqtask-reason", "")) < 1100


def _acked(frames: list[tuple[Any, ...]]) -> list[int]:
    """Tags that were answered, each as often as it was."""
    done: list[int] = []
    for frame in frames:
        is_multiple = frame[0] == "ack" and frame[2]
        done += [tag for tag in range(1, frame[1] + 1) if tag not in done] if is_multiple else [frame[1]]
    return done


REPLIES = "7c1fd0b6-2d3d-4e0b-a7a5-7f4b6a6a1c11"


@pytest.mark.parametrize("what", ["chain", "errbacks"])
def test_what_is_told_on_the_loop_to_those_who_wait_is_bounded_and_the_last_step_is_told(
    what: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A message of half a megabyte asked for a result each of 10,000 steps, in time that grew with their square."""
    app = AmqTask("loop", broker="amqp://", backend="rpc://", set_as_current=False)
    app.task(name="t")(lambda *args: None)
    bench = Bench(endings=app.make_executor("w@h"))
    steps = [{"task": "t", "options": {"task_id": f"s{n}", "reply_to": REPLIES}} for n in range(10_000)]
    headers = {"task": "t", "id": "i", "expires": "2000-01-01T00:00:00Z" if what == "chain" else "soon"}
    body = _json([[], {}, {what: steps}])
    found = Properties("application/json", "utf-8", headers)
    bench.worker.on_delivery(Delivery(body, found, "", "q", False, "q", 1, 1))
    bench.loop.advance(1.0)

    told = [message.properties for message in bench.publisher.sent]
    assert 1_000 < len(told) <= MOST_TOLD + 1
    if what == "chain":  # which is stored from its end
        assert {"s0", "s1"} <= {properties.correlation_id for properties in told}
        assert "the others are not told" in caplog.text
