"""examples/workflows prints what docs/workflows.md promises."""

from __future__ import annotations

import subprocess
import sys

from integration.conftest import Broker
from integration.workers import ROOT

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
    done = subprocess.run(
        [sys.executable, "-m", "examples.workflows"], cwd=ROOT, capture_output=True, text=True, timeout=90, check=False
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout == PRINTED
