"""A prefork pool on a plain loop, with tasks that end their process, or fill it, or wait."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import faulthandler
import json
import mmap
import os
import pickle
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import billiard

from amqtask import states
from amqtask.exceptions import SoftTimeLimitExceeded
from amqtask.execution.executor import Executor
from amqtask.execution.request import Outcome, Request
from amqtask.ground.processes import POOL_INDEX
from amqtask.pool import PoolOptions
from amqtask.testing.loop import PlainLoop
from amqtask.testing.tasks import POOL_TASKS, PlainTask, make_executor, request
from amqtask_pools.prefork import PreforkPool

PATIENCE = 60.0


def pid() -> int:
    return os.getpid()


def index() -> tuple[int, int]:
    """The number of the process in its pool, as we and as users of billiard know it."""
    return POOL_INDEX[0], billiard.current_process().index


def kill_self(signum: int) -> None:
    os.kill(os.getpid(), signum)
    time.sleep(10)


def exit_hard(code: int) -> None:
    os._exit(code)


def segfault() -> None:
    faulthandler.disable()  # pytest's
    ctypes.string_at(0)


def echo(text: str) -> str:
    return text


def pause(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def use_memory(mebibytes: int) -> int:
    """Returns the process id; what it used stays in use."""
    KEPT.append(mmap.mmap(-1, mebibytes << 20))
    KEPT[-1].write(b"x" * (mebibytes << 20))
    return os.getpid()


KEPT: list[mmap.mmap] = []


def fill_memory() -> None:
    hoard = []
    while True:
        hoard.append(bytearray(16 << 20))


def swallow_soft_limit(folder: str) -> None:
    while True:
        try:
            time.sleep(30)
        except SoftTimeLimitExceeded:
            (Path(folder) / "swallowed").touch()


async def block_the_loop() -> list[str]:
    """Coroutines that call what blocks, as people do."""

    async def blocks() -> str:
        time.sleep(60)
        return "slept"

    try:
        return list(await asyncio.gather(blocks(), blocks()))
    except SoftTimeLimitExceeded:
        return ["cleaned up"]


def write_rubbish(kind: str) -> None:
    """To each packet socket that this process has."""
    packets = {
        "noise": [b"rubbish", pickle.dumps(Rubbish())],
        "empty": [b""],
        "pieces": [b"\x01some", b"\x02rubbish"],
        "ready": [b"\x03", b"\x03"],
        "answers": [b"\x05\x00\x00\x00\x04[[1]", b"\x05"],
    }
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(number))) as pipe:
            if pipe.family == socket.AF_UNIX and pipe.type == socket.SOCK_SEQPACKET:
                for packet in packets[kind]:
                    pipe.send(packet)
    time.sleep(60)


class Rubbish:
    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (99,)


def leave_a_process_behind(folder: str) -> None:
    """A daemon that inherits every descriptor, and then the end."""
    if os.fork() == 0:
        os.setsid()
        while not (Path(folder) / "go").exists():
            time.sleep(0.01)
        os._exit(0)
    os._exit(7)


def ignore_sigterm(folder: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (Path(folder) / "ignoring").touch()
    time.sleep(30)


def note_signals(folder: str) -> None:
    """Writes down the first signal that it gets, and ends with it."""

    def note(signum: int, frame: object) -> None:
        (Path(folder) / "signal").write_text(str(signum))
        os._exit(1)

    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGQUIT):
        signal.signal(signum, note)
    (Path(folder) / "noting").touch()
    time.sleep(30)


TASKS = (
    *POOL_TASKS,
    *(
        PlainTask(function)
        for function in (
            index, note_signals, pid, kill_self, write_rubbish, exit_hard, segfault, echo, pause, use_memory, fill_memory,
            swallow_soft_limit, leave_a_process_behind, ignore_sigterm, block_the_loop,
        )
    ),
)  # fmt: skip


class Prefork:
    """`with Prefork(slots) as pool: …`; fed as the worker's dispatcher feeds it, only while `free` > 0."""

    def __init__(
        self,
        slots: int = 2,
        *,
        tasks: Sequence[PlainTask] = TASKS,
        executor: Executor | None = None,
        **options: Any,
    ) -> None:
        self.loop = PlainLoop()
        self.outcomes: dict[int, Outcome] = {}
        self.order: list[int] = []
        self._waiting: list[Request] = []
        self._numbers = 0
        self.pool = PreforkPool(
            executor or make_executor(*tasks),
            self.loop,
            self._take,
            PoolOptions(slots=slots, hostname="tests@here", **options),
        )
        self.pool.start()

    def __enter__(self) -> Prefork:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pids = self.pids
        self.pool.stop()
        self.loop.close()
        assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []

    @property
    def pids(self) -> list[int]:
        pids: list[int] = self.pool.stats()["processes"]
        return pids

    def submit(self, task: str, *args: Any, **options: Any) -> int:
        self._numbers += 1
        return self.submit_request(request(self._numbers, task, *args, **options))

    def submit_request(self, found: Request) -> int:
        self._waiting.append(found)
        self.loop.call_soon(self._feed)
        return found.number

    def _feed(self) -> None:
        while self._waiting and self.pool.free > 0:
            self.pool.submit(self._waiting.pop(0))

    def _take(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            assert outcome.number not in self.outcomes, f"a second outcome of {outcome.number}"
            self.outcomes[outcome.number] = outcome
            self.order.append(outcome.number)
        self.loop.call_soon(self._feed)

    def until(self, predicate: Callable[[], object]) -> None:
        self.loop.run_until(predicate, PATIENCE)

    def outcome(self, number: int) -> Outcome:
        self.until(lambda: number in self.outcomes)
        return self.outcomes[number]

    def value(self, number: int) -> Any:
        outcome = self.outcome(number)
        assert outcome.state == states.SUCCESS, outcome
        assert outcome.result is not None
        return json.loads(outcome.result.body)["result"]

    def look_ahead(self) -> None:
        """Run short tasks until the pool gives them out ahead of time."""
        for _ in range(20):
            for number in [self.submit("add", n, n) for n in range(50)]:
                self.outcome(number)
            if self.pool.free > self.pool.slots:
                return
        raise AssertionError("the pool does not look ahead")
