"""A worker that is process 1 waits for the orphans that the kernel gives it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from amqtask.worker import lifecycle
from amqtask.worker.lifecycle import Orphans


def is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def zombie() -> int:
    """A child that has ended, and that nobody has waited for."""
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return pid


def test_a_zombie_that_nobody_waits_for_is_buried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "ZOMBIE_SECONDS", 0.0)
    pid = zombie()

    Orphans().reap()

    assert not is_there(pid)


def test_one_that_has_just_ended_is_left_to_whoever_waits_for_it() -> None:
    pid = zombie()

    Orphans().reap()

    assert is_there(pid)
    os.waitpid(pid, 0)
