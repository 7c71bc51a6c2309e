"""Every composition on a Redis broker; and a chord without a result store, whose parts are counted in the broker's Redis."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from amqtask import AmqTask, chord, group
from amqtask.testing.suites.compositions import COMPOSITIONS, ERRORS, Tasks, define
from integration.waiting import PATIENT
from integration.workers import WorkerProcess, eventually

APP, SAMPLE = "integration.apps.flows", "integration.apps.sample"


@pytest.fixture(scope="module", params=["prefork", "gevent"])
def worked(request: pytest.FixtureRequest, redis_url: str) -> Iterator[Tasks]:
    """Tasks that a worker process runs."""
    queue = f"flows-{request.param}-{uuid.uuid4().hex[:8]}"
    environment = {"FLOWS_BACKEND": redis_url, "FLOWS_QUEUE": queue, "AMQTASK_BROKER_URL": redis_url}
    app = define(AmqTask("client", broker=redis_url, backend=redis_url, **PATIENT))
    app.conf.update(task_default_queue=queue)
    with WorkerProcess(APP, "-Q", queue, "-P", request.param, "-c", "4", environment=environment):
        yield Tasks(app)
    app.close()


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_a_composition_gives_its_value(worked: Tasks, name: str) -> None:
    build, value = COMPOSITIONS[name]

    assert build(worked).apply_async().get(timeout=90) == value


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_the_result(worked: Tasks, name: str) -> None:
    build, kind = ERRORS[name]

    with pytest.raises(kind, match="as told"):
        build(worked).apply_async().get(timeout=90)


def test_a_group_of_many_is_collected(worked: Tasks) -> None:
    result = group(worked.add.s(n, n) for n in range(2000)).apply_async()

    assert result.get(timeout=90) == [2 * n for n in range(2000)]


def test_a_chord_needs_no_result_store(redis_url: str, tmp_path: Path) -> None:
    queue, file = f"chord-{uuid.uuid4().hex[:8]}", str(tmp_path / "called")
    environment = {"AMQTASK_BROKER_URL": redis_url, "SAMPLE_BACKEND": "disabled://", "SAMPLE_QUEUE": queue}
    app = AmqTask("client", broker=redis_url, task_default_queue=queue, **PATIENT)

    def leave(text: str) -> Any:
        return app.signature("sample.leave", (file, text), immutable=True)

    with WorkerProcess(SAMPLE, "-Q", queue, "-c", "2", environment=environment), app:
        chord([leave(f"part-{number}") for number in range(5)], leave("body")).apply_async()
        eventually(lambda: Path(file).exists() and "body" in Path(file).read_text())

    assert sorted(Path(file).read_text().split()) == ["body", *(f"part-{number}" for number in range(5))]
