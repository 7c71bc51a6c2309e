"""`python -m amqtask.testing.check_pool NAME [pytest options]`: the suite for one pool, in a process that it prepared."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from amqtask.pool import find_pool

SUITE = Path(__file__).parent / "suites" / "pool.py"


def main(arguments: Sequence[str]) -> int:
    """Patch first, then import pytest and everything else; the exit code is pytest's."""
    name, *options = arguments
    find_pool(name).prepare_process()
    os.environ["AMQTASK_SUITE_POOL"] = name
    import pytest

    plain = ["-c", os.devnull, "--rootdir", str(SUITE.parent), "-p", "no:cacheprovider", "--import-mode=importlib"]
    collect = ["-o", "python_files=pool.py", "-o", "python_classes=PoolSuite", str(SUITE)]
    return int(pytest.main([*plain, *options, *collect]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
