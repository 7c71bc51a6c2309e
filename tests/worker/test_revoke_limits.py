"""How much is remembered of what was revoked: Celery's variables in the environment."""

from __future__ import annotations

import pytest

from amqtask import AmqTask
from amqtask.assembly import build_worker
from amqtask.exceptions import ConfigurationError
from amqtask.worker.options import WorkerOptions

MOST, EXPIRES = "CELERY_WORKER_REVOKES_MAX", "CELERY_WORKER_REVOKE_EXPIRES"


def limits() -> tuple[int, float | None]:
    """What a worker is told."""
    app = AmqTask("limits", broker="memory://", set_as_current=False)
    worker = build_worker(app, WorkerOptions(pool="solo", hostname="w@h"))
    worker.loop.close()
    return worker.setup.revokes_max, worker.setup.revoke_expires


def test_celery_s_variables_count(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (MOST, EXPIRES):
        monkeypatch.delenv(name, raising=False)
    assert limits() == (50_000, None)

    monkeypatch.setenv(MOST, "5")
    monkeypatch.setenv(EXPIRES, "1.5")

    assert limits() == (5, 1.5)


@pytest.mark.parametrize("name", [MOST, EXPIRES])
@pytest.mark.parametrize("value", ["many", "-1", "0"])
def test_what_is_no_number_above_zero_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)

    with pytest.raises(ConfigurationError, match=name):
        limits()
