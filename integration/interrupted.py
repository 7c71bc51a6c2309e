"""Publishes into which exceptions are thrown at random moments: `python -m integration.interrupted [COUNT [SEED [URL]]]`.

Each exception has to come out of the call that it struck, the call to end in time, and the next one to work; with a pool of one
connection, one that gets lost shows at once. Kinds:

- signal: a signal handler raises (an alarm, a soft limit, Ctrl-C), in the main thread;
- thread: another thread raises it (PyThreadState_SetAsyncExc);
- result: a signal handler raises while a call with results (over rpc://, or in Redis) is made and its result awaited;
- nested: the handler makes a call of its own first.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import random
import signal
import sys
import threading
import time
import traceback
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

from amqtask import AmqTask
from amqtask.exceptions import OperationalError, PublishTimeout
from integration.nodes import broker
from integration.workers import WorkerProcess

# Seconds that a call has, and that it may take longer on a machine that is busy.
DEADLINE, TOLERANCE = 20.0, 5.0
KINDS = ("signal", "thread", "result", "nested")


class ThreadInterrupt(Exception):
    """What is thrown; an Exception, because those are what libraries swallow."""


class TimeStrike(TimeoutError):
    """What alarm handlers like to raise: an OSError, because those are what libraries take for the network's."""


class Break(BaseException):
    """As KeyboardInterrupt."""


STRIKES: tuple[type[BaseException], ...] = (ThreadInterrupt, TimeStrike, Break)


@dataclass
class Count:
    """What became of the calls and the exceptions."""

    calls: int = 0
    thrown: int = 0
    swallowed: int = 0
    failed: int = 0
    late: int = 0
    lost_connections: int = 0
    hung: int = 0
    error: str = ""

    @property
    def is_well(self) -> bool:
        """Whether nothing went wrong."""
        return not (self.swallowed or self.failed or self.late or self.lost_connections or self.hung)

    def __str__(self) -> str:
        return (
            f"{self.calls:7} calls {self.thrown:7} thrown {self.swallowed:3} swallowed {self.lost_connections:3} lost connections"
            f" {self.late:3} late {self.hung:3} hung {self.failed:3} failed {self.error}"
        )


class Calls:
    """An application whose publisher has one connection, and what is called with it."""

    def __init__(self, url: str, kind: str, queue: str) -> None:
        results = "rpc://" if url.startswith("amqp") else url
        self.app = AmqTask("interrupted", broker=url, backend=results if kind == "result" else None)
        self.app.conf.update(
            broker_pool_limit=1,
            broker_publish_timeout=DEADLINE,
            task_default_queue=queue,
            task_default_queue_type="classic",
            task_dead_letter=False,
        )
        self._is_awaited = kind == "result"

    def __call__(self) -> None:
        """One call."""
        result = self.app.send_task("sample.add", (1, 1), expires=60)
        if self._is_awaited:
            result.get(timeout=DEADLINE)


class Struck:
    """Runs calls one after the other and notes what comes out of them, and what was thrown in."""

    def __init__(self, call: Callable[[], None], count: Count) -> None:
        self._call = call
        self.count = count
        self.is_open = False
        # The exception that was thrown into this call; it is set before that is done.
        self.thrown: BaseException | type[BaseException] | None = None
        self.place = ""
        self.began = time.monotonic()

    def run(self, arm: Callable[[], None], await_strike: Callable[[], None]) -> None:
        """One call."""
        self.thrown = None
        self.began = time.monotonic()
        caught: BaseException | None = None
        failure: OperationalError | None = None
        try:
            self.is_open = True
            arm()
            try:
                self._call()
            except OperationalError as error:
                failure = error
            # In this order: whoever throws has first said so, and then looked whether it is open.
            self.is_open = False
            await_strike()
        except STRIKES as error:
            caught = error
        self.is_open = False
        if failure is not None:
            self.count.error = f"{type(failure).__name__}: {failure}"
            if isinstance(failure, PublishTimeout) and "in use" in str(failure):
                self.count.lost_connections += 1
            else:
                self.count.failed += 1
        self.count.calls += 1
        self.count.late += time.monotonic() - self.began > DEADLINE + TOLERANCE
        if self.thrown is not None:
            self.count.thrown += 1
            is_it = caught is self.thrown or type(caught) is self.thrown
            if not is_it:
                self.count.swallowed += 1
                thrown = self.thrown if isinstance(self.thrown, BaseException) else None
                reached = [] if thrown is None else traceback.extract_tb(thrown.__traceback__)[:1]
                self.count.error = f"(swallowed at {self.place}, reached {reached}, came out: {caught!r})"


def by_signal(call: Callable[[], None], number: int, chance: random.Random, inside: Callable[[], None]) -> Count:
    """Throw so many from a signal handler; `inside` is called there first."""
    struck = Struck(call, Count())
    longest = _duration(call)

    def strike(_: int, frame: FrameType | None) -> None:
        if struck.is_open:
            struck.is_open = False
            struck.place = _place(frame)
            inside()
            struck.thrown = chance.choice(STRIKES)("now")
            raise struck.thrown

    def arm() -> None:
        signal.setitimer(signal.ITIMER_REAL, max(1e-6, chance.uniform(0, longest)))

    before = signal.signal(signal.SIGALRM, strike)
    try:
        while struck.count.thrown < number:
            struck.run(arm, lambda: None)
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    call()
    return struck.count


def by_thread(call: Callable[[], None], number: int, chance: random.Random) -> Count:
    """Throw so many from another thread."""
    struck = Struck(call, Count())
    longest = _duration(call)
    due = threading.Event()
    raise_in: Any = ctypes.pythonapi.PyThreadState_SetAsyncExc

    def arm() -> None:
        due.set()

    def await_strike() -> None:
        # It was ordered, and is raised as soon as this thread runs on.
        until = time.monotonic() + 1.0
        while struck.thrown is not None and time.monotonic() < until:
            pass

    def work() -> None:
        while struck.count.thrown < number:
            struck.run(arm, await_strike)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    while worker.is_alive():
        if not due.wait(0.1):
            continue
        due.clear()
        time.sleep(chance.uniform(0, longest))
        kind = chance.choice(STRIKES)
        struck.thrown = kind
        if struck.is_open:
            struck.place = _place(sys._current_frames().get(worker.ident or 0))
            raise_in(ctypes.c_ulong(worker.ident or 0), ctypes.py_object(kind))
            due.clear()
            while worker.is_alive() and not due.wait(0.1) and time.monotonic() - struck.began < 3 * DEADLINE:
                pass
        else:
            struck.thrown = None
        if time.monotonic() - struck.began > 3 * DEADLINE:
            struck.count.hung += 1
            return struck.count
    call()
    return struck.count


def _place(frame: FrameType | None) -> str:
    found: list[str] = []
    while frame is not None and len(found) < 16:
        found.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found)


def _duration(call: Callable[[], None]) -> float:
    """About twice what a call takes, on a connection that is open."""
    call()
    began = time.monotonic()
    for _ in range(20):
        call()
    return (time.monotonic() - began) / 10


def run(url: str, kind: str, number: int, seed: int) -> Count:
    """Throw `number` exceptions of a kind."""
    chance = random.Random(seed)
    gc.collect()
    gc.disable()  # Python keeps to itself what strikes in a finalizer or in what others hung into the collector
    queue = f"interrupted-{uuid.uuid4().hex[:8]}"
    call = Calls(url, kind, queue)
    other = Calls(url, "signal", queue)
    environment = {"AMQTASK_BROKER_URL": url, "SAMPLE_QUEUE": queue}
    if not url.startswith("amqp"):
        environment["CELERY_RESULT_BACKEND"] = url
    worker = WorkerProcess("integration.apps.sample", "-P", "solo", "-Q", queue, environment=environment)
    try:
        other()
        if kind == "result":
            worker.start()
        if kind == "thread":
            return by_thread(call, number, chance)
        return by_signal(call, number, chance, other if kind == "nested" else lambda: None)
    finally:
        gc.enable()
        with warnings.catch_warnings():
            # A connection that was struck before anybody had it.
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()
        call.app.close()
        other.app.close()
        if kind == "result":
            worker.stop()


def main() -> int:
    """The command."""
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(10**6)
    print(f"seed {seed}, {number} exceptions", flush=True)
    is_well = True
    with contextlib.ExitStack() as stack:
        url = sys.argv[3] if len(sys.argv) > 3 else stack.enter_context(broker())  # that of a Redis, for one
        for kind in KINDS:
            began = time.monotonic()
            faulthandler.dump_traceback_later(3600, exit=True)  # a call that hangs
            count = run(url, kind, number // len(KINDS), seed)
            print(f"{kind:8}{count} in {time.monotonic() - began:.0f} s", flush=True)
            is_well &= count.is_well
        faulthandler.cancel_dump_traceback_later()
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
