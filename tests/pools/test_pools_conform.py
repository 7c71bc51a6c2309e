"""Every registered pool keeps the contract; those that patch Python do it in a process of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from amqtask.testing.suites.pool import PoolSuite

GREEN = ("eventlet", "gevent")


@pytest.fixture(scope="module", autouse=True)
def green_suites() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """The suite's runs for the green pools, which wait most of their time: they go on beside the tests of this module."""
    with ExitStack() as stack:
        runs = {}
        for name in GREEN:
            command = [sys.executable, "-m", "amqtask.testing.check_pool", name, "-q"]
            runs[name] = stack.enter_context(
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            )
            stack.callback(runs[name].kill)
        yield runs


class TestSolo(PoolSuite):
    pool_name = "solo"


class TestThreads(PoolSuite):
    pool_name = "threads"


class TestAsyncio(PoolSuite):
    pool_name = "asyncio"


class TestPrefork(PoolSuite):
    pool_name = "prefork"


@pytest.mark.parametrize("name", GREEN)
def test_a_green_pool_conforms_in_a_patched_process(green_suites: dict[str, subprocess.Popen[str]], name: str) -> None:
    said, _ = green_suites[name].communicate(timeout=240)

    assert green_suites[name].returncode == 0, said
