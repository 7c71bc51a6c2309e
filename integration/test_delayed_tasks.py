"""Tasks with an ETA wait in the broker, whatever their number (integration.delayed runs the full-size check)."""

from __future__ import annotations

import pytest

from integration import delayed
from integration.conftest import Broker


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_delayed_tasks_run_after_their_eta_and_leave_the_workers_memory_flat(
    rabbit: Broker, capsys: pytest.CaptureFixture[str]
) -> None:
    lateness = delayed.run(rabbit.url, rabbit.queue("delayed"), tasks=10_000, ahead=10, spread=15)

    with capsys.disabled():
        print(f"\n{lateness}")
    assert lateness.ran == lateness.tasks
    assert lateness.earliest >= 0
    assert lateness.memory_peak < lateness.memory_before * 1.2 + 10_000
