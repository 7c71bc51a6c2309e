"""`make test` after the checks: unit tests, then integration tests, then the coverage of both.

    python -m integration.run [tests] [integration]

Most of what integration tests do is to wait for brokers and processes, so two processes run them side by side, a file at a
time, each with a RabbitMQ and a Redis of its own. Where the environment or the machine gives a broker or a Redis, one runs them.
"""

from __future__ import annotations

import compileall
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from integration.machine import NodeError
from integration.nodes import PRIVATE, given_broker, install_rabbitmq

ROOT = Path(__file__).resolve().parent.parent
SIDE_BY_SIDE = 2
# Seconds after which a test that its own limit (pytest-timeout) does not end has its process ended.
STUCK = 480
REPORTED = ("-q", "-ra", "--durations=40")


def main() -> int:
    """Run everything even if the first part fails; the exit code says whether all passed."""
    parts = sys.argv[1:] or ["tests", "integration"]
    # Before anything is installed: a package may start a server.
    environment = _servers() if "integration" in parts else {}
    # Thousands of processes begin in these tests. Under PYTHONDONTWRITEBYTECODE each would compile all modules again.
    for folder in ("amqtask", "pools", "integration"):
        compileall.compile_dir(ROOT / folder, quiet=1)
    _python("coverage", "erase")
    codes = []
    with ExitStack() as stack:
        if "integration" in parts:
            stack.enter_context(_preparing())
        if "tests" in parts:
            codes.append(_python("coverage", "run", "-m", "pytest", *REPORTED, "tests"))
    if "integration" in parts:
        codes.append(_integration(environment))
    _python("coverage", "combine", "-q")
    _python("coverage", "report", "--skip-covered")
    return max(codes)


@contextmanager
def _preparing() -> Iterator[None]:
    """On a fresh machine what integration tests need is installed meanwhile."""
    with subprocess.Popen([sys.executable, "-m", "integration.prepare"], cwd=ROOT) as preparing:
        try:
            yield
        except BaseException:
            preparing.kill()
            raise


def _servers() -> dict[str, str]:
    """What tells each process to have servers of its own; empty where there are some already."""
    if given_broker() or "AMQTASK_REDIS_URL" in os.environ:
        return {}
    install_rabbitmq()
    return {PRIVATE: "1"}


def _integration(environment: dict[str, str]) -> int:
    # A file stays with one process, for its tests may share a server, or Django; in the order of names.
    processes = ["-n", str(SIDE_BY_SIDE if environment else 1), "--dist", "loadfile", "--no-loadscope-reorder"]
    # xdist tries the test once more that ended its process: with one restart, a test that always does costs 3 * STUCK at most.
    stuck = ["-o", f"faulthandler_timeout={STUCK}", "-o", "faulthandler_exit_on_timeout=true", "--max-worker-restart=1"]
    # Its own file: coverage of several processes is put together before it is joined with the others.
    measured = {**environment, "COVERAGE_FILE": ".coverage.integration"}
    return _python(
        "pytest", *REPORTED, *processes, *stuck, "--cov", "--cov-report=", "integration", environment=measured
    )


def _python(*words: str, environment: dict[str, str] | None = None) -> int:
    told = {**os.environ, **(environment or {})}
    return subprocess.run([sys.executable, "-m", *words], cwd=ROOT, env=told, check=False).returncode


if __name__ == "__main__":
    try:
        sys.exit(main())
    except NodeError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
