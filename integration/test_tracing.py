"""Traces over processes: what a producer began goes on in a worker's slots, in every pool."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from amqtask import AmqTask
from integration.conftest import Broker
from integration.waiting import PATIENT
from integration.workers import WorkerProcess, eventually

TRACED = "integration.apps.traced"
TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"


@pytest.fixture
def app(rabbit: Broker) -> Iterator[AmqTask]:
    """A producer of another kind, which writes the W3C header by itself."""
    with AmqTask("client", broker=rabbit.url, backend="rpc://", **PATIENT) as made:
        yield made


def spans_in(path: Path) -> dict[str, dict[str, Any]]:
    """By name, and by task where several have the same; of several tries the last, whichever process wrote first."""
    found = sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda span: span["start_time"])
    return {f"{span['name']} {span['attributes'].get('amqtask.task.name', '')}".strip(): span for span in found}


@pytest.mark.parametrize("pool", ["solo", "threads", "prefork", "prefork in children", "eventlet", "gevent", "asyncio"])
def test_a_trace_goes_on_in_the_worker(rabbit: Broker, app: AmqTask, tmp_path: Path, pool: str) -> None:
    queue, file = rabbit.queue("traced"), tmp_path / "spans"
    environment = {"TRACED_SPANS": str(file)}
    name, _, in_children = pool.partition(" ")
    if in_children:
        environment["TRACED_IN_CHILDREN"] = "1"
    headers = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
    with WorkerProcess(TRACED, "-Q", queue, "-P", name, "-c", "2", environment=environment) as worker:
        app.send_task("traced.coroutine", queue=queue, headers=headers).get(timeout=90)
        app.send_task("traced.outer", (queue,), queue=queue, headers=headers).get(timeout=90)
        worker.await_log("succeeded in")
        eventually(
            lambda: "traced.inner" in worker.log and worker.log.count("succeeded in") == 3, what=lambda: worker.log
        )
        assert worker.stop() == 0

    spans = spans_in(file)
    assert {span["context"]["trace_id"] for span in spans.values()} == {f"0x{TRACE}"}
    line = [f"process {queue} traced.outer", "inside outer", f"publish {queue} traced.inner"]
    parents = {name: span["parent_id"] for name, span in spans.items()}
    ids = {name: span["context"]["span_id"] for name, span in spans.items()}
    assert [parents[name] for name in line] == [f"0x{CALLER}", ids[line[0]], ids[line[1]]]
    assert parents[f"process {queue} traced.coroutine"] == f"0x{CALLER}"
    assert parents["inside coroutine"] == ids[f"process {queue} traced.coroutine"]
    again = spans[f"process {queue} traced.inner"]
    assert again["parent_id"] == ids[f"create {queue} traced.inner"]
    assert again["attributes"]["amqtask.task.retries"] == 1


def test_opentelemetry_instrument_finds_us() -> None:
    program = "from amqtask import signals; print(bool(signals.task_prerun), bool(signals.before_task_publish))"
    command = [str(Path(sys.executable).with_name("opentelemetry-instrument")), sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    assert done.stdout.strip() == "True True", done.stderr
