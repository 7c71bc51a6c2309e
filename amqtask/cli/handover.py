"""The child's end of `--reload`: a process that waits before it imports the project, and once more before it begins to work.

It is told by the one that started it, over a socket whose number is in the environment; see amqtask.cli.reload.
"""

from __future__ import annotations

import os
import signal
import sys

from amqtask.ground.plugins import load
from amqtask.ground.startup import RELOADED

# Orders to the child, and what it says.
LOAD, GO, LOADED = b"load\n", b"go\n", b"loaded\n"

# In the environment of all but the first that works.
REPEATED = "_AMQTASK_RELOAD_REPEATED"

# What a worker imports when it begins, and may as well have imported before: none of it looks at the project.
_EARLY = (
    "amqtask.cli.find_app",
    "amqtask.backends.rpc",
    "amqtask.beat.build",
    "amqtask.remote.control",
    "amqtask.transport.collector",
    "amqtask.transport.consumer",
    "amqtask.transport.loop_publisher",
    "amqtask.transport.publisher",
    "amqtask.transport.admin",
)


def is_child() -> bool:
    """Whether this process waits for orders, or has followed them."""
    return RELOADED in os.environ


def is_repeated() -> bool:
    """Whether one like this process was here before it, and has said what there is to say."""
    return REPEATED in os.environ


def await_load() -> None:
    """Before the project's code is imported. Returns at once in a process that nobody gives orders to."""
    if os.environ.get(RELOADED):
        load("amqtask.ground.processes").signal_at_parents_end(signal.SIGTERM)
        for module in _EARLY:
            load(module)
        _await(LOAD)


def await_go() -> None:
    """The project is imported: say so, and wait for the process before this one to end."""
    if os.environ.get(RELOADED):
        number = int(os.environ[RELOADED])
        os.write(number, LOADED)
        _await(GO)
        os.close(number)
        # For what this process starts, and for itself should it start anew (SIGHUP). Empty: it still is such a child.
        os.environ[RELOADED] = ""


def _await(order: bytes) -> None:
    # Ctrl-C reaches all processes of a terminal; this one has nothing to finish, and its parent ends it.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    got = b""
    while not got.endswith(b"\n"):
        byte = os.read(int(os.environ[RELOADED]), 1)
        if not byte:
            sys.exit(0)  # the parent is gone
        got += byte
    assert got == order, got
    signal.signal(signal.SIGINT, handler)
