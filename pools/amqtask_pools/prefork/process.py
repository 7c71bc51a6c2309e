"""One child as the parent sees it: what it was given, what it reads next, how it ended."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Any

from amqtask_pools.prefork.child import main
from amqtask_pools.prefork.frames import Joiner, decode_outcomes, decode_request, encode_request, socket_pair

if TYPE_CHECKING:
    from amqtask.execution.executor import Executor
    from amqtask.execution.outcome import Outcome
    from amqtask.execution.request import Request
    from amqtask.pool import PoolOptions


class ChildProcess:
    """`given` holds the requests the child has not answered, oldest first: the first of them runs (or is about to)."""

    def __init__(self, context: Any, executor: Executor, options: PoolOptions, inherited: list[Any]) -> None:
        self._sock, self._child_end = socket_pair()
        self._sock.setblocking(False)
        self._joiner = Joiner()
        self._unsent: deque[bytes] = deque()
        self.given: OrderedDict[int, Request] = OrderedDict()
        self.head_since = 0.0
        self.started_at = time.monotonic()
        self.is_leaving = False
        self.has_answered = False
        # Set when we kill it on purpose: what its running request is told.
        self.verdict: BaseException | None = None
        self.revoke_reason: str | None = None
        # The child must not keep other children's sockets (nor our end of its own) open: it would never see us go.
        self.process = context.Process(
            target=main,
            args=(self._child_end, [self._sock, *inherited], executor, options, os.getpid()),
            name="amqtask-child",
            daemon=True,
        )
        self.process.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return int(self.process.pid)

    @property
    def fd(self) -> int:
        """Our end of the socket pair."""
        return int(self._sock.fileno())

    @property
    def sentinel(self) -> int:
        """Readable once the process has ended (our own copy of its socket keeps `fd` from saying so)."""
        return int(self.process.sentinel)

    @property
    def sockets(self) -> list[Any]:
        """What a sibling must close."""
        return [self._sock, self._child_end]

    @property
    def is_idle(self) -> bool:
        """Whether it has nothing to do."""
        return not self.given and not self.is_leaving

    # -- talking

    def give(self, request: Request) -> None:
        """Hand a request over; never blocks."""
        if not self.given:
            self.head_since = time.monotonic()
        self.given[request.number] = request
        for packet in encode_request(request):
            if self._unsent:
                self._unsent.append(packet)
                continue
            try:
                self._sock.send(packet)
            except BlockingIOError:
                self._unsent.append(packet)
            except OSError:
                return  # it is dying; what it was given is recovered when its end is noticed

    @property
    def has_unsent(self) -> bool:
        """Whether packets wait for room."""
        return bool(self._unsent)

    def send_more(self) -> None:
        """There is room again."""
        while self._unsent:
            try:
                self._sock.send(self._unsent[0])
            except BlockingIOError:
                return
            except OSError:
                self._unsent.clear()
                return
            self._unsent.popleft()

    def receive(self) -> list[Outcome]:
        """The outcomes that came."""
        outcomes: list[Outcome] = []
        while True:
            try:
                packet = self._sock.recv(1 << 17)
            except OSError:  # nothing more for now, or for ever: the sentinel tells
                return outcomes
            if not packet:
                return outcomes
            body = self._joiner.feed(packet)
            if body is not None:
                outcomes += decode_outcomes(body)

    def answered(self, outcome: Outcome) -> bool:
        """Note an outcome; False for one that is not expected (a request that was taken back)."""
        self.has_answered = True
        if self.given.pop(outcome.number, None) is None:
            return False
        if self.given:
            self.head_since = time.monotonic()
        return True

    def take_back(self) -> list[Request]:
        """What the child has not read yet; it will never see that. The kernel gives each packet to one reader only."""
        taken: list[Request] = []
        joiner = Joiner()
        while True:
            try:
                packet = self._child_end.recv(1 << 17, socket.MSG_DONTWAIT)
            except OSError:
                break
            if not packet:
                break
            body = joiner.feed(packet)
            if body is not None:
                number = decode_request(body).number
                request = self.given.pop(number, None)
                if request is not None:
                    taken.append(request)
        return taken

    # -- ending

    def retire(self) -> None:
        """No more requests: it goes when it has answered what it has."""
        self.is_leaving = True
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # gone already

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """Send a signal."""
        try:
            os.kill(self.pid, signum)
        except ProcessLookupError:
            pass  # gone already

    def close(self) -> None:
        """Release the sockets, and the process table's entry."""
        self._sock.close()
        self._child_end.close()
        self.process.join(1.0)

    @property
    def ending(self) -> str:
        """How the process ended, in words."""
        self.process.join(1.0)
        code = self.process.exitcode
        if code is None:
            return "closed its socket"
        if code < 0:
            try:
                name = signal.Signals(-code).name
            except ValueError:
                name = "signal"
            return f"was killed by {name} ({-code})"
        return f"exited with code {code}"

    @property
    def exit_code(self) -> int | None:
        """Its exit code, negative for a signal."""
        code: int | None = self.process.exitcode
        return code
