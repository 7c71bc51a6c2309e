"""Every registered pool keeps the contract; those that patch Python do it in a process of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from amqtask.testing.suites.pool import PoolSuite


class TestSolo(PoolSuite):
    pool_name = "solo"


class TestThreads(PoolSuite):
    pool_name = "threads"


class TestAsyncio(PoolSuite):
    pool_name = "asyncio"


class TestPrefork(PoolSuite):
    pool_name = "prefork"


@pytest.mark.parametrize("name", ["eventlet", "gevent"])
def test_a_green_pool_conforms_in_a_patched_process(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "amqtask.testing.check_pool", name, "-q"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
