"""Short ways to a Redis, for scripts that run before and after each task: connections of their own, on which a question is sent
as it is. Where its answer says nothing it is not waited for; it comes with the next one's.

What has no good answer over a line is asked once more over the ordinary client, which tries again while Redis is away; so each
script must be one that may run twice. A line is opened when that client has just had an answer.
"""

from __future__ import annotations

import hashlib
import math
import socket
import struct
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

from redis.exceptions import NoScriptError

from amqtask.transport.redis.servers import way_to
from amqtask.transport.redis.wire import Parser, ReplyError, command

if TYPE_CHECKING:
    from amqtask.transport.redis.servers import Place

# The reply of a script that has nothing to tell.
WELL = 0
_WELL = b":0\r\n"
# Seconds after which a line that was not used is not trusted any more: something on the way may have forgotten it.
IDLE_SECONDS = 20.0
CHUNK = 65_536


# A script, its key and its argument.
Question: TypeAlias = tuple[str, str, bytes]


class _Line:
    """One connection, logged in, to a server that has the scripts. `unanswered`: what was sent and has no answer yet."""

    def __init__(self, place: Place, timeout: float, scripts: Iterable[str]) -> None:
        self.unanswered: list[Question] = []
        self.used_at = time.monotonic()
        self._parser = Parser()
        self._sock: socket.socket = socket.create_connection((place.host, place.port), timeout)
        try:
            self._log_in(place, scripts)
        except BaseException:
            self._sock.close()
            raise

    def _log_in(self, place: Place, scripts: Iterable[str]) -> None:
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if place.tls is not None:
            self._sock = place.tls.wrap_socket(self._sock, server_hostname=place.host)
        login = [("AUTH", place.user or "default", place.password)] if place.password or place.user else []
        commands = [*login, ("SELECT", place.db), *(("SCRIPT", "LOAD", script) for script in scripts)]
        self._sock.sendall(b"".join(command(*words) for words in commands))
        for reply in self._replies(len(commands)):
            if isinstance(reply, ReplyError):
                raise ConnectionError(str(reply))
        if (
            type(self._sock).__module__ == "socket"
        ):  # neither TLS nor a green one: the kernel's limits cost no poll() each time
            limit = struct.pack("@ll", math.ceil(self._sock.gettimeout() or 0), 0)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            self._sock.settimeout(None)

    def send(self, question: Question, packed: bytes) -> None:
        self.unanswered.append(question)
        self._sock.sendall(packed)

    def answer(self) -> Any:
        """The answer to the last question. Raises: ConnectionError when one of those before it had no good answer."""
        count = len(self.unanswered)
        chunk = self._sock.recv(CHUNK)
        if chunk == _WELL * count:  # nearly always
            self.unanswered.clear()
            return WELL
        *earlier, last = self._replies(count, chunk)
        if isinstance(last, ReplyError) or any(reply != WELL for reply in earlier):
            raise ConnectionError(f"Redis answered {[*earlier, last]}")
        self.unanswered.clear()
        return last

    def _replies(self, count: int, chunk: bytes | None = None) -> list[Any]:
        replies: list[Any] = []
        while len(replies) < count:
            chunk = self._sock.recv(CHUNK) if chunk is None else chunk
            if not chunk:
                raise ConnectionError("Redis closed the connection")
            replies += self._parser.feed(chunk)
            chunk = None
        return replies

    def close(self) -> None:
        self._sock.close()


class Lines:
    """The lines of one process, which threads share. `slowly` asks over the ordinary client, and `client` is that, from which is
    known where to connect to; of a cluster there are no lines. `timeout`: seconds for connecting and for an answer."""

    def __init__(
        self, scripts: Iterable[str], slowly: Callable[[Question], Any], client: Callable[[], Any], timeout: float
    ) -> None:
        self._heads = {script: _head(script) for script in scripts}
        self._slowly = slowly
        self._client = client
        self._timeout = timeout
        self._idle: list[_Line] = []

    def ask(self, script: str, key: str, argument: bytes, /) -> Any:
        """The answer. Raises: what `slowly` raises."""
        question, line = (script, key, argument), self._take()
        if line is None:
            return self._ask_slowly([question])
        try:
            line.send(question, self._packed(*question))
            answer = line.answer()
        except (OSError, ValueError):
            line.close()
            return self._ask_slowly(line.unanswered)
        except BaseException:  # a time limit: half an answer may be under way
            line.close()
            raise
        self._idle.append(line)
        return answer

    def tell(self, script: str, key: str, argument: bytes, /) -> None:
        """Ask, and do not wait for the answer, which is WELL. Raises: what `slowly` raises."""
        question, line = (script, key, argument), self._take()
        if line is None:
            self._ask_slowly([question])
            return
        try:
            line.send(question, self._packed(*question))
        except OSError:
            line.close()
            self._ask_slowly(line.unanswered)
        except BaseException:
            line.close()
            raise
        else:
            self._idle.append(line)

    def close(self) -> None:
        """Wait for the answers that are not here yet, and close all."""
        while self._idle:
            line = self._idle.pop()
            try:
                if line.unanswered:
                    line.answer()
            except (OSError, ValueError):
                pass
            line.close()

    def _take(self) -> _Line | None:
        now = time.monotonic()
        while self._idle:
            try:
                line = self._idle.pop()
            except IndexError:  # another thread has it
                break
            if now - line.used_at < IDLE_SECONDS:
                line.used_at = now
                return line
            line.close()
        return None

    def _ask_slowly(self, questions: list[Question]) -> Any:
        """The answer to the last one."""
        answer = [self._slowly(question) for question in questions][-1]
        try:
            place = place_of(self._client())
            if place is not None:
                self._idle.append(_Line(place, self._timeout, self._heads))
        except Exception:  # noqa: BLE001 - sentinels and TLS have errors of their own; the ordinary client does
            pass
        return answer

    def _packed(self, script: str, key: str, argument: bytes) -> bytes:
        name = key.encode()
        return b"%b$%d\r\n%b\r\n$%d\r\n%b\r\n" % (self._heads[script], len(name), name, len(argument), argument)


def run_script(client: Any, question: Question) -> Any:
    """Ask over redis-py's client. Raises: what that raises."""
    script, *arguments = question
    try:
        return client.evalsha(_sha(script), 1, *arguments)
    except NoScriptError:
        return client.eval(script, 1, *arguments)


@lru_cache
def _sha(script: str) -> str:
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()


def _head(script: str) -> bytes:
    return b"*5\r\n$7\r\nEVALSHA\r\n$40\r\n%b\r\n$1\r\n1\r\n" % _sha(script).encode()


def place_of(client: Any) -> Place | None:
    """The server that takes writes now; None of a cluster. Raises: what redis-py raises when sentinels do not say."""
    pool = getattr(client, "connection_pool", None)
    if pool is None:
        return None
    way = way_to(client)
    if not way.guides:
        return way.server
    host, port = pool.get_master_address()
    return replace(way.server, host=host, port=port)
