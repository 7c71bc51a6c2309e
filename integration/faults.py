"""Forwarder, a TCP proxy whose connections a test can cut, stall, or cut in mid-publish; and a server that hangs up."""

from __future__ import annotations

import contextlib
import random
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from urllib.parse import urlsplit

# How many bytes a connection lives at most, while they are frayed: a handshake has about 900; some get to work.
FRAYED = (1000, 100_000)
# What the broker says in front of the name of a queue that is declared (queue.declare-ok), and where it delivers (basic.deliver).
DECLARED, DELIVERED = b"\x00\x32\x00\x0b", b"\x00\x3c\x00\x3c"
# The types of frames with a message's properties and body.
CONTENT = (2, 3)
# What a client says in the middle of the handshake: its login (connection.start-ok), and the virtual host (connection.open).
LOGIN, VIRTUAL_HOST = b"PLAIN", b"\x00\x0a\x00\x28"


class _Pair:
    """One client's connection and ours to the broker; two threads copy bytes between them."""

    def __init__(self, owner: Forwarder, client: socket.socket, server: socket.socket) -> None:
        self._owner = owner
        self._client = client
        self._server = server
        # How many bytes pass, both ways together, until it ends.
        self._left = owner.lifetime()
        # One for each direction: whether bytes pass.
        self.up, self.down = threading.Event(), threading.Event()
        self.up.set()
        self.down.set()
        self._threads = [
            threading.Thread(target=self._copy, args=(client, server, self.up, True), daemon=True),
            threading.Thread(target=self._copy, args=(server, client, self.down, False), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _copy(self, source: socket.socket, target: socket.socket, flows: threading.Event, is_up: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                flows.wait()
                self._left -= len(data)
                if self._left < 0:
                    target.sendall(data[: self._left])
                    break
                trap = self._owner.sprung_by(data) if is_up else None
                if trap == "drop":
                    break
                if not is_up:
                    data = self._owner.passes(data)
                if trap is not None:
                    self.down.clear()  # the broker gets it, and its answer comes too late
                target.sendall(data)
                if trap == "cut":
                    break
                if trap == "hold":
                    self._owner.sprung.set()
        self.end()

    @property
    def is_open(self) -> bool:
        """Whether neither side has ended it."""
        return all(thread.is_alive() for thread in self._threads)

    def end(self) -> None:
        """Both sides see the connection end."""
        for sock in (self._client, self._server):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self.up.set()
        self.down.set()

    def join(self) -> None:
        """Wait for the threads, close the sockets."""
        for thread in self._threads:
            thread.join(60)
        self._client.close()
        self._server.close()


class Forwarder:
    """Listens on a free port, or that one, and forwards to the broker of `url`; use it as a context manager."""

    def __init__(self, url: str, *, port: int = 0) -> None:
        split = urlsplit(url)
        self._target = (split.hostname or "127.0.0.1", split.port or 5672)
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = int(self._listener.getsockname()[1])
        login = split.netloc.rpartition("@")[0] or ("guest:guest" if split.scheme.startswith("amqp") else "")
        self.url = f"{split.scheme}://{login}{'@' if login else ''}127.0.0.1:{self.port}{split.path}"
        # How many connections there have been.
        self.accepted = 0
        self.sprung = threading.Event()
        self._pairs: list[_Pair] = []
        self._lock = threading.Lock()
        self._trap: tuple[bytes, str] | None = None
        self._banned: bytes | None = None
        self._kept_secret: bytes | None = None
        self._keeps_deliveries = False
        self._is_deaf = False
        self._chance: random.Random | None = None
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Forwarder:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(60)
        self.cut()
        for pair in self._pairs:
            pair.join()

    def point_to(self, url: str) -> None:
        """New connections go there, as to a name that has another address now; those that are open stay where they are."""
        split = urlsplit(url)
        self._target = (split.hostname or "127.0.0.1", split.port or 5672)

    @property
    def open_connections(self) -> int:
        """How many there are now."""
        with self._lock:
            return sum(pair.is_open for pair in self._pairs)

    # -- faults

    def cut(self) -> None:
        """End all present connections; new ones work."""
        with self._lock:
            for pair in self._pairs:
                pair.end()

    def stall(self, *, new_ones: bool = False) -> None:
        """Swallow what present connections say, without a word: a firewall that forgot them. `new_ones`: these too."""
        with self._lock:
            self._is_deaf = new_ones
            for pair in self._pairs:
                pair.up.clear()
                pair.down.clear()

    def fray(self, seed: int) -> None:
        """End all present connections, and each new one after some bytes, half of them in the handshake, until `heal`."""
        with self._lock:
            self._chance = random.Random(seed)
        self.cut()

    def lifetime(self) -> int:
        """After how many bytes the next connection ends."""
        if self._chance is None:
            return sys.maxsize
        return self._chance.randrange(self._chance.choice(FRAYED))

    def heal(self) -> None:
        """Let everything pass again, what was held back too."""
        with self._lock:
            self._is_deaf = False
            self._chance = None
            self._banned = self._kept_secret = None
            self._keeps_deliveries = False
            for pair in self._pairs:
                pair.up.set()
                pair.down.set()

    def cut_after(self, marker: bytes) -> None:
        """Once: when a client sends these bytes, the broker gets them, and the connection ends before its answer passes."""
        self._arm(marker, "cut")

    def ban(self, marker: bytes) -> None:
        """From now on: every connection on which a client says this ends, and the broker never gets it."""
        with self._lock:
            self._banned = marker

    def keep_secret(self, queue: str) -> None:
        """From now on: who declares this queue gets no answer, as on RabbitMQ 4.0 while the node of a classic queue is down."""
        with self._lock:
            self._kept_secret = DECLARED + bytes([len(queue)]) + queue.encode()

    def keep_deliveries(self) -> None:
        """From now on: answers pass, and messages do not, as from a broker that is about to deliver."""
        with self._lock:
            self._keeps_deliveries = True

    def passes(self, data: bytes) -> bytes:
        """What of the broker's words a client gets; each piece begins with a frame."""
        if self._kept_secret is None and not self._keeps_deliveries:
            return data
        passed, at = b"", 0
        while at < len(data):
            end = at + 8 + int.from_bytes(data[at + 3 : at + 7], "big")
            passed += data[at:end] if self._lets_pass(data[at:end]) else b""
            at = end
        return passed

    def _lets_pass(self, frame: bytes) -> bool:
        with self._lock:
            if self._keeps_deliveries and (frame[0] in CONTENT or frame[7:11] == DELIVERED):
                return False
            return self._kept_secret is None or self._kept_secret not in frame

    def hold_after(self, marker: bytes) -> None:
        """The same, but the connection stays and the answer waits for `heal`."""
        self._arm(marker, "hold")

    def _arm(self, marker: bytes, effect: str) -> None:
        self.sprung.clear()
        self._trap = (marker, effect)

    def sprung_by(self, data: bytes) -> str | None:
        """What these bytes set off."""
        with self._lock:
            if self._banned is not None and self._banned in data:
                return "drop"
            if self._trap is None or self._trap[0] not in data:
                return None
            effect, self._trap = self._trap[1], None
            if effect == "cut":
                self.sprung.set()
            return effect

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(self._target)
                except OSError:
                    client.close()  # as if nobody listened here
                    continue
                with self._lock:
                    self.accepted += 1
                    pair = _Pair(self, client, server)
                    self._pairs.append(pair)
                    if self._is_deaf:
                        pair.up.clear()
                        pair.down.clear()


@contextmanager
def hangs_up_once() -> Iterator[str]:
    """The URL of a server that closes the first connection, and then accepts all others and says nothing."""
    kept: list[socket.socket] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            listener.accept()[0].close()
            while True:
                kept.append(listener.accept()[0])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield f"amqp://127.0.0.1:{listener.getsockname()[1]}/"
        listener.shutdown(socket.SHUT_RDWR)
    for each in kept:
        each.close()
