"""Spans and metrics of publishing and running tasks: their names, what they say, and that a trace holds together."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from amqtask import AmqTask, chain, chord, group
from amqtask.contrib.opentelemetry import AmqTaskInstrumentor
from amqtask.exceptions import EncodeError, Unroutable
from amqtask.testing.worker import start_worker


class Traced:
    """An app whose spans are kept."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("the test")
        self.reader = InMemoryMetricReader()
        self.meters = MeterProvider([self.reader])
        AmqTaskInstrumentor().instrument(tracer_provider=self.provider, meter_provider=self.meters)
        self.app = AmqTask(
            "traced", broker="memory://", backend="cache+memory://", task_default_queue="work", set_as_current=False
        )
        app, tracer = self.app, self.tracer

        @app.task(name="add")
        def add(x: int, y: int) -> int:
            with tracer.start_as_current_span("inside"):
                return x + y

        @app.task(name="aadd")
        async def aadd(x: int, y: int) -> int:
            with tracer.start_as_current_span("inside"):
                return x + y

        @app.task(name="total")
        def total(numbers: list[int]) -> int:
            return sum(numbers)

        @app.task(name="fail")
        def fail() -> None:
            raise ValueError("no")

        @app.task(name="fail_as_expected", throws=(ValueError,))
        def fail_as_expected() -> None:
            raise ValueError("no")

        @app.task(name="twice", bind=True, default_retry_delay=0)
        def twice(self: Any) -> str:
            if self.request.retries < 1:
                raise self.retry(exc=RuntimeError("not yet"))
            return "done"

        @app.task(name="call_add")
        def call_add() -> None:
            add.delay(1, 2)

        self.add, self.aadd, self.total, self.call_add = add, aadd, total, call_add
        self.fail, self.fail_as_expected, self.twice = fail, fail_as_expected, twice

    @property
    def spans(self) -> list[ReadableSpan]:
        return sorted(self.exporter.get_finished_spans(), key=lambda span: span.start_time or 0)

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == name]

    def measured(self, name: str) -> list[Any]:
        """The points of one metric."""
        data: Any = self.reader.get_metrics_data()
        found = [
            metric
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
        ]
        return [point for metric in found for point in metric.data.data_points]

    def one(self, name: str) -> ReadableSpan:
        [span] = self.named(name)
        return span


@pytest.fixture
def traced() -> Iterator[Traced]:
    made = Traced()
    yield made
    AmqTaskInstrumentor().uninstrument()
    made.app.close()
    made.provider.shutdown()
    made.meters.shutdown()


def parent(span: ReadableSpan) -> int:
    """Its parent's id; 0 for a root."""
    return span.parent.span_id if span.parent is not None else 0


def ident(span: ReadableSpan) -> int:
    context = span.get_span_context()
    assert context is not None
    return context.span_id


def trace_ids(spans: list[ReadableSpan]) -> set[int]:
    return {context.trace_id for span in spans if (context := span.get_span_context()) is not None}


@pytest.mark.parametrize("pool", ["solo", "threads", "asyncio"])
@pytest.mark.parametrize("task", ["add", "aadd"])
def test_caller_publish_process_and_what_the_task_does_are_one_trace(traced: Traced, pool: str, task: str) -> None:
    with start_worker(traced.app, pool=pool), traced.tracer.start_as_current_span("caller"):
        assert getattr(traced, task).delay(1, 2).get(timeout=60) == 3

    caller, publish, process, inside = (traced.one(n) for n in ("caller", "publish work", "process work", "inside"))
    assert [parent(span) for span in (caller, publish, process, inside)] == [
        0,
        ident(caller),
        ident(publish),
        ident(process),
    ]
    assert len(trace_ids(traced.spans)) == 1
    assert (publish.kind, process.kind) == (SpanKind.PRODUCER, SpanKind.CONSUMER)


def test_attributes_are_those_of_the_conventions(traced: Traced) -> None:
    with start_worker(traced.app):
        result = traced.add.delay(1, 2)
        result.get(timeout=60)

    shared = {
        "messaging.system": "rabbitmq",
        "messaging.destination.name": "work",
        "messaging.rabbitmq.destination.routing_key": "work",
        "messaging.message.id": result.id,
        "messaging.message.conversation_id": result.id,
        "amqtask.task.name": "add",
        "amqtask.task.id": result.id,
    }
    publish, process = dict(traced.one("publish work").attributes or {}), traced.one("process work").attributes or {}
    assert publish.pop("messaging.message.body.size") == process["messaging.message.body.size"]
    assert publish == {**shared, "messaging.operation.name": "publish", "messaging.operation.type": "send"}
    assert {key: value for key, value in process.items() if key != "messaging.message.body.size"} == {
        **shared,
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "amqtask.task.retries": 0,
        "amqtask.task.state": "SUCCESS",
        "amqtask.redelivered": False,
    }


def test_a_delayed_message_is_named_by_where_it_goes(traced: Traced) -> None:
    with start_worker(traced.app):
        traced.add.apply_async((1, 2), countdown=0.2).get(timeout=60)

    assert parent(traced.one("process work")) == ident(traced.one("publish work"))


def test_a_failure_is_an_error_with_its_exception(traced: Traced) -> None:
    with start_worker(traced.app):
        traced.fail.delay().get(timeout=60, propagate=False)

    process = traced.one("process work")
    assert (process.status.status_code, process.status.description) == (StatusCode.ERROR, "no")
    assert (process.attributes or {})["error.type"] == "builtins.ValueError"
    assert (process.attributes or {})["amqtask.task.state"] == "FAILURE"
    assert [event.name for event in process.events] == ["exception"]


def test_an_expected_exception_is_told_and_is_no_error(traced: Traced) -> None:
    with start_worker(traced.app):
        traced.fail_as_expected.delay().get(timeout=60, propagate=False)

    process = traced.one("process work")
    assert process.status.status_code is StatusCode.UNSET
    assert [event.name for event in process.events] == ["exception"]


def test_each_try_is_a_child_of_the_one_before(traced: Traced) -> None:
    with start_worker(traced.app):
        assert traced.twice.delay().get(timeout=60) == "done"

    first, second = traced.named("process work")
    create = traced.one("create work")
    assert [parent(span) for span in (first, create, second)] == [
        ident(traced.one("publish work")),
        ident(first),
        ident(create),
    ]
    assert [(span.attributes or {})["amqtask.task.state"] for span in (first, second)] == ["RETRY", "SUCCESS"]
    assert (create.attributes or {})["messaging.operation.type"] == "create"
    assert first.status.status_code is StatusCode.UNSET
    assert [event.name for event in first.events] == ["task retry"]


def test_a_chain_and_a_chord_are_one_trace(traced: Traced) -> None:
    add, total = traced.add, traced.total
    with start_worker(traced.app):
        assert chain(add.s(1, 2), add.s(4), add.s(8)).delay().get(timeout=60) == 15
        assert len(trace_ids(traced.spans)) == 1
        traced.exporter.clear()

        assert chord(group(add.s(n, n) for n in range(3)), total.s()).delay().get(timeout=60) == 6

    body = next(
        span for span in traced.named("process work") if (span.attributes or {})["amqtask.task.name"] == "total"
    )
    header = [span for span in traced.spans if span is not body and span.name == "process work"]
    assert trace_ids([body]) <= trace_ids(header)


def test_what_a_task_publishes_is_a_child_of_its_run(traced: Traced) -> None:
    done = threading.Event()

    @traced.app.task(name="end")
    def end() -> None:
        done.set()

    with start_worker(traced.app):
        traced.call_add.apply_async(link=end.si())
        assert done.wait(60)

    run = traced.named("process work")[0]
    inner = next(span for span in traced.named("publish work") if (span.attributes or {})["amqtask.task.name"] == "add")
    assert parent(inner) == ident(run)


def test_many_calls_have_a_span_each(traced: Traced) -> None:
    with traced.tracer.start_as_current_span("caller"):
        with traced.app.pipeline():
            for n in range(3):
                traced.add.delay(n, n)
        traced.app.publish_many([traced.add.s(n, n) for n in range(3)])
        group(traced.add.s(n, n) for n in range(3)).delay()

    publishes = traced.named("publish work")
    assert len(publishes) == 9
    assert {parent(span) for span in publishes} == {ident(traced.one("caller"))}


def test_a_publish_that_fails_is_an_error(traced: Traced) -> None:
    with pytest.raises(Unroutable):
        traced.app.send_task("add", (1, 2), exchange="", routing_key="nobody", queue=None)

    publish = traced.one("publish nobody")
    assert publish.status.status_code is StatusCode.ERROR
    assert (publish.attributes or {})["error.type"] == "amqtask.exceptions.Unroutable"


def test_a_call_that_cannot_be_encoded_leaves_no_span(traced: Traced) -> None:
    with pytest.raises(EncodeError):
        traced.app.send_task("add", (object(), 1))

    assert traced.spans == []


def test_a_run_without_a_message_is_a_part_of_its_caller(traced: Traced) -> None:
    with traced.tracer.start_as_current_span("caller"):
        traced.add.apply((1, 2))

    run = traced.one("run add")
    assert (parent(run), run.kind) == (ident(traced.one("caller")), SpanKind.INTERNAL)
    assert parent(traced.one("inside")) == ident(run)


@pytest.mark.parametrize("header", ["nonsense", 7, None, b"\xff"])
def test_headers_that_make_no_sense_begin_a_new_trace(traced: Traced, header: Any) -> None:
    ran = threading.Event()
    task = traced.app.task(name="ran")(ran.set)
    AmqTaskInstrumentor().uninstrument()
    task.apply_async(headers={"traceparent": header})
    AmqTaskInstrumentor().instrument(tracer_provider=traced.provider)
    with start_worker(traced.app):
        assert ran.wait(60)

    assert parent(traced.one("process work")) == 0


def test_nothing_of_one_task_is_left_for_the_next(traced: Traced) -> None:
    with start_worker(traced.app, pool="threads"):
        for _ in range(3):
            traced.add.delay(1, 2).get(timeout=60)
    traced.add.apply((1, 2))

    assert len(trace_ids(traced.named("process work"))) == 3
    assert parent(traced.one("run add")) == 0
    assert not trace.get_current_span().get_span_context().is_valid


def test_without_the_instrumentation_nothing_is_traced(traced: Traced) -> None:
    AmqTaskInstrumentor().uninstrument()
    with start_worker(traced.app):
        traced.add.delay(1, 2).get(timeout=60)
    AmqTaskInstrumentor().instrument(tracer_provider=traced.provider)

    assert [span.name for span in traced.spans] == ["inside"]


def test_messages_and_durations_are_measured_under_the_conventions_names(traced: Traced) -> None:
    with start_worker(traced.app):
        for _ in range(3):
            traced.add.delay(1, 2).get(timeout=60)
        traced.fail.delay().get(timeout=60, propagate=False)
        traced.fail_as_expected.delay().get(timeout=60, propagate=False)
    traced.app.conf.task_create_missing_queues = False
    with pytest.raises(Unroutable):
        traced.add.apply_async((1, 2), exchange="", routing_key="nowhere")

    common = {"messaging.system": "rabbitmq", "messaging.destination.name": "work"}
    sent = {"messaging.operation.name": "publish", **common}
    lost = {**sent, "messaging.destination.name": "nowhere", "error.type": "amqtask.exceptions.Unroutable"}
    processed = {"messaging.operation.name": "process", **common}
    failed = {**processed, "error.type": "builtins.ValueError"}

    def counts(name: str) -> list[tuple[Any, int]]:
        return [
            (dict(point.attributes), getattr(point, "value", None) or point.count) for point in traced.measured(name)
        ]

    assert counts("messaging.client.sent.messages") == [(sent, 5), (lost, 1)]
    kind = {"messaging.operation.type": "send"}
    assert counts("messaging.client.operation.duration") == [(sent | kind, 5), (lost | kind, 1)]
    assert counts("messaging.client.consumed.messages") == [(processed, 5)]
    assert counts("messaging.process.duration") == [(processed, 4), (failed, 1)]
    assert traced.measured("messaging.process.duration")[0].sum > 0


def test_what_runs_inline_is_no_message_and_is_not_measured(traced: Traced) -> None:
    traced.add.apply((1, 2))

    assert traced.reader.get_metrics_data() is None
