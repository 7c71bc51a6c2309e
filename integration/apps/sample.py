"""Tasks that behave well or badly in the ways that the tests ask for."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from amqtask import AmqTask, Broadcast, Queue
from amqtask.exceptions import Reject
from integration.waiting import PATIENT

app = AmqTask("sample", backend=os.environ.get("SAMPLE_BACKEND", "rpc://"))
app.conf.update(PATIENT)
app.conf.task_default_queue = os.environ.get("SAMPLE_QUEUE", "sample")
app.conf.worker_direct = bool(os.environ.get("SAMPLE_DIRECT"))
app.conf.worker_pool_restarts = bool(os.environ.get("SAMPLE_POOL_RESTARTS"))
if "SAMPLE_HISTORY" in os.environ:
    # The name of the queue in which events are kept, and where the index is.
    app.conf.task_history = True
    app.conf.history_queue, _, app.conf.history_url = os.environ["SAMPLE_HISTORY"].partition("|")
    app.conf.event_exchange = f"{app.conf.history_queue}.events"
    app.conf.history_queue_type = os.environ.get("SAMPLE_HISTORY_TYPE", "stream")
    app.conf.task_history_arguments = bool(os.environ.get("SAMPLE_HISTORY_ARGUMENTS"))
if "SAMPLE_DELAYS" in os.environ:
    app.conf.task_delay_prefix = os.environ["SAMPLE_DELAYS"]
if "SAMPLE_BROADCAST" in os.environ:
    app.conf.task_queues = [Broadcast(os.environ["SAMPLE_BROADCAST"]), Queue(app.conf.task_default_queue)]


@app.task(name="sample.add")
def add(x: int, y: int) -> int:
    """The one that everybody knows."""
    return x + y


@app.task(name="sample.add_async")
async def add_async(x: int, y: int) -> int:
    """The same, as a coroutine."""
    await asyncio.sleep(0)
    return x + y


@app.task(name="sample.check_mail")
def check_mail(address: str, number: int) -> str:
    """What a task that sends mail does, but for the mail."""
    if not address.endswith("@example.org"):
        raise ValueError(f"no server takes mail for {address.rpartition('@')[2]}")
    return f"{number} to {address}"


@app.task(name="sample.leave")
def leave(path: str, text: str = "ran") -> None:
    """Append a line to a file."""
    with Path(path).open("a") as file:
        file.write(f"{text}\n")


@app.task(name="sample.leave_at")
def leave_at(path: str) -> None:
    """Append the present time to a file."""
    with Path(path).open("a") as file:
        file.write(f"{time.time():.3f}\n")


@app.task(name="sample.wait_for")
def wait_for(started: str, release: str) -> str:
    """Say that it runs, then wait until a file appears."""
    Path(started).touch()
    while not Path(release).exists():
        time.sleep(0.01)
    return "released"


@app.task(name="sample.wait_until_cancelled", bind=True)
def wait_until_cancelled(self: Any, started: str) -> str:
    """Say that it runs, then wait until it is cancelled."""
    Path(started).touch()
    while not self.is_cancelled():
        time.sleep(0.01)
    return "cancelled"


@app.task(name="sample.fail")
def fail(message: str) -> None:
    """An ordinary error."""
    raise ValueError(message)


class Unpicklable(Exception):
    """Carries something that no serializer takes, and cannot be built from its args."""

    def __init__(self, first: str, second: object) -> None:
        super().__init__(first)
        self.lock = second


@app.task(name="sample.fail_unpicklable")
def fail_unpicklable() -> None:
    """An error that can't be pickled."""
    raise Unpicklable("no pickle for this", lambda: None)


@app.task(name="sample.unencodable")
def unencodable() -> Any:
    """A result that JSON can't say."""
    return {1, 2, 3}


@app.task(name="sample.retry", bind=True, max_retries=3, default_retry_delay=1)
def retry(self: Any, path: str, succeed_at: int) -> int:
    """Fails until its `succeed_at`-th retry."""
    with Path(path).open("a") as file:
        file.write(f"{self.request.retries}\n")
    if self.request.retries < succeed_at:
        raise self.retry(exc=RuntimeError("not yet"))
    return int(self.request.retries)


@app.task(name="sample.exit")
def exit_process(code: int) -> None:
    """What a library that calls sys.exit does."""
    sys.exit(code)


@app.task(name="sample.exit_hard")
def exit_hard(path: str) -> None:
    """Takes the process with it each time, without a word."""
    with Path(path).open("a") as file:
        file.write("ran\n")
    os._exit(3)


@app.task(name="sample.segfault")
def segfault(path: str) -> None:
    """A broken C extension."""
    with Path(path).open("a") as file:
        file.write("ran\n")
    ctypes.string_at(0)


@app.task(name="sample.eat_memory")
def eat_memory(mebibytes: int) -> int:
    """Grows, and gives nothing back."""
    _eaten.append(bytearray(mebibytes << 20))
    return os.getpid()


_eaten: list[bytearray] = []


@app.task(name="sample.pid")
def pid() -> int:
    """Who runs it."""
    return os.getpid()


@app.task(name="sample.reject")
def reject(started: str = "", release: str = "") -> None:
    """Wants to be dead-lettered, once it is released."""
    if started:
        wait_for(started, release)
    raise Reject("not for me", requeue=False)


@app.task(name="sample.kill_self")
def kill_self(path: str) -> None:
    """What the kernel's out-of-memory killer does."""
    with Path(path).open("a") as file:
        file.write("ran\n")
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(name="sample.limited", rate_limit="2/s")
def limited(path: str) -> None:
    """At most two a second."""
    with Path(path).open("a") as file:
        file.write(f"{time.time():.3f}\n")
