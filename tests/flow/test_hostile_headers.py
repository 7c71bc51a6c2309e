"""Whatever stands in a header, its message ends, and good ones run beside it: tasks with each kind of flow control."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from amqtask import AmqTask, Batch, Breaker, Concurrency, Rate, Unique
from amqtask.protocol.message import Message, Properties
from amqtask.testing.worker import start_worker
from amqtask.worker.worker import Worker
from integration.waiting import eventually

UNIQUE = "amqtask-flow:{unique}:unique:number:"
HEADERS = (
    "eta", "expires", "group", "group_index", "retries", "timelimit", "root_id", "parent_id", "shadow", "ignore_result", "stamps",
    "stamped_headers", "replaced_task_nesting", "compression", "timestamp_in_ms", "traceparent", "periodic_task_name", "headers",
    "x-amqtask-chord", "x-amqtask-queue", "x-delivery-count", "x-death", "amqtask-run", "amqtask-deadline", "amqtask-unique",
    "amqtask-unique-taken", "amqtask-tickets", "amqtask-begun-anew", "amqtask-rerun-of", "amqtask-delay-to",
    "amqtask-delay-until", "amqtask-delay-tries", "amqtask-delay-0", "amqtask-delay-priority", "CC", "BCC",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2**63 - 1, -(2**63), 1.5, -1e300, 5e-324, "", "x", "\0", "../x", "a\nb\x1b[2J", "x" * 20_000, b"\xff",
    [], {}, [None], [1], [1, 2], [0.05, None], [1e300, "x"], {"": None}, {"concurrency by number": -(2**63)}, {"rate": 2**63 - 1},
    {"x" * 255: 1}, [[[[]]]], "9999-12-31T23:59:59.999999-14:00", "0001-01-01T00:00:00+14:00", "1969-12-31T23:59:59Z", "NaN",
    "2000-01-01", UNIQUE, f"{UNIQUE}{'0' * 32}", UNIQUE + "x" * 600, "amqtask-flow:{limited}:concurrency:number:x",
)  # fmt: skip
TASKS = ("unique", "limited", "bound", "batch", "shared", "guarded", "retries", "parent")
messages = st.tuples(
    st.sampled_from(TASKS),
    st.integers(0, 3),
    st.dictionaries(st.sampled_from(HEADERS), st.sampled_from(VALUES), max_size=3),
)


class Lines(logging.Handler):
    """What is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture(scope="module")
def working() -> Iterator[tuple[AmqTask, Worker]]:
    app = AmqTask("hostile", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.task(name="unique", unique=Unique(by="number", ttl=1))(lambda number: None)
    app.task(name="limited", limits=[Concurrency(2, by="number"), Rate("1000/s")])(lambda number: None)
    app.task(name="bound", bind=True, deadline=30)(lambda self, number: str(self.request.remaining))
    app.task(name="batch", batch=Batch(size=5, seconds=0.05))(lambda calls: None)
    app.task(name="shared", fair_by="number")(lambda number: None)
    app.task(name="guarded", breaker=Breaker(failures=1000, seconds=1, pause=1))(lambda number: None)
    good = app.task(name="good")(lambda: "good")

    @app.task(name="retries", bind=True, max_retries=10**9, deadline=60)
    def retries(self: Any, number: int) -> None:
        if not self.request.retries:
            raise self.retry(countdown=0.01)

    @app.task(name="parent", bind=True)
    def parent(self: Any, number: int) -> str:
        good.delay()
        return f"{self.request!r} {self.request.headers} {self.request.deadline} {self.request.is_cancelled()}"

    with start_worker(app, pool="threads", concurrency=4) as worker:
        yield app, worker
    app.close()


# These ran, and then ended as an internal error, or as a failure of their retry.
FOUND: list[tuple[str, int, dict[str, Any]]] = [
    ("limited", 0, {"x-amqtask-chord": None}),
    ("retries", 0, {"timelimit": [1]}),
    ("retries", 1, {"timelimit": 1.5}),
]


@example(FOUND)
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(st.lists(messages, min_size=5, max_size=15))
def test_no_header_takes_a_slot_or_hides_what_came_of_its_message(
    working: tuple[AmqTask, Worker], hostile: list[tuple[str, int, dict[str, Any]]]
) -> None:
    app, worker = working
    queue = app.queues[app.conf.task_default_queue]
    said = Lines()
    logging.getLogger("amqtask").addHandler(said)
    try:
        for place, (task, number, headers) in enumerate(hostile):
            fields = {"task": task, "id": f"{place}", **headers}
            properties = Properties("application/json", "utf-8", fields, reply_to="nobody")
            body = b"[[%d], {}, {}]" % number
            app.publisher.publish(Message(body, properties, "", queue.name, app.queues.declarations(queue)))
        assert app.tasks["good"].delay().get(timeout=60) == "good"
        with app.broker.admin() as admin:
            eventually(lambda: not worker.deliveries.outstanding_of(queue.name) and not admin.count(queue.name))
    finally:
        logging.getLogger("amqtask").removeHandler(said)
    for line in said.lines:
        assert len(line) < 8000
        assert "internal error" not in line
        assert "cannot be read" not in line or "Traceback" not in line
        # Of a retry that could not be made.
        assert "raised unexpected" not in line or "MaxRetries" in line
        assert line.replace("\n", "").isprintable()
