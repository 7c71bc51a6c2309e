"""Short ways to a Redis, for scripts that run before and after each task and for those who wait for a result: connections of
their own, on which a question is sent as it is. Where its answer says nothing it is not waited for; it comes with the next one's.

What has no good answer over a line is asked once more over the ordinary client, which tries again while Redis is away; so each
script must be one that may run twice. A line is opened when that client has just had an answer.
"""

from __future__ import annotations

import hashlib
import math
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import redis
from redis.exceptions import NoScriptError, RedisClusterException

from amqtask.ground.strikes import let_through, strike_in
from amqtask.transport.redis.servers import way_to
from amqtask.transport.redis.wire import Parser, Push, ReplyError, command
from amqtask.transport.resolving import as_host, resolve

if TYPE_CHECKING:
    from amqtask.transport.redis.wire import Argument, Place

# The reply of a script that has nothing to tell.
WELL = 0
_WELL = b":0\r\n"
# Seconds after which a line that was not used is asked whether it still works: something on the way may have forgotten it.
IDLE_SECONDS = 20.0
CHUNK = 65_536
# The longest wait without a look at the clock (seconds).
LONGEST = 3600.0


class Question(NamedTuple):
    """A script with its key and arguments."""

    script: str
    key: str
    arguments: tuple[bytes, ...]


class Line:
    """One connection to a server, on which `commands` had good answers after the login. `timeout`: seconds for connecting and for
    an answer."""

    def __init__(
        self, place: Place, timeout: float, commands: Iterable[Sequence[Argument]] = (), *, resp: int = 2
    ) -> None:
        self.used_at = time.monotonic()
        self._timeout = timeout
        self._parser = Parser()
        self._sock: socket.socket = _connect(place, timeout)
        try:
            self._log_in(place, commands, resp)
        except BaseException:
            self._sock.close()
            raise

    @property
    def is_good(self) -> bool:
        """Whether it was used a short while ago, or answers a PING."""
        return time.monotonic() - self.used_at < IDLE_SECONDS or self._answers()

    def _answers(self) -> bool:
        timeout = self._sock.gettimeout()
        try:
            self._sock.settimeout(self._timeout)
            self._sock.sendall(command("PING"))
            while b"PONG" not in self._replies(1):
                pass  # the rest of what was asked before
            self._sock.settimeout(timeout)
        except (OSError, ValueError) as error:
            let_through(error)
            return False
        return True

    def _log_in(self, place: Place, commands: Iterable[Sequence[Argument]], resp: int) -> None:
        if place.tls is not None:
            self._sock = place.tls.wrap_socket(self._sock, server_hostname=place.host)
        login = ("AUTH", place.user or "default", place.password) if place.password or place.user else ()
        hello: list[Sequence[Argument]] = [("HELLO", resp, *login)] if resp > 2 else [login] if login else []
        sent = [*hello, ("SELECT", place.db), *commands]
        self._sock.sendall(b"".join(command(*words) for words in sent))
        for reply in self._replies(len(sent)):
            if isinstance(reply, ReplyError):
                raise ConnectionError(str(reply))

    def converse(self, commands: Sequence[Sequence[Argument]], deadline: float) -> list[Any]:
        """Send these, and read their replies, errors among them. `deadline`: monotonic seconds.

        Raises: TimeoutError at the deadline, another OSError when the connection breaks.
        """
        self._sock.settimeout(_until(deadline))
        self._sock.sendall(b"".join([command(*words) for words in commands]))
        try:
            replies = self._replies(len(commands), deadline=deadline)
        except ValueError as error:
            raise ConnectionError(str(error)) from error
        if any(reply.__class__ is ReplyError and reply.code == "MOVED" for reply in replies):
            raise ConnectionError("the keys are on another master now")
        return replies

    def _replies(self, count: int, chunk: bytes | None = None, deadline: float | None = None) -> list[Any]:
        replies: list[Any] = []
        while len(replies) < count:
            if deadline is not None:
                self._sock.settimeout(_until(deadline))
            chunk = self._sock.recv(CHUNK) if chunk is None else chunk
            if not chunk:
                raise ConnectionError("Redis closed the connection")
            replies += self._parser.feed(chunk)
            chunk = None
        return replies

    def finish(self) -> None:
        """Close it when what was asked has its answer."""
        self.close()

    def close(self) -> None:
        self._sock.close()

    def __del__(self) -> None:
        # An application that nobody closes leaves its connections to the garbage collector, as redis-py's are left.
        if (sock := getattr(self, "_sock", None)) is not None:
            sock.close()


def _until(deadline: float) -> float:
    """Seconds that are left, for a socket."""
    return min(LONGEST, max(0.001, deadline - time.monotonic()))


def _connect(place: Place, timeout: float) -> socket.socket:
    if place.path:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout)
            sock.connect(place.path)
        except BaseException:
            sock.close()
            raise
        return sock
    deadline = time.monotonic() + timeout
    error = OSError(f"the name {place.host!r} has no address")
    for candidate in resolve(place.host, place.port, deadline):
        try:
            sock = socket.create_connection((as_host(candidate[4]).encode(), place.port), _until(deadline))  # type: ignore[arg-type] # see Connection
        except OSError as failure:
            let_through(failure)
            error = failure
        else:
            sock.settimeout(timeout)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
    raise error


LineT = TypeVar("LineT", bound=Line)


class LinePool(Generic[LineT]):
    """The lines of one process that are not in use, which threads share. `client`: redis-py's, from which is known where to
    connect to; of a cluster there are no lines. `most`: so many are kept."""

    def __init__(self, client: Callable[[], Any], connect: Callable[[Place], LineT], *, most: float = math.inf) -> None:
        self._client = client
        self._connect = connect
        self._most = most
        self._idle: list[LineT] = []
        # Whether the last line led to the server that takes writes.
        self._leads = False

    def take(self) -> LineT | None:
        """The one that was used last; those that do not work any more are closed."""
        idle = self._idle
        while idle:
            try:
                line = idle.pop()
            except IndexError:  # another thread has it
                break
            if line.is_good:
                return line
            line.close()
        # Those before were closed because exceptions struck them: redis-py would swallow some of the next.
        return self.open() if self._leads else None

    def open(self) -> LineT | None:
        """A new one, when the client has just had an answer; None where there are none."""
        try:
            place = _place_of(self._client())
            line = None if place is None else self._connect(place)
        except (redis.RedisError, RedisClusterException, OSError, ValueError) as error:  # redis-py tells them
            let_through(error)
            line = None
        self._leads = line is not None
        return line

    def drop(self, line: LineT, error: BaseException | None = None) -> None:
        """Close one over which something went wrong; only what struck from outside says nothing about the server."""
        line.close()
        is_lost = error is None or (isinstance(error, (OSError, ValueError)) and strike_in(error) is None)
        self._leads = self._leads and not is_lost

    def put(self, line: LineT) -> None:
        """Nobody uses it any more."""
        if len(self._idle) < self._most:
            line.used_at = time.monotonic()
            self._idle.append(line)
        else:
            line.close()

    def close(self) -> None:
        """Close those that nobody uses, with what is under way on them."""
        while self._idle:
            self._idle.pop().finish()


class _ScriptLine(Line):
    """To a server that has the scripts. `unanswered`: what was sent and has no answer yet."""

    def __init__(self, place: Place, timeout: float, scripts: Iterable[str]) -> None:
        super().__init__(place, timeout, [("SCRIPT", "LOAD", script) for script in scripts])
        self.unanswered: list[Question] = []
        if (
            type(self._sock).__module__ == "socket"
        ):  # neither TLS nor a green one: the kernel's limits cost no poll() each time
            limit = struct.pack("@ll", math.ceil(timeout), 0)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            self._sock.settimeout(None)

    def _answers(self) -> bool:
        return not self.unanswered and super()._answers()

    def send(self, questions: Sequence[Question], packed: bytes) -> list[Any]:
        """Without waiting for the answers."""
        self.unanswered += questions
        self._sock.sendall(packed)
        return []

    def ask(self, questions: Sequence[Question], packed: bytes) -> list[Any]:
        """The answer to one question. Raises: as `answer`."""
        self.send(questions, packed)
        return [self.answer()]

    def answer(self) -> Any:
        """The answer to the last question. Raises: ConnectionError when one of those before it had no good answer."""
        count = len(self.unanswered)
        well, chunk = _WELL * (count - 1), self._sock.recv(CHUNK)
        # Those to what was only told are mostly here before, and the last one comes by itself.
        while chunk and len(chunk) <= len(well) and well.startswith(chunk):
            more = self._sock.recv(CHUNK)
            chunk = chunk + more if more else b""
        if chunk and chunk.startswith(well):
            chunk, count = chunk[len(well) :], 1
            if chunk == _WELL:  # nearly always
                self.unanswered.clear()
                return WELL
        *earlier, last = self._replies(count, chunk)
        if isinstance(last, ReplyError) or any(reply != WELL for reply in earlier):
            raise ConnectionError(f"Redis answered {[*earlier, last]}")
        self.unanswered.clear()
        return last

    def answers(self, questions: Sequence[Question], packed: bytes) -> list[Any]:
        """Those to several questions, in one round trip. Raises: as `answer`."""
        before = len(self.unanswered)
        self.send(questions, packed)
        replies = self._replies(len(self.unanswered))
        if any(reply != WELL for reply in replies[:before]) or any(reply.__class__ is ReplyError for reply in replies):
            raise ConnectionError("Redis answered with an error")
        self.unanswered.clear()
        return replies[before:]

    def finish(self) -> None:
        try:
            if self.unanswered:
                self.answer()
        except (OSError, ValueError) as error:
            let_through(error)
        finally:
            self.close()


class Lines:
    """Scripts over the lines of one process. `slowly` asks over the ordinary client, which is `client`: see LinePool. `timeout`:
    seconds for connecting and for an answer."""

    def __init__(
        self, scripts: Iterable[str], slowly: Callable[[Question], Any], client: Callable[[], Any], timeout: float
    ) -> None:
        self._heads = heads = {script: _head(script) for script in scripts}
        self._slowly = slowly
        self._pool = LinePool(client, lambda place: _ScriptLine(place, timeout, heads))

    def ask(self, script: str, key: str, /, *arguments: bytes) -> Any:
        """The answer. Raises: what `slowly` raises."""
        return self._over([Question(script, key, arguments)], _ScriptLine.ask)[-1]

    def ask_all(self, questions: Sequence[Question]) -> list[Any]:
        """The answers to all of them, in one round trip where there is a line. Raises: what `slowly` raises."""
        return self._over(questions, _ScriptLine.answers)

    def tell(self, script: str, key: str, /, *arguments: bytes) -> None:
        """Ask, and do not wait for the answer, which is WELL. Raises: what `slowly` raises."""
        self._over([Question(script, key, arguments)], _ScriptLine.send)

    def _over(
        self, questions: Sequence[Question], do: Callable[[_ScriptLine, Sequence[Question], bytes], list[Any]]
    ) -> list[Any]:
        """What `do` gets over a line; where there is none, or it is lost meanwhile, the answers to what has none yet."""
        packed, line = b"".join(map(self._packed, questions)), self._pool.take()
        if line is None:
            return self._ask_slowly(questions)
        try:
            answers = do(line, questions, packed)
        except (OSError, ValueError) as error:
            self._pool.drop(line, error)
            let_through(error)
            return self._ask_slowly(line.unanswered)[-len(questions) :]
        except BaseException:  # a time limit: half an answer may be under way
            line.close()
            raise
        self._pool.put(line)
        return answers

    def close(self) -> None:
        """Wait for the answers that are not here yet, and close all."""
        self._pool.close()

    def _ask_slowly(self, questions: Sequence[Question]) -> list[Any]:
        answers = [self._slowly(question) for question in questions]
        line = self._pool.open()
        if line is not None:
            self._pool.put(line)
        return answers

    def _packed(self, question: Question) -> bytes:
        words = (question.key.encode(), *question.arguments)
        sized = b"".join([b"$%d\r\n%b\r\n" % (len(word), word) for word in words])
        return b"*%d%b%b" % (3 + len(words), self._heads[question.script], sized)


class Watch(Line):
    """A line on which values are waited for: it subscribes to the channels of keys and then looks at the keys, with one write. So
    a value that is published when it is stored is seen, whichever comes first."""

    def __init__(self, place: Place, timeout: float) -> None:
        super().__init__(place, timeout, resp=3)
        self._keys: Sequence[str] = ()
        # The keys of each look that has no answer yet.
        self._looks: deque[Sequence[str]] = deque()

    def begin(self, keys: Sequence[str]) -> None:
        """From now on these keys are waited for, and no others. Raises: OSError."""
        before, self._keys = self._keys, keys
        self._send(*([("UNSUBSCRIBE", *before)] if before else []), ("SUBSCRIBE", *keys))

    def look(self) -> None:
        """Look at the keys again. Raises: OSError; ConnectionError when the look before has no answer yet."""
        if self._looks:
            raise ConnectionError("Redis does not answer")
        self._send()

    def _send(self, *commands: Sequence[Argument]) -> None:
        self._sock.settimeout(self._timeout)
        self._looks.append(self._keys)
        self._sock.sendall(b"".join(command(*words) for words in (*commands, ("MGET", *self._keys))))

    def values(self, seconds: float) -> list[tuple[str, bytes]] | None:
        """What comes first within so many seconds: keys and values, perhaps of keys that were waited for before; None: nothing
        has come. Raises: OSError, ValueError."""
        self._sock.settimeout(max(0.001, seconds))
        try:
            chunk = self._sock.recv(CHUNK)
        except TimeoutError as error:
            let_through(error)
            return None
        if not chunk:
            raise ConnectionError("Redis closed the connection")
        found: list[tuple[str, bytes]] = []
        for reply in self._parser.feed(chunk):
            if isinstance(reply, Push):
                kind, channel, value = reply.fields[:3]
                if kind == b"message":
                    found.append((channel.decode(), value))
            elif isinstance(reply, list):
                looked_at = zip(self._looks.popleft(), reply, strict=True)
                found += ((key, value) for key, value in looked_at if value is not None)
            else:
                raise ConnectionError(f"Redis answered {reply}")
        return found

    def _answers(self) -> bool:
        self._looks.clear()  # their answers come before that
        return super()._answers()

    @property
    def has_looked(self) -> bool:
        """Whether it knows what was stored before."""
        return not self._looks


def run_script(client: Any, question: Question) -> Any:
    """Ask over redis-py's client. Raises: what that raises."""
    script, key, arguments = question
    try:
        return client.evalsha(_sha(script), 1, key, *arguments)
    except NoScriptError:
        return client.eval(script, 1, key, *arguments)


@lru_cache
def _sha(script: str) -> str:
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()


def _head(script: str) -> bytes:
    return b"\r\n$7\r\nEVALSHA\r\n$40\r\n%b\r\n$1\r\n1\r\n" % _sha(script).encode()


def _place_of(client: Any) -> Place | None:
    """The server that takes writes now; None of a cluster. Raises: what redis-py raises when sentinels do not say."""
    pool = getattr(client, "connection_pool", None)
    if pool is None:
        return None
    way = way_to(client)
    if not way.guides:
        return way.server
    host, port = pool.get_master_address()
    return replace(way.server, host=host, port=port)
