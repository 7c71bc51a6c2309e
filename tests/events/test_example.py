"""examples/events does what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# Producers, tasks and workers tell by themselves, so these may come in another order.
EVENTS = """\
  resize  task-sent
  upload  task-sent
  resize  task-received
  resize  task-started
  resize  task-progress  {'done': 1, 'of': 2}
  resize  task-progress  {'done': 2, 'of': 2}
  resize  task-succeeded {'result': "'2 pictures'"}
  upload  task-received
  upload  task-started
  upload  task-failed    {'exception': "ConnectionError('nobody takes cat.jpg')"}
"""
STATE = """\
  resize  SUCCESS  {'args': '(2,)', 'result': "'2 pictures'"}
  upload  FAILURE  {'args': "('cat.jpg',)", 'exception': "ConnectionError('nobody takes cat.jpg')"}
  workers: 1, types: ['resize', 'upload']
"""


def test_the_example_prints_what_happened() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "examples.events"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )

    assert done.returncode == 0, done.stderr
    events, _, state = done.stdout.partition("state:\n")
    assert sorted(events.removeprefix("events:\n").splitlines()) == sorted(EVENTS.splitlines())
    assert state == STATE
