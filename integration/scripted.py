"""A server that speaks as a broker does, and misbehaves as a test has told it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pika import spec

from amqtask.transport.stream import GREETING, Frames, content_size, decode_method, encode_method

CAPABILITIES = {"publisher_confirms": True, "basic.nack": True}


@dataclass
class Script:
    """What it does; may be changed at any time.

    `ends_at`: the method at which it ends the connection without a word, or (`says`) after connection.close with a code and text.
    `verdict`: how it answers publishes: ack, nack, silence. `away`: queues that it has, on a node that is down.
    `mute`: queues whose declarations it does not answer.
    """

    ends_at: type[Any] | None = None
    says: tuple[int, str] | None = None
    verdict: str = "ack"
    away: set[str] = field(default_factory=set)
    mute: set[str] = field(default_factory=set)
    # What happened: connections, the bodies that were published, the queues that were declared.
    connections: int = 0
    published: list[str] = field(default_factory=list)
    declared: list[str] = field(default_factory=list)
    url: str = ""
    sockets: list[socket.socket] = field(default_factory=list)

    def cut(self) -> None:
        """End all connections."""
        for sock in self.sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


class _Session:
    """One connection."""

    def __init__(self, script: Script, sock: socket.socket) -> None:
        self._script = script
        self._sock = sock
        self._frames = Frames()
        self._published = 0
        self._missing = 0
        self._key, self._channel = "", 1
        # It stays so for this connection: a channel that refuses, until there is a new one.
        self._verdict = ""

    def run(self) -> None:
        with contextlib.suppress(OSError), self._sock:
            if self._sock.recv(len(GREETING), socket.MSG_WAITALL) == GREETING:
                self._say(spec.Connection.Start(0, 9, {"capabilities": CAPABILITIES}, "PLAIN", "en_US"), 0)
                while (data := self._sock.recv(65536)) and all(
                    self._heard(*frame) for frame in self._frames.feed(data)
                ):
                    pass

    def _say(self, method: Any, channel: int = 1) -> None:
        self._sock.sendall(encode_method(method, channel))

    def _heard(self, kind: int, channel: int, payload: bytes) -> bool:
        if kind == spec.FRAME_METHOD:
            method = decode_method(payload)
            if type(method) is self._script.ends_at:
                if self._script.says is not None:
                    self._say(spec.Connection.Close(*self._script.says, 0, 0), 0)
                return False
            return self._answer(method, channel)
        if kind == spec.FRAME_HEADER:
            self._missing = content_size(payload)
        elif kind == spec.FRAME_BODY:
            self._missing -= len(payload)
        if kind in (spec.FRAME_HEADER, spec.FRAME_BODY) and self._missing == 0:
            self._judge()
        return True

    def _judge(self) -> None:
        self._published += 1
        if self._script.verdict == "ack":
            self._script.published.append(self._key)
            self._say(spec.Basic.Ack(self._published), self._channel)
        elif self._script.verdict == "nack":
            self._say(spec.Basic.Nack(self._published), self._channel)

    def _answer(self, method: Any, channel: int) -> bool:
        match method:
            case spec.Connection.StartOk():
                self._say(spec.Connection.Tune(0, 131072, 0), 0)
            case spec.Connection.Open():
                self._say(spec.Connection.OpenOk(), 0)
            case spec.Channel.Open():
                self._say(spec.Channel.OpenOk(), channel)
            case spec.Confirm.Select():
                self._say(spec.Confirm.SelectOk(), channel)
            case spec.Basic.Publish():
                self._key, self._channel = method.routing_key, channel
            case spec.Queue.Declare():
                self._declare(method.queue, channel)
            case spec.Basic.Consume():
                self._say(spec.Basic.ConsumeOk("tag"), channel)
            case spec.Basic.Qos():
                if self._script.verdict != "silence":
                    self._say(spec.Basic.QosOk(), channel)
            case spec.Channel.Close():
                self._say(spec.Channel.CloseOk(), channel)
            case spec.Queue.Delete():
                self._say(spec.Queue.DeleteOk(0), channel)
            case spec.Connection.Close():
                self._say(spec.Connection.CloseOk(), 0)
                return False
        return True

    def _declare(self, queue: str, channel: int) -> None:
        if queue in self._script.away:
            text = (
                f"NOT_FOUND - home node 'rabbit@away' of durable queue '{queue}' in vhost '/' is down or inaccessible"
            )
            self._say(spec.Channel.Close(404, text, 50, 10), channel)
        elif queue not in self._script.mute:
            self._script.declared.append(queue)
            self._say(spec.Queue.DeclareOk(queue, 0, 0), channel)


@contextmanager
def scripted(**script: Any) -> Iterator[Script]:
    """Such a server, while the block runs."""
    told = Script(**script)
    threads: list[threading.Thread] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                sock = listener.accept()[0]
                told.connections += 1
                told.sockets.append(sock)
                threads.append(threading.Thread(target=_Session(told, sock).run, daemon=True))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        told.url = f"amqp://guest:guest@127.0.0.1:{listener.getsockname()[1]}/"
        threads.append(threading.Thread(target=serve, daemon=True))
        threads[0].start()
        try:
            yield told
        finally:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            told.cut()
            for thread in threads:
                thread.join(60)
