"""Tasks that fork processes or leave threads, and tasks that wait meanwhile."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from pathlib import Path

from amqtask import AmqTask

app = AmqTask("forking", backend="rpc://")


def _note(file: str, text: str) -> None:
    with Path(file).open("a") as lines:
        lines.write(text + "\n")


def _wait_for(file: str) -> None:
    while not Path(file).exists():
        time.sleep(0.01)


@app.task
def wait(folder: str, number: int) -> int:
    """Wait for `go`, then write the process that did."""
    _note(f"{folder}/began", str(number))
    _wait_for(f"{folder}/go")
    _note(f"{folder}/went", f"{number} {os.getpid()}")
    return number


def _fork(folder: str) -> int:
    """A process that waits for `end`: with os.fork, because eventlet's locks keep processes of multiprocessing from ending."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            _note(f"{folder}/forked", str(os.getpid()))
            _wait_for(f"{folder}/end")
            code = 0
        finally:
            os._exit(code)
    return pid


@app.task
def fork(folder: str) -> int:
    """Return the exit code of a forked process."""
    _, status = os.waitpid(_fork(folder), 0)
    return os.waitstatus_to_exitcode(status)


@app.task
async def fork_in_coroutine(folder: str) -> int:
    """The same in a coroutine."""
    pid = _fork(folder)
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        await asyncio.sleep(0.01)


@app.task
def leave_a_thread() -> None:
    """Start a thread that Python waits for when the process ends."""
    threading.Thread(target=time.sleep, args=(1000,), name="left").start()
