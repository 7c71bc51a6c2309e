"""What a child process does: read requests, run them, send outcomes back in batches, go when it is time."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import random
import resource
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

from amqtask import signals
from amqtask_pools.prefork.frames import Joiner, decode_request, encode_outcomes
from amqtask_pools.prefork.limits import SoftLimit

if TYPE_CHECKING:
    from amqtask.execution.executor import Executor
    from amqtask.execution.outcome import Outcome
    from amqtask.pool import PoolOptions

logger = logging.getLogger("amqtask.pools")
# Exit codes that tell the parent why a child went of its own accord.
RETIRED = 0
FAILED_TO_START = 71
# Outcomes are sent together, up to so many or so long (seconds), while the next request is there already.
BATCH, BATCH_TIME = 16, 0.001
# Below this mean runtime (seconds) outcomes may wait for their batch while the next task runs.
SHORT = 0.001
PR_SET_PDEATHSIG = 1
# Children's outgoing packets never block for ever: a parent that does not read is gone or hung.
SEND_TIMEOUT = 60.0


def main(sock: Any, inherited: list[Any], executor: Executor, options: PoolOptions, parent_pid: int) -> None:
    """The child's whole life; ends the process."""
    try:
        _settle(sock, inherited, options, parent_pid)
    except BaseException:
        logger.exception("a pool process could not start")
        os._exit(FAILED_TO_START)
    code = Child(sock, executor, options).run()
    if signals.worker_process_shutdown:
        signals.worker_process_shutdown.send(sender=options.hostname, pid=os.getpid(), exitcode=code)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)


def _settle(sock: Any, inherited: list[Any], options: PoolOptions, parent_pid: int) -> None:
    """Be a process of one's own: signals, inherited sockets, random numbers; die with the parent."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is for the parent, which lets tasks finish
    for name in ("SIGTERM", "SIGQUIT", "SIGHUP", "SIGUSR1", "SIGALRM"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    for other in inherited:
        other.close()
    _die_with_parent(parent_pid)
    random.seed()
    gc.enable()
    if options.on_child_start is not None:
        options.on_child_start()


def _die_with_parent(parent_pid: int) -> None:
    """Linux kills us with our parent; elsewhere the closed socket ends us after the running task."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(0)


class Child:
    """Reads, runs, answers."""

    def __init__(self, sock: Any, executor: Executor, options: PoolOptions) -> None:
        self._sock = sock
        self._executor = executor
        self._options = options
        self._outcomes: list[Outcome] = []
        self._since = 0.0
        self._mean = 1.0
        self._done = 0

    def run(self) -> int:
        """Until the parent closes its end, or it is time to be replaced; the exit code."""
        joiner = Joiner()
        while True:
            body = self._next(joiner)
            if body is None:
                self._flush()
                return RETIRED
            self._execute(body)
            if self._is_worn():
                self._flush()
                return RETIRED

    def _next(self, joiner: Joiner) -> bytes | None:
        """The next request's bytes; None when the parent is gone."""
        sock = self._sock
        while True:
            if self._outcomes:
                # Short tasks: their outcomes may wait while more is there to do; nothing waits for nothing.
                if self._mean > SHORT or len(self._outcomes) >= BATCH or time.perf_counter() - self._since > BATCH_TIME:
                    self._flush()
                else:
                    sock.setblocking(False)
                    try:
                        packet = sock.recv(1 << 17)
                    except BlockingIOError:
                        self._flush()
                        continue
                    finally:
                        sock.setblocking(True)
                    if not packet:
                        return None
                    body = joiner.feed(packet)
                    if body is not None:
                        return body
                    continue
            packet = sock.recv(1 << 17)
            if not packet:
                return None
            body = joiner.feed(packet)
            if body is not None:
                return body

    def _execute(self, body: bytes) -> None:
        request = decode_request(body)
        if not self._outcomes:
            self._since = time.perf_counter()
        if request.soft_limit is None:
            outcome = self._executor.execute(request)
        else:
            with SoftLimit(request.soft_limit):
                outcome = self._executor.execute(request)
        self._mean += (outcome.runtime - self._mean) * 0.2
        self._outcomes.append(outcome)
        self._done += 1

    def _flush(self) -> None:
        outcomes, self._outcomes = self._outcomes, []
        if not outcomes:
            return
        try:
            for packet in encode_outcomes(outcomes):
                self._sock.send(packet)
        except (BrokenPipeError, ConnectionResetError):
            os._exit(0)  # the parent is gone, and the broker has the messages

    def _is_worn(self) -> bool:
        limit = self._options.max_tasks_per_child
        if limit is not None and self._done >= limit:
            return True
        memory = self._options.max_memory_per_child
        return memory is not None and _resident_kib() > memory


def _resident_kib() -> int:
    """Memory in use; where that cannot be asked, the most that ever was."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize() // 1024
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak // 1024 if sys.platform == "darwin" else peak
