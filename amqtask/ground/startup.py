"""What a command does before it imports anything else: usable streams, the pool it names, no garbage collection meanwhile."""

from __future__ import annotations

import gc
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

# In the environment of a worker that `--reload` has started: the number of the socket over which it gets its orders.
RELOADED = "_AMQTASK_RELOAD"
# In the environment of what `amqtask dev` has started: which part of it this process is.
DEV_PART = "_AMQTASK_DEV_PART"


def pool_on_command_line(argv: Sequence[str]) -> str | None:
    """The pool named by -P, --pool or AMQTASK_POOL, or for a shell by --eventlet or --gevent; None when nothing names one
    or neither a worker nor a shell is started. The process that watches files (`--reload`) has no pool, its children have."""
    if "shell" in argv:
        return next((argument[2:] for argument in argv if argument in ("--eventlet", "--gevent")), None)
    is_worker = "worker" in argv or ("dev" in argv and os.environ.get(DEV_PART) == "worker")
    if not is_worker or ("--reload" in argv and RELOADED not in os.environ):
        return None
    for position, argument in enumerate(argv):
        if argument == "--":
            break
        if argument in ("-P", "--pool"):
            return argv[position + 1] if position + 1 < len(argv) else None
        if argument.startswith("--pool="):
            return argument[len("--pool=") :]
        if argument.startswith("-P") and not argument.startswith("--"):
            return argument[2:]
    return os.environ.get("AMQTASK_POOL")


# -- The garbage collector while a program begins.


@contextmanager
def no_collection() -> Iterator[None]:
    """For a block that imports much: without the collector, which would look at all of it again and again, and find nothing.

    What is there afterwards stays for as long as the process, so the collector never looks at it again (`gc.freeze`).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


# -- Standard input, output and error as commands need them, whatever started the process.


def make_usable() -> None:
    """A stream that is closed (`2>&-`) becomes the null device: its number would be the next socket's, and every print an error.
    What the terminal's encoding has no character for is printed as an escape."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest free number, which may be this one
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            null_stream = open(os.devnull, "r" if name == "stdin" else "w")  # noqa: SIM115 - until the process ends
            setattr(sys, name, null_stream)
            setattr(sys, f"__{name}__", null_stream)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
