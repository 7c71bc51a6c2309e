"""Run it: `python -m examples.periodic` with a broker in AMQTASK_BROKER_URL (or on this machine)."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import IO

AMQTASK = [sys.executable, "-m", "amqtask", "-q", "-A", "examples.periodic.tasks"]


def start(stack: ExitStack, *words: str, stdout: int | None = None) -> subprocess.Popen[str]:
    """A process that ends with this one."""
    process = subprocess.Popen([*AMQTASK, *words], stdout=stdout, text=True, start_new_session=True)
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


def next_runs(lines: IO[str], count: int, seen: list[datetime]) -> str:
    """The next so many due times, in seconds from the first of all."""
    found = []
    while len(found) < count:
        due = datetime.fromisoformat(lines.readline().strip())
        if due not in seen:  # a leader that dies at the wrong moment leaves one that runs twice
            seen.append(due)
            found.append(f"{(due - seen[0]).total_seconds():g} s")
    return ", ".join(found)


def main() -> int:
    """Two beats and a worker; the beat that sends is killed."""
    seen: list[datetime] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        worker = start(stack, "worker", "-P", "solo", "-l", "CRITICAL", stdout=subprocess.PIPE)
        assert worker.stdout is not None
        first = start(stack, "beat", "-s", str(folder / "first"), "-l", "CRITICAL")
        print("the first beat sends what is due after", next_runs(worker.stdout, 3, seen))
        start(stack, "beat", "-s", str(folder / "second"), "-l", "CRITICAL")
        print("there are two, still one sends:", next_runs(worker.stdout, 2, seen))
        first.kill()
        print("the first is killed, the second goes on:", next_runs(worker.stdout, 3, seen))
    return 0


if __name__ == "__main__":
    sys.exit(main())
