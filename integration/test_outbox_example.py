"""examples/outbox ships what was ordered, and nothing else."""

from __future__ import annotations

import sys

from integration.conftest import Broker
from integration.workers import run_session

PRINTED = """\
sold out: pears
calls in the outbox: 2
2 messages published, 0 failed
shipped: 3 apples, 7 plums
"""


def test_the_example_prints_what_it_should(rabbit: Broker) -> None:
    code, printed, said = run_session([sys.executable, "-m", "examples.outbox"])

    assert code == 0, said
    assert printed == PRINTED
