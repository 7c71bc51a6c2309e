"""No limit is exceeded and nothing is done twice while workers are killed (integration.flow_soak, in short)."""

from __future__ import annotations

import pytest

from integration.flow_soak import run


def test_limits_and_unique_tasks_hold_while_workers_are_killed(
    broker_url: str, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(broker_url, redis_url, calls=600, kills=2, copies=1)

    with capsys.disabled():
        print(f"\n{report}")
    assert report.is_right
    assert report.kills == 2
