"""Run one system's worker or client in processes of its own, and read the clock and the CPU they used."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Drained:
    """One drain of a filled queue. `boot` is seconds from the worker's start to its first task."""

    per_second: float
    cpu_us: float
    boot: float
    memory_mb: float


def client(python: str, module: str, verb: str, count: int, **environment: str) -> dict[str, float]:
    """What `python -m module verb count` prints as JSON (an empty dictionary for verbs that print nothing)."""
    done = subprocess.run(
        [python, "-W", "ignore", "-m", module, verb, str(count)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        timeout=300,
    )
    lines = done.stdout.strip().splitlines()
    found: dict[str, float] = json.loads(lines[-1]) if lines else {}
    return found


@contextmanager
def worker(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A worker in a session of its own, killed with everything it started."""
    quiet = None if os.environ.get("BENCH_VERBOSE") else subprocess.DEVNULL
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        start_new_session=True,
        stdout=quiet,
        stderr=quiet,
    )
    try:
        yield process
    finally:
        for signum in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, signum)
                process.wait(timeout=10)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def drain(command: Sequence[str], count: int, *, timeout: float = 120.0, **environment: str) -> Drained:
    """Start the worker on its filled queue and wait for the last task's mark."""
    with tempfile.TemporaryDirectory(prefix="amqtask-bench-") as folder:
        started = time.time()
        with worker(command, {**environment, "BENCH_MARKS": folder}) as process:
            first = _await_mark(Path(folder) / "first", process, timeout)
            cpu = _session_cpu(process.pid)
            last = _await_mark(Path(folder) / "last", process, timeout)
            cpu = _session_cpu(process.pid) - cpu
            memory = session_memory(process.pid)
    return Drained(count / (last - first), cpu / count * 1e6, first - started, memory)


def _await_mark(path: Path, process: subprocess.Popen[bytes], timeout: float) -> float:
    deadline = time.monotonic() + timeout
    while not path.exists():
        if process.poll() is not None:
            raise RuntimeError(f"{process.args} ended with exit code {process.returncode}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"{process.args} did not get there within {timeout:g} s")
        time.sleep(0.01)
    return float(path.read_text())


def _session(leader: int) -> Iterator[tuple[int, list[str]]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == leader:
                yield int(entry.name), fields


def _session_cpu(leader: int) -> float:
    return sum((int(fields[11]) + int(fields[12])) / TICK for _, fields in _session(leader))


def session_memory(leader: int) -> float:
    """The proportional set size of a session's processes, in MiB."""
    total = 0.0
    for pid, _ in _session(leader):
        try:
            lines = (Path("/proc") / str(pid) / "smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
    return total
