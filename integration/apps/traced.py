"""Tasks whose spans are written to a file, one a line."""

from __future__ import annotations

import os

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

from amqtask import AmqTask
from amqtask.contrib.opentelemetry import AmqTaskInstrumentor
from amqtask.signals import worker_process_init

app = AmqTask("traced", backend="rpc://")
AmqTaskInstrumentor().instrument()


def trace_to_file() -> None:
    """Batches that leave after a minute, or when the process ends."""
    provider = TracerProvider()
    out = open(os.environ["TRACED_SPANS"], "a", buffering=1)  # noqa: SIM115 - open for the process's life
    exporter = ConsoleSpanExporter(out=out, formatter=lambda span: span.to_json(indent=None) + "\n")
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=60_000))
    trace.set_tracer_provider(provider)


if "TRACED_IN_CHILDREN" in os.environ:

    def init_child(**_: object) -> None:
        """As exporters want it that do not survive a fork."""
        trace_to_file()

    worker_process_init.connect(init_child)

else:
    trace_to_file()


@app.task(name="traced.outer")
def outer(queue: str) -> None:
    """Calls another task."""
    with trace.get_tracer("its own").start_as_current_span("inside outer"):
        inner.apply_async(queue=queue)


@app.task(name="traced.inner", bind=True, default_retry_delay=0)
def inner(self) -> str:  # type: ignore[no-untyped-def]
    """Needs two tries."""
    if not self.request.retries:
        raise self.retry()
    return "done"


@app.task(name="traced.coroutine")
async def coroutine() -> None:
    """An async one."""
    with trace.get_tracer("its own").start_as_current_span("inside coroutine"):
        pass
