"""`make test` after the checks: unit tests, then integration tests, then the coverage of both."""

from __future__ import annotations

import compileall
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Run everything even if the first part fails; the exit code says whether all passed."""
    # Thousands of processes begin in these tests. Under PYTHONDONTWRITEBYTECODE each would compile all modules again.
    for folder in ("amqtask", "pools", "integration"):
        compileall.compile_dir(ROOT / folder, quiet=1)
    coverage = [sys.executable, "-m", "coverage"]
    subprocess.run([*coverage, "erase"], cwd=ROOT, check=True)
    tests = [*coverage, "run", "-m", "pytest", "-q", "-ra", "--durations=40"]
    # On a fresh machine what integration tests need is installed meanwhile.
    with subprocess.Popen([sys.executable, "-m", "integration.prepare"], cwd=ROOT) as preparing:
        try:
            codes = [subprocess.run([*tests, "tests"], cwd=ROOT, check=False).returncode]
        except BaseException:
            preparing.kill()
            raise
    codes.append(subprocess.run([*tests, "integration"], cwd=ROOT, check=False).returncode)
    subprocess.run([*coverage, "combine", "-q"], cwd=ROOT, check=False)
    subprocess.run([*coverage, "report", "--skip-covered"], cwd=ROOT, check=False)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
