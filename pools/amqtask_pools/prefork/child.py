"""The child process: reads requests, runs them, sends outcomes back in batches, ends when it should be replaced."""

from __future__ import annotations

import logging
import os
import random
import signal
import socket
import sys
from collections.abc import Sequence
from multiprocessing.context import get_spawning_popen
from time import perf_counter
from types import FrameType
from typing import TYPE_CHECKING

import billiard

from amqtask import signals
from amqtask.ground.printable import bounded_logger
from amqtask.ground.processes import POOL_INDEX, resident_bytes, signal_at_parents_end
from amqtask_pools._limits import SoftLimits
from amqtask_pools.prefork.frames import (
    IS_READY,
    PIECE,
    REQUEST,
    STOP,
    FrameReader,
    cut,
    decode_request,
    encode_outcomes,
)

if TYPE_CHECKING:
    from amqtask.execution.chain_steps import SlotSteps
    from amqtask.execution.executor import Executor
    from amqtask.execution.request import Outcome, Request
    from amqtask.pool import PoolOptions

logger = bounded_logger("amqtask.pools")
# Exit codes: it ended as intended, it could not start (EX_OSERR), our own code failed (EX_SOFTWARE).
RETIRED, FAILED_TO_START, FAILED = 0, 71, 70
# While tasks take less than SHORT on average, outcomes are held back: BATCH at most, BATCH_TIME at the longest (in seconds).
SHORT, BATCH, BATCH_TIME = 0.001, 16, 0.001
# The signal to send held-back outcomes: one that a process without a handler ignores.
NUDGE = signal.SIGURG
# As in Celery: the running task ends as at its soft time limit.
SOFT_LIMIT = signal.SIGUSR1
# Signals whose handlers a child must not inherit from the worker's main process.
_TO_DEFAULT = ("SIGTERM", "SIGQUIT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGCHLD")


def main(
    sock: socket.socket,
    inherited: Sequence[socket.socket],
    executor: Executor,
    options: PoolOptions,
    parent: int,
    mask: set[int],
    index: int,
) -> None:
    """The child's main function; ends the process. `mask` is its signal mask; until it is set all signals are blocked. `index`
    is its number in the pool."""
    POOL_INDEX[0] = index
    try:
        _settle(inherited, options, parent, mask)
        child = Child(sock, executor, options, parent)
    except BaseException:  # whatever it is, the process ends with its code
        logger.critical("process %d of the pool could not start", os.getpid(), exc_info=True)
        _leave(FAILED_TO_START)
    try:
        code = child.run()
    except BaseException:  # whatever it is, the process ends with its code
        logger.critical("process %d of the pool failed", os.getpid(), exc_info=True)
        code = FAILED
    if signals.worker_process_shutdown:
        signals.worker_process_shutdown.send(sender=options.hostname, pid=os.getpid(), exitcode=code)
    _leave(code)


class _Key(bytes):
    """The key of this process, which billiard and multiprocessing take for the current one: each may hand it to processes that
    it spawns, and nothing else may pickle it. billiard's own class lets only billiard do so."""

    def __reduce__(self) -> tuple[type[bytes], tuple[bytes]]:
        if get_spawning_popen() is None and billiard.context.get_spawning_popen() is None:
            raise TypeError("the key of a process cannot be pickled")
        return bytes, (bytes(self),)


def _settle(inherited: Sequence[socket.socket], options: PoolOptions, parent: int, mask: set[int]) -> None:
    """Set up the process: signals, sockets of its siblings, random numbers, its end with the parent's."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is for the parent, which lets tasks finish
    for name in _TO_DEFAULT:
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for sock in inherited:
        sock.close()
    _die_with(parent)
    # A process group of its own: when the child is killed, programs that its task has started are killed with it.
    os.setpgid(0, 0)
    # Tasks may start processes, too, which multiprocessing refuses for daemons: they are killed like programs.
    config = billiard.current_process()._config
    config.update(daemon=False, authkey=_Key(config["authkey"]))
    random.seed()
    if options.on_child_start is not None:
        options.on_child_start()


def _die_with(parent: int) -> None:
    """End with the parent: Linux kills this process; elsewhere the closed socket ends it after the running task."""
    signal_at_parents_end(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(RETIRED)


def _leave(code: int) -> None:
    multiprocessing = sys.modules.get("multiprocessing")
    if multiprocessing is not None:
        for child in multiprocessing.active_children():
            if child.daemon:
                child.terminate()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()
    os._exit(code)


class Child:
    """Reads requests, runs them, sends outcomes."""

    def __init__(self, sock: socket.socket, executor: Executor, options: PoolOptions, parent: int) -> None:
        self._sock = sock
        self._buffer = bytearray(PIECE + 1)
        self._view = memoryview(self._buffer)
        self._frame_reader = FrameReader()
        self._execute = executor.execute
        self._rest = executor.rest
        self._steps = executor.steps
        self._accept = executor.accept
        self._parent = parent
        self._outcomes: list[Outcome] = []
        # While a task runs: at other moments a signal handler must not touch the outcomes.
        self._is_running = False
        self._since = 0.0
        self._mean = 1.0
        self._use = ChildUse.of(options)
        signal.signal(NUDGE, self._nudged)
        self._soft_limits = SoftLimits()
        signal.signal(SOFT_LIMIT, self._asked_to_end)

    def run(self) -> int:
        """Run until the parent ends it or is gone, or it should be replaced; the exit code."""
        self._rest()
        self._sock.send(IS_READY)
        while (message := self._next()) is not None:
            self._run(decode_request(message))
            if self._use is not None and self._use.is_out():
                break
        self._rest()
        self._flush()
        return RETIRED

    # -- requests

    def _next(self) -> bytes | memoryview | None:
        while True:
            size = self._receive()
            packet_type = self._view[0]
            if not size or packet_type == STOP:
                return None
            if packet_type == REQUEST:
                return self._view[:size]
            message = self._frame_reader.feed(self._view[:size])
            if message is not None:
                return message

    def _receive(self) -> int:
        """Receive a packet; its size. Outcomes are sent before this waits, and the slot keeps nothing."""
        if self._outcomes:
            is_held_back = self._mean < SHORT and len(self._outcomes) < BATCH
            if not is_held_back or perf_counter() - self._since >= BATCH_TIME:
                self._flush_between_tasks()
        try:
            return self._sock.recv_into(self._buffer, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            self._rest()
            if self._outcomes:
                self._flush_between_tasks()
        while True:
            try:
                return self._sock.recv_into(self._buffer)
            except (
                BlockingIOError
            ):  # only on datagram sockets, which do not notice a closed end, see frames.socket_pair
                if os.getppid() != self._parent:
                    return 0

    # -- running

    def _run(self, request: Request) -> None:
        if request.soft_limit is None and request.hard_limit is None:
            if not self._outcomes:
                self._since = perf_counter()
            self._is_running = True
            outcome = self._execute(request)
            self._is_running = False
            self._soft_limits.end()
            if outcome.is_step and self._steps is not None and self._use is None:
                outcome = self._go_on(request, outcome, self._steps)
            self._outcomes.append(outcome)
            self._mean += (outcome.runtime - self._mean) * 0.2
            return
        # For a hard limit the parent measures from one outcome to the next, so none is held back here.
        self._flush()
        if request.soft_limit is not None:
            self._soft_limits.begin(request.soft_limit)
        outcome = self._execute(request)
        self._soft_limits.end()
        self._outcomes.append(outcome)
        self._flush_between_tasks()

    def _go_on(self, request: Request, outcome: Outcome, steps: SlotSteps) -> Outcome:
        """Run the next steps of a chain; the parent gets each step before it begins. Returns the outcome of the last one."""
        while (step := steps.after(request, outcome)) is not None:
            self._outcomes.append(outcome._replace(going_on=step))
            self._flush()
            request = step
            outcome = self._execute(request)
            self._soft_limits.end()
        return outcome

    # -- outcomes

    def _flush_between_tasks(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)  # an alarm that a task has left would interrupt another task, or us
        self._flush()

    def _flush(self) -> None:
        outcomes, self._outcomes = self._outcomes, []
        if not outcomes:
            return
        message = encode_outcomes(outcomes, self._accept)
        try:
            if len(message) <= PIECE:
                self._sock.send(message)
            else:
                for packet in cut(message):
                    self._sock.send(packet)
        except ConnectionError:
            os._exit(RETIRED)  # the parent is gone, and the broker still has the messages

    def _nudged(self, *_: object) -> None:
        """A signal handler: the present task takes long, so send the outcomes that wait for it. Between two tasks they are sent
        by `_receive`, soon; the parent asks again while a task runs."""
        self._mean = max(self._mean, 10 * SHORT)
        if self._is_running:
            self._flush()

    def _asked_to_end(self, signum: int, frame: FrameType | None) -> None:
        self._soft_limits.strike_now(f"by {signal.Signals(signum).name}", frame)


class ChildUse:
    """Tells after each task whether this process has reached its limit of tasks or memory."""

    def __init__(self, most_tasks: int | None, most_kib: int | None) -> None:
        self._most_tasks = most_tasks
        self._most_kib = most_kib
        self._done = 0

    @classmethod
    def of(cls, options: PoolOptions) -> ChildUse | None:
        """None for a process without such limits."""
        if not options.max_tasks_per_child and not options.max_memory_per_child:
            return None
        return cls(options.max_tasks_per_child, options.max_memory_per_child)

    def is_out(self) -> bool:
        """Whether a limit is reached; call it once per task."""
        self._done += 1
        if self._most_tasks and self._done >= self._most_tasks:
            logger.debug("process %d has run its %d tasks and is replaced", os.getpid(), self._done)
            return True
        if self._most_kib and (used := resident_bytes() // 1024) > self._most_kib:
            logger.warning("process %d uses %d KiB, more than %d, and is replaced", os.getpid(), used, self._most_kib)
            return True
        return False
