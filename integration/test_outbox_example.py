"""examples/outbox ships what was ordered, and nothing else."""

from __future__ import annotations

import subprocess
import sys

from integration.conftest import Broker
from integration.workers import ROOT

PRINTED = """\
sold out: pears
calls in the outbox: 2
2 messages published, 0 failed
shipped: 3 apples, 7 plums
"""


def test_the_example_prints_what_it_should(rabbit: Broker) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "examples.outbox"], cwd=ROOT, capture_output=True, text=True, timeout=90, check=False
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout == PRINTED
