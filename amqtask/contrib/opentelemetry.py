"""OpenTelemetry: spans and metrics of publishing and running tasks, and W3C trace context in messages (extra `otel`).

    from amqtask.contrib.opentelemetry import AmqTaskInstrumentor

    AmqTaskInstrumentor().instrument()

or `opentelemetry-instrument amqtask worker …`. It listens to signals: without it nobody asks for spans, and nothing is spent
on them. A message is published in one process and run in another; each span lives in one:

    publish q (PRODUCER)  from before_task_publish to after_task_publish or task_publish_failed
    create q (PRODUCER)   a retry or next step: made in a task's slot, published by the worker once the task has ended
    process q (CONSUMER)  from task_prerun to task_postrun, in the slot; child of the one above, current while the task runs

Names and attributes: https://opentelemetry.io/docs/specs/semconv/messaging/rabbitmq/ (1.30 and later; in development there),
of metrics https://opentelemetry.io/docs/specs/semconv/messaging/messaging-metrics/.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from opentelemetry import context as otel_context
from opentelemetry import metrics, propagate, trace
from opentelemetry.instrumentation.instrumentor import BaseInstrumentor  # type: ignore[attr-defined] # all of it is ignored
from opentelemetry.propagators.textmap import Getter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from amqtask import signals, states
from amqtask.execution.context import Context, current_context
from amqtask.ground import VERSION
from amqtask.topology.delays import TO_HEADER

if TYPE_CHECKING:
    from opentelemetry.util.types import AttributeValue

    from amqtask.execution.request import Request
    from amqtask.ground.shapes import HeaderDict, Headers

# Publishes whose end nobody tells (interrupted, or never sent because another call of a burst was wrong) are few.
MOST_OPEN_PUBLISHES = 10_000
# A child has half a second to end when its worker stops.
FLUSH_MILLISECONDS = 5000
_ON_CONTEXT = "_opentelemetry"
# Seconds; those that the conventions advise for messaging durations.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)


class AmqTaskInstrumentor(BaseInstrumentor):  # type: ignore[misc] # untyped
    """`instrument(tracer_provider=None, meter_provider=None)` and `uninstrument()`; by default the process-wide providers, also
    those set later."""

    _tracing: Tracing | None = None

    def instrumentation_dependencies(self) -> Collection[str]:
        """None: the instrumentation comes with amqtask itself."""
        return ()

    def _instrument(self, **kwargs: Any) -> None:
        self._tracing = Tracing(kwargs.get("tracer_provider"), kwargs.get("meter_provider"))
        self._tracing.connect()

    def _uninstrument(self, **kwargs: object) -> None:
        if self._tracing is not None:
            self._tracing.disconnect()
            self._tracing = None


class Publishing(NamedTuple):
    """A publish that has begun. The headers are kept so that their identity stays theirs."""

    span: Span
    headers: Mapping[str, object]
    destination: str
    began: float


class Running(NamedTuple):
    """A run that has begun, and the context that was current before."""

    span: Span
    before: otel_context.Context
    destination: str | None
    began: float


class Instruments:
    """The metrics of the messaging conventions: how many messages, and how long it took."""

    def __init__(self, provider: metrics.MeterProvider | None) -> None:
        meter = metrics.get_meter("amqtask", VERSION, provider)
        self._sent = meter.create_counter(
            "messaging.client.sent.messages", "{message}", "Messages that a producer attempted to send to the broker."
        )
        self._publish_seconds = _seconds(
            meter, "messaging.client.operation.duration", "Duration of a publish with its confirm."
        )
        self._consumed = meter.create_counter(
            "messaging.client.consumed.messages", "{message}", "Messages that were delivered to the application."
        )
        self._run_seconds = _seconds(meter, "messaging.process.duration", "Duration of a task's run.")

    def published(self, publishing: Publishing, error: BaseException | None) -> None:
        """A publish has ended."""
        attributes = _measured("publish", publishing.destination, error)
        self._sent.add(1, attributes)
        self._publish_seconds.record(
            time.perf_counter() - publishing.began, {**attributes, "messaging.operation.type": "send"}
        )

    def begun(self, destination: str) -> None:
        """A message's task begins."""
        self._consumed.add(1, _measured("process", destination, None))

    def ran(self, running: Running, error: BaseException | None) -> None:
        """A run has ended."""
        if running.destination is not None:
            seconds = time.perf_counter() - running.began
            self._run_seconds.record(seconds, _measured("process", running.destination, error))


def _seconds(meter: metrics.Meter, name: str, description: str) -> metrics.Histogram:
    return meter.create_histogram(name, "s", description, explicit_bucket_boundaries_advisory=BUCKETS)


def _measured(operation: str, destination: str, error: BaseException | None) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {
        "messaging.system": "rabbitmq",
        "messaging.operation.name": operation,
        "messaging.destination.name": destination,
    }
    if error is not None:
        attributes["error.type"] = _error_type(error)
    return attributes


class Tracing:
    """Turns signals into spans and metrics. One per process; forked children go on with what they have inherited."""

    def __init__(
        self, provider: trace.TracerProvider | None, meter_provider: metrics.MeterProvider | None = None
    ) -> None:
        self._provider = provider
        self._meter_provider = meter_provider
        self._tracer = trace.get_tracer("amqtask", VERSION, provider)
        self._instruments = Instruments(meter_provider)
        # By the identity of the headers that both signals get.
        self._publishing: OrderedDict[int, Publishing] = OrderedDict()
        self._receivers = (
            (signals.before_task_publish, self.before_publish),
            (signals.after_task_publish, self.after_publish),
            (signals.task_publish_failed, self.publish_failed),
            (signals.task_prerun, self.before_run),
            (signals.task_postrun, self.after_run),
            (signals.task_internal_error, self.run_broke),
            (signals.worker_process_shutdown, self.flush),
        )

    def connect(self) -> None:
        for signal, receiver in self._receivers:
            signal.connect(receiver, weak=False)

    def disconnect(self) -> None:
        for signal, receiver in self._receivers:
            signal.disconnect(receiver)

    # -- publishing

    def before_publish(
        self,
        sender: str,
        headers: HeaderDict,
        exchange: str,
        routing_key: str,
        size: int,
        properties: Mapping[str, Any],
        follow_up: bool = False,
        **_: object,
    ) -> None:
        exchange = headers.get(TO_HEADER, exchange)  # where it goes once its delay is over
        destination = _destination(exchange, routing_key)
        operation = "create" if follow_up else "publish"
        span = self._tracer.start_span(
            f"{operation} {destination}",
            kind=SpanKind.PRODUCER,
            attributes={
                **_attributes(sender, headers, destination, routing_key, properties.get("correlation_id")),
                "messaging.operation.name": operation,
                "messaging.operation.type": "create" if follow_up else "send",
                "messaging.message.body.size": size,
            },
        )
        propagate.inject(headers, context=trace.set_span_in_context(span))
        if follow_up:
            span.end()
            return
        self._publishing[id(headers)] = Publishing(span, headers, destination, time.perf_counter())
        if len(self._publishing) > MOST_OPEN_PUBLISHES:
            self._publishing.popitem(last=False)[1].span.end()

    def after_publish(self, sender: str, headers: Headers, **_: object) -> None:
        self._published(headers, None)

    def publish_failed(self, sender: str, headers: Headers, exception: BaseException, **_: object) -> None:
        self._published(headers, exception)

    def _published(self, headers: Headers, error: BaseException | None) -> None:
        publishing = self._publishing.pop(id(headers), None)
        if publishing is None:
            return
        if error is not None:
            _fail(publishing.span, error)
        publishing.span.end()
        self._instruments.published(publishing, error)

    # -- running

    def before_run(self, sender: object, **_: object) -> None:
        context = current_context()
        request = context.request if context is not None else None
        if context is None or request is None:
            return
        destination = None
        if request.is_eager:
            span = self._of_inline_run(request)
        else:
            destination = _destination(request.exchange, request.routing_key, request.queue)
            span = self._of_delivery(request, destination)
            self._instruments.begun(destination)
        span.set_attribute("amqtask.task.retries", context.retries)
        # Put back as it was by `attach`, not `detach`: the end of a task may be told in another thread.
        context.__dict__[_ON_CONTEXT] = Running(span, otel_context.get_current(), destination, time.perf_counter())
        otel_context.attach(trace.set_span_in_context(span))

    def _of_inline_run(self, request: Request) -> Span:
        """The span of `apply()` and task_always_eager: no message, so a part of the caller's span."""
        return self._tracer.start_span(
            f"run {request.task}", attributes=_task_attributes(request.task, request.headers)
        )

    def _of_delivery(self, request: Request, destination: str) -> Span:
        return self._tracer.start_span(
            f"process {destination}",
            context=propagate.extract(request.headers, context=otel_context.Context(), getter=_HEADERS),
            kind=SpanKind.CONSUMER,
            attributes={
                **_attributes(request.task, request.headers, destination, request.routing_key, request.correlation_id),
                "messaging.operation.name": "process",
                "messaging.operation.type": "process",
                "messaging.message.body.size": len(request.body),
                "amqtask.redelivered": request.redelivered,
            },
        )

    def after_run(self, sender: object, state: str, retval: object, **_: object) -> None:
        self._end(current_context(), state, retval if isinstance(retval, BaseException) else None, sender)

    def run_broke(self, sender: object, request: Context, exception: BaseException, **_: object) -> None:
        """End the span of a run that an error of amqtask's, or of the result store, has broken."""
        self._end(request, states.FAILURE, exception)

    def _end(self, context: Context | None, state: str, error: BaseException | None, task: Any = None) -> None:
        running: Running | None = context.__dict__.pop(_ON_CONTEXT, None) if context is not None else None
        if running is None:
            return
        span = running.span
        span.set_attribute("amqtask.task.state", state)
        failed = error if state == states.FAILURE else None
        is_expected = isinstance(failed, () if task is None else tuple(task.throws or ()))
        if failed is not None:
            _fail(span, failed, is_expected=is_expected)
        elif error is not None:
            span.add_event(f"task {state.lower()}", {"reason": str(error)})
        span.end()
        self._instruments.ran(running, None if is_expected else failed)
        otel_context.attach(running.before)

    def flush(self, **_: object) -> None:
        """Send what waits, when a child of prefork ends: exit handlers do not run there."""
        providers: tuple[object, ...] = (
            self._provider or trace.get_tracer_provider(),
            self._meter_provider or metrics.get_meter_provider(),
        )
        for provider in providers:
            if hasattr(provider, "force_flush"):
                provider.force_flush(FLUSH_MILLISECONDS)


def _destination(exchange: str, routing_key: str, queue: str = "") -> str:
    """`{exchange}:{routing key}:{queue}`, without what is empty, and without a queue that is named like the routing key."""
    parts = (exchange, routing_key, "" if queue == routing_key else queue)
    return ":".join(part for part in parts if part)


def _attributes(
    task: str, headers: Headers, destination: str, routing_key: str, correlation_id: str | None
) -> dict[str, AttributeValue]:
    attributes = {
        "messaging.system": "rabbitmq",
        "messaging.destination.name": destination,
        "messaging.rabbitmq.destination.routing_key": routing_key,
        "messaging.message.id": str(headers.get("id") or ""),
        "messaging.message.conversation_id": correlation_id,
    }
    return {name: value for name, value in attributes.items() if value} | _task_attributes(task, headers)


def _task_attributes(task: str, headers: Headers) -> dict[str, AttributeValue]:
    return {"amqtask.task.name": task, "amqtask.task.id": str(headers.get("id") or "")}


def _fail(span: Span, error: BaseException, *, is_expected: bool = False) -> None:
    span.record_exception(error)
    if not is_expected:
        span.set_attribute("error.type", _error_type(error))
        span.set_status(Status(StatusCode.ERROR, str(error)))


def _error_type(error: BaseException) -> str:
    return f"{type(error).__module__}.{type(error).__qualname__}"


class _Headers(Getter[Mapping[str, Any]]):
    """Reads trace context from headers; anybody may have written them, so what is no text is not read."""

    def get(self, carrier: Headers, key: str) -> list[str] | None:
        header = carrier.get(key)
        return [header] if isinstance(header, str) else None

    def keys(self, carrier: Headers) -> list[str]:
        return list(carrier)


_HEADERS = _Headers()
