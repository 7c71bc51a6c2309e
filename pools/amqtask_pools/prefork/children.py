"""The children as their parent sees them: one of them, with its requests and its end (ChildProcess); which one gets the next
request, an idle one, or while tasks are short the one with the fewest requests (Children); when missing ones are replaced
(Respawn).
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from amqtask.execution.request import Outcome
from amqtask.ground.loop import OneTimer, exponential_backoff
from amqtask.ground.printable import bounded_logger
from amqtask_pools.prefork.child import SHORT, main
from amqtask_pools.prefork.frames import (
    GO,
    LAST,
    OUTCOMES,
    PIECE,
    READY,
    REQUEST,
    SUCCESSES,
    BrokenFrame,
    FrameReader,
    cut,
    decode_outcomes,
    number_of,
    socket_pair,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from amqtask.execution.executor import Executor
    from amqtask.execution.request import Request
    from amqtask.pool import Loop, PoolOptions, Timer

_FULL = (errno.EAGAIN, errno.ENOBUFS)
# Packets read from one child before others have their turn; more than its socket has room for.
PACKETS = 1024


class ChildProcess:
    """One child process and its socket. `requests` are those that the child has not answered, in order: unread ones can be taken
    back, the last of the others runs, and outcomes of those before it are under way.

    `head_since` is when the first of them could begin, `is_leaving` tells that it gets no more requests, `is_full` that it gets
    no more until it is idle: it has a request in pieces, or its socket was full. `buffer` is only used during `receive`.
    """

    def __init__(
        self,
        context: Any,
        executor: Executor,
        options: PoolOptions,
        *,
        siblings: Sequence[ChildProcess],
        buffer: bytearray,
    ) -> None:
        self.requests: dict[int, Request] = {}
        # A number of its own among the live ones, the smallest: that of one that has ended is given again.
        self.index: int = min({*range(1, len(siblings) + 2)} - {sibling.index for sibling in siblings})
        self.head_since = time.monotonic()
        self.is_ready = False
        self.is_full = False
        self.is_leaving = False
        # How many outcomes came from it.
        self.answered = 0
        # The timer until which it must be ready.
        self.patience: Timer | None = None
        # Why its packets are not read any more; it is killed for that.
        self.broken: str | None = None
        # The number of the request that it is killed for, and the reason.
        self.condemned: tuple[int, Exception | str] | None = None
        # Packets for it; not empty only while `is_full` or `is_leaving`.
        self._unsent: deque[bytes] = deque()
        self._frame_reader = FrameReader()
        self._steps = executor.steps
        self._accept = executor.accept
        self._buffer = buffer
        self._view = memoryview(buffer)
        self._exit_code: int | None = None
        self._sock, self._child_end = socket_pair()
        self._sock.setblocking(False)
        self._send = self._sock.send
        self.fd = self._sock.fileno()
        # A child must not keep the parent's ends open: its siblings would not notice the parent's end.
        inherited = [end for sibling in siblings for end in (sibling._sock, sibling._child_end)]
        try:
            self.process = self._fork(context, executor, options, [self._sock, *inherited])
        except BaseException:  # also when it is interrupted
            self._sock.close()
            self._child_end.close()
            raise
        self.pid = int(self.process.pid)
        self._pidfd = _open_pidfd(self.pid)
        # Readable once the process has ended. A pidfd, because a pipe stays open in programs that a task has started.
        self.sentinel = int(self.process.sentinel) if self._pidfd is None else self._pidfd

    def _fork(self, context: Any, executor: Executor, options: PoolOptions, inherited: list[socket.socket]) -> Any:
        # No signal handler of the parent may run in the child before the child has its own.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            process = context.Process(
                target=main,
                args=(self._child_end, inherited, executor, options, os.getpid(), before, self.index),
                name="amqtask-child",
                daemon=True,
            )
            process.index = self.index - 1  # programs read it of billiard.current_process()
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return process

    # -- requests

    def give(self, request: Request, message: bytes) -> bool:
        """Send a request (encoded: `message`) without waiting; False when a part of it must wait for room (`send_more`)."""
        requests = self.requests
        if not requests:
            self.head_since = time.monotonic()
        requests[request.number] = request
        if len(message) <= PIECE:
            try:
                self._send(message)
                return True
            except OSError:  # no room, though there should be; or the child is gone
                self._unsent.append(message)
        else:
            self.is_full = True
            self._unsent.extend(cut(message))
        return self.send_more()

    def send_more(self) -> bool:
        """Send waiting packets, as far as there is room; whether all are sent."""
        unsent = self._unsent
        while unsent:
            try:
                self._send(unsent[0])
            except OSError as error:
                if error.errno in _FULL:
                    self.is_full = True
                    return False
                unsent.clear()  # the child is gone; its requests are recovered when its end is noticed
                return True
            unsent.popleft()
        return True

    def take_back(self) -> list[Request]:
        """The requests that the child has not read, and never will: the kernel gives each packet to one reader only."""
        has_ended = self.has_ended
        if not has_ended and (self.is_full or self.is_leaving):
            return []  # a piece must not be missing in the middle, nor the STOP packet
        packets = []
        # gevent's sockets, where a program has all patched, wait whatever the flags say; this is the one within.
        child_end = getattr(self._child_end, "_sock", self._child_end)
        while True:
            try:
                packets.append(child_end.recv(PIECE + 1, socket.MSG_DONTWAIT))
            except OSError:
                break
        taken = []
        for packet in (*packets, *self._unsent):
            if packet[0] == REQUEST:
                taken.append(self.requests.pop(number_of(packet)))
            elif packet[0] == LAST:  # of a large request, which it has not read to the end
                taken.append(self.requests.popitem()[1])
        return taken

    # -- outcomes

    def receive(self) -> list[Outcome]:
        """The outcomes that came; each ends one of `requests`. After another packet the child is `broken`: it is killed, and its
        packets are not read any more."""
        outcomes: list[Outcome] = []
        try:
            self._receive(outcomes)
        except BrokenFrame as error:
            self.broken = str(error)
            self.kill()
        if outcomes:
            self.answered += len(outcomes)
            if self.requests:
                self.head_since = time.monotonic()
            else:
                self.is_full = False
        return outcomes

    def _receive(self, outcomes: list[Outcome]) -> None:
        requests = self.requests
        for _ in range(PACKETS):
            if self.broken is not None:
                return
            try:
                size = self._sock.recv_into(self._buffer)
            except OSError:  # no packet now, or the child is gone: the sentinel tells
                return
            message = self._message(size)
            if message is not None:
                for outcome in decode_outcomes(message, self._accept):
                    request = requests.pop(outcome.number, None)
                    if request is None:
                        continue
                    if outcome.going_on is not None:
                        outcome = self._goes_on(request, outcome)
                    outcomes.append(outcome)
            if not requests:  # so no further packet will come
                return

    def _goes_on(self, request: Request, outcome: Outcome) -> Outcome:
        """The outcome with the request of the next step, which the child runs already."""
        until: Any = outcome.going_on
        try:
            if self._steps is None:
                raise ValueError("a step, and there are none")
            step = self._steps.begun(request, outcome, until)
        except (ValueError, TypeError) as error:
            self.requests[request.number] = request
            raise BrokenFrame(str(error)) from error
        # Outcomes come in the order of `requests`, so the step that runs now becomes the first of them.
        behind = list(self.requests.items())
        self.requests.clear()
        self.requests[step.number] = step
        self.requests.update(behind)
        return outcome._replace(going_on=step)

    def _message(self, size: int) -> bytes | memoryview | None:
        packet_type = self._view[0] if size else None
        if packet_type in (OUTCOMES, SUCCESSES):
            return self._view[:size]
        if packet_type == READY and not self.is_ready:
            self.is_ready = True
            self.head_since = time.monotonic()
            return None
        return self._frame_reader.feed(self._view[:size])

    # -- ending

    def retire(self) -> bool:
        """Send no more requests: the child ends when it has answered those that it has read. Returns as `give` does."""
        self.is_leaving = True
        self._unsent.append(GO)
        return self.send_more()

    def condemn(self, number: int, reason: Exception | str) -> None:
        """Note that the child is going to be killed because of this request."""
        self.is_leaving = True
        self.condemned = (number, reason)

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """Send a signal, unless it is gone."""
        try:
            if self._pidfd is not None:
                signal.pidfd_send_signal(self._pidfd, signum)
            elif self.process is not None and self.exit_code is None:  # checked, so that the pid is still the child's
                os.kill(self.pid, signum)
        except ProcessLookupError:
            pass  # gone already

    def kill_programs(self) -> None:
        """Kill programs that its task has started and left behind: the rest of its process group."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # there are none, or they changed their user

    @property
    def exit_code(self) -> int | None:
        """Negative for a signal; None while it runs (or when other code has reaped it)."""
        if self._exit_code is None and self.process is not None:
            self._exit_code = self.process.exitcode
        return self._exit_code

    @property
    def has_ended(self) -> bool:
        """Whether the process is gone. (Its socket does not tell: our own copy keeps it open.)"""
        if self.exit_code is not None:
            return True
        if self._pidfd is not None:
            return self.wait(0)
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:  # other code has reaped it
            return True
        return False

    def wait(self, seconds: float) -> bool:
        """Whether it ends within so many seconds."""
        if self.exit_code is not None:
            return True
        poll = select.poll()
        poll.register(self.sentinel, select.POLLIN)
        return bool(poll.poll(max(0.0, seconds) * 1000))

    @property
    def ending(self) -> str:
        """How it ended, for logs and errors."""
        if self.broken is not None:
            return f"wrote to its pipe what is not an outcome ({self.broken}), and was killed"
        code = self.exit_code
        if code is None:
            return "ended (somebody else took its exit code)"
        if code >= 0:
            return f"exited with code {code}"
        try:
            return f"was killed by signal {signal.Signals(-code).name} ({-code})"
        except ValueError:
            return f"was killed by signal {-code}"

    def close(self) -> None:
        """Release descriptors and the process table's entry; only once nothing watches them."""
        self._sock.close()
        self._child_end.close()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        # The process closes its descriptors, the sentinel's other end among them, just before it can be reaped.
        self.process.join(0.1)
        self._exit_code = self.exit_code
        self.process = None


def _open_pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):  # not Linux, or an old one, or forbidden in a container
        return None


# A child may have so many requests at once, while the mean runtime is below SHORT.
LOOK_AHEAD = 32
# Requests with larger bodies (bytes) go to idle children only: LOOK_AHEAD smaller ones fit into the smallest socket buffer.
LARGE = 4 * 1024


class Children:
    """The children, and how many requests they have. Its methods only count and choose; they do not touch the children."""

    def __init__(self) -> None:
        # All live children, also those that are leaving.
        self.live: list[ChildProcess] = []
        # Of the children that take requests: how many there are, how many requests they have, and which of them are idle;
        # the last of these is the warmest, and the first are those that are not ready.
        self.taking = 0
        self.in_flight = 0
        self.idle: list[ChildProcess] = []
        # Children whose task takes long: they get no more requests before it ends.
        self.slow: set[ChildProcess] = set()
        self._mean = 1.0

    @property
    def room(self) -> int:
        """How many requests the children take now."""
        if self._mean >= SHORT:
            return len(self.idle)
        if self.slow:
            return sum(LOOK_AHEAD - len(child.requests) for child in self.live if self._is_open(child))
        return self.taking * LOOK_AHEAD - self.in_flight

    def choose(self, size: int) -> ChildProcess | None:
        """A child for a request whose body has `size` bytes; None when all are busy."""
        if self.idle:
            return self.idle[-1]
        if self._mean >= SHORT or size > LARGE:
            return None
        best: ChildProcess | None = None
        fewest = LOOK_AHEAD
        for child in self.live:
            if len(child.requests) < fewest and not child.is_full and self._is_open(child):
                best, fewest = child, len(child.requests)
        return best

    def _is_open(self, child: ChildProcess) -> bool:
        return not child.is_leaving and child not in self.slow

    def note_given(self, child: ChildProcess) -> None:
        """The child that `choose` chose is about to get the request."""
        if not child.requests:
            self.idle.pop()
        self.in_flight += 1

    def note_taken_back(self, child: ChildProcess, count: int) -> None:
        """So many requests were taken back from the child."""
        if not child.is_leaving:
            self.in_flight -= count
            if not child.requests:
                self.idle.insert(0, child)

    def note_outcomes(self, child: ChildProcess, outcomes: Sequence[Outcome]) -> None:
        """The child has sent these outcomes."""
        mean, ended = self._mean, len(outcomes)
        for outcome in outcomes:
            mean += (outcome.runtime - mean) * 0.1
            if outcome.going_on is not None:
                ended -= 1
        self._mean = mean
        self.slow.discard(child)
        if not child.is_leaving:
            self.in_flight -= ended
            if not child.requests:
                self.idle.append(child)

    # -- children come and go

    def add(self, child: ChildProcess) -> None:
        """Add a new child."""
        self.live.append(child)
        self.idle.insert(0, child)
        self.taking += 1

    def note_ready(self, child: ChildProcess) -> None:
        """The child has started."""
        if child in self.idle:
            self.idle.remove(child)
            self.idle.append(child)

    def note_retiring(self, child: ChildProcess) -> None:
        """The child takes no more requests; call this before `is_leaving` is set."""
        if child.is_leaving:
            return
        self.taking -= 1
        self.in_flight -= len(child.requests)
        self.slow.discard(child)
        if not child.requests:
            self.idle.remove(child)

    def clear(self) -> None:
        """All children are gone."""
        self.live.clear()
        self.idle.clear()
        self.slow.clear()
        self.taking = self.in_flight = 0


# -- How fast missing children are replaced: at once, but slower and slower when they die as soon as they start.

logger = bounded_logger("amqtask.pools")
# After so many children in a row that died before their first outcome there is a pause; its first and longest length
# (seconds).
QUICK_DEATHS, FIRST_PAUSE, LONGEST_PAUSE = 10, 0.5, 30.0


class Respawn:
    """`fork` starts one child, `missing` tells how many are missing; `on_late` is called after one was started later."""

    def __init__(
        self, loop: Loop, *, fork: Callable[[], None], missing: Callable[[], int], on_late: Callable[[], None]
    ) -> None:
        self._fork = fork
        self._missing = missing
        self._on_late = on_late
        self._deaths = 0
        # How often in a row the system refused to fork.
        self._refusals = 0
        self._timer = OneTimer(loop)

    def works(self) -> None:
        """A child has answered."""
        self._deaths = 0

    def died_early(self) -> None:
        """A child is gone that had not sent an outcome, and ran no task."""
        self._deaths += 1

    def fill(self) -> None:
        """Start the missing children, now or after the pause."""
        if self._timer.is_set:
            return
        if self._deaths < QUICK_DEATHS:
            for _ in range(self._missing()):
                if not self._forked():
                    return
        elif self._missing() > 0:
            pause = _pause(self._deaths - QUICK_DEATHS)
            logger.error(
                "%d pool processes in a row ended before they had run anything; the next starts in %g s",
                self._deaths,
                pause,
            )
            self._timer.set(pause, self._try_one)

    def stop(self) -> None:
        """Start no more children."""
        self._timer.cancel()

    def _forked(self) -> bool:
        """Fork a child; False when the system refused, and another attempt follows."""
        try:
            self._fork()
        except OSError as error:
            self._refusals += 1
            pause = _pause(self._refusals - 1)
            logger.error("no pool process can be started (%s); the next attempt is in %g s", error, pause)
            self._timer.set(pause, self._try_one)
            return False
        self._refusals = 0
        return True

    def _try_one(self) -> None:
        if self._missing() > 0 and self._forked():
            self.fill()
            self._on_late()


def _pause(failures: int) -> float:
    return exponential_backoff(failures, factor=FIRST_PAUSE, maximum=LONGEST_PAUSE)
