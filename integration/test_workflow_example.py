"""examples/workflows prints what docs/workflows.md promises."""

from __future__ import annotations

import sys

from integration.conftest import Broker
from integration.workers import run_session

PRINTED = """\
chain: 5 words
group: [5, 6, 1]
chord: 12
group, task, group: ['12 words', '12 mots']
map: [5, 6, 1]
chunks: [[5, 6], [1]]
replaced: 11 words
error: KeyError('four')
"""


def test_the_example_prints_what_it_should(rabbit: Broker) -> None:
    code, printed, said = run_session([sys.executable, "-m", "examples.workflows"])

    assert code == 0, said
    assert printed == PRINTED
