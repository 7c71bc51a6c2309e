"""Dead letters go back to work while console and worker are killed: none is lost (integration.redrive, in short)."""

from __future__ import annotations

import pytest

from integration.conftest import Broker
from integration.redrive import run


def test_no_dead_letter_is_lost_on_its_way_back_to_work(rabbit: Broker, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(rabbit.url, tasks=300, kills=2, queue=rabbit.queue("redrive"))

    with capsys.disabled():
        print(f"\n{report}")
    assert (report.lost, report.left) == (0, 0)
    assert sum(report.kills.values()) > 0
