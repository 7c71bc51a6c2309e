"""Connections that the calling thread drives: no background thread, so they work after a fork and under green threads.

A Link speaks AMQP on one channel. What it sends waits in `_outgoing` until `run` or `flush` write it; `run` reads until a
condition holds or the deadline passes. Between calls nobody reads, so heartbeats stop and the broker may close the connection.
The owner therefore asks `is_usable()` first, which notices a closed one without a round trip.

Any exception may be raised into it at any line. `is_whole` tells whether the link can be used after that: it was waiting, and not
in the middle of reading or writing. Nothing here catches an exception that it did not cause.

After a fork the child holds copies of the parent's descriptors: it may close them, and must not write to them.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from pika import spec
from pika.exceptions import AuthenticationError, ChannelClosedByBroker, ConnectionClosedByBroker

from amqtask.exceptions import BrokerUnreachable, PublishError, PublishTimeout
from amqtask.ground.lazy import ByProcess
from amqtask.protocol.entities import Declaration
from amqtask.protocol.message import Delivery, Message
from amqtask.transport.content import FRAME_MAX, install, unwritable
from amqtask.transport.declare import DeclaredEntities, check_name, declaration, entity_name
from amqtask.transport.errors import blocked, connection_error
from amqtask.transport.stream import (
    CHANNEL,
    GREETING,
    HEARTBEAT,
    ByteStream,
    Content,
    Frames,
    Unreadable,
    attempt,
    decode_method,
    encode_method,
    encode_publish,
    is_failure,
    start_ok,
)
from amqtask.transport.url import BrokerAddress, client_properties

if TYPE_CHECKING:
    from amqtask.ground.shapes import FieldTable
    from amqtask.protocol.message import PropertiesLike
    from amqtask.transport.wire import PikaMethod


L = TypeVar("L", bound="Link")
Warn = Callable[[str], None]
AnswerClasses: TypeAlias = "type[Any] | tuple[type[Any], ...]"
# One wait of `run` (seconds); after each it looks at its condition, which another thread may have changed.
SLICE = 0.5
# A peer that is silent for so many heartbeat intervals is gone; in each interval we send so many heartbeats.
MISSED, OFTEN = 2.0, 3.0
_WITH_CONTENT = (spec.Basic.Deliver, spec.Basic.Return, spec.Basic.GetOk)
# Pauses between looks for a link that has become free (seconds). Every kind of thread can sleep.
FIRST_PAUSE, LONGEST_PAUSE = 0.0005, 0.01


class LinkLost(Exception):
    """The connection or channel ended while it was needed; `cause` is an exception of pika's where the broker closed it."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Link:
    """A connection with one channel. Not safe for two threads at once: its owner hands it to one at a time."""

    def __init__(self, *, heartbeat: int | None, name: str) -> None:
        install()
        self.pid = os.getpid()
        self.used_at = time.monotonic()
        self._heartbeat = heartbeat
        self._name = name
        self._stream: ByteStream | None = None
        self._error: BaseException | None = ConnectionError("the link is not open")
        self._reset()

    def _reset(self) -> None:
        self.address = BrokerAddress()
        self.blocked_reason: str | None = None
        self.server_properties: FieldTable = {}
        self.is_whole = True
        self._has_channel = False
        self._beat = 0.0
        self._frames = Frames()
        self._frame_max = FRAME_MAX
        self._outgoing: list[bytes] = []
        # Bytes that the last write did not take.
        self._unwritten = b""
        self._answers: list[Any] = []
        # Whether an answer to `ask` is missing.
        self.is_asked = False
        self._content = Content()
        self._declared = DeclaredEntities()
        self._wrote_at = self._heard_at = time.monotonic()

    # -- opening and closing

    def open(self, address: BrokerAddress, deadline: float) -> None:
        """Connect and open a channel before the deadline (monotonic seconds).

        Raises: AccessRefused at once, BrokerUnreachable; ConfigurationError for a certificate that cannot be read.
        """
        self._reset()
        self.address = address
        stream = self._stream = address.stream()
        self._error = None
        try:
            deadline = stream.open(deadline)
            self._shake_hands(deadline)
            self._open_channel(deadline)
        except LinkLost as lost:
            self.discard()
            raise connection_error(lost.cause, [address]) from lost.cause
        except (PublishTimeout, TimeoutError) as error:
            self.discard()
            if isinstance(error, TimeoutError) and not is_failure(error):
                raise
            raise BrokerUnreachable(f"{address.safe_url} did not answer in time") from error
        except OSError as error:
            self.discard()
            if not is_failure(error):
                raise
            raise connection_error(error, [address]) from error
        except BaseException:
            self.discard()
            raise

    def _shake_hands(self, deadline: float) -> None:
        doing = "connecting"
        self._outgoing.append(GREETING)
        start = self._answer(spec.Connection.Start, deadline, doing)
        self.server_properties = start.server_properties or {}
        credentials = self.address.credentials
        mechanism, response = credentials.response_for(start)
        if response is None:
            raise LinkLost(AuthenticationError(credentials.TYPE))
        self.put(start_ok(client_properties(self._name), mechanism, response), 0)
        tune = self._answer(spec.Connection.Tune, deadline, doing)
        self._frame_max = min(tune.frame_max or FRAME_MAX, FRAME_MAX)
        our_heartbeat = self.address.beat(self._heartbeat)
        beat = tune.heartbeat if our_heartbeat is None else our_heartbeat
        self.put(spec.Connection.TuneOk(tune.channel_max, self._frame_max, beat), 0)
        self._beat = float(beat)
        self.put(spec.Connection.Open(self.address.vhost), 0)
        self._answer(spec.Connection.OpenOk, deadline, doing)

    def _open_channel(self, deadline: float) -> None:
        self.call(spec.Channel.Open(), spec.Channel.OpenOk, deadline, "opening a channel")
        self._has_channel = True

    def reopen_channel(self, deadline: float) -> None:
        """A new channel after the broker closed the old one. Raises: LinkLost, ConnectionBlocked, PublishTimeout."""
        if not isinstance(self._error, ChannelClosedByBroker):
            raise LinkLost(self._error or ConnectionError("the connection is closed"))
        self._error = None
        self._answers.clear()
        self._open_channel(deadline)

    def renew_channel(self, deadline: float) -> None:
        """Close the channel, whose unanswered deliveries go back, and open another. Raises: LinkLost, PublishTimeout."""
        self.call(spec.Channel.Close(200, "", 0, 0), spec.Channel.CloseOk, deadline, "closing a channel")
        self._open_channel(deadline)

    def close(self, timeout: float = 1.0) -> None:
        """Close the connection; wait for the broker's close-ok no longer than `timeout` seconds."""
        connected = self._error is None or isinstance(self._error, ChannelClosedByBroker)
        if connected and self.is_whole and self.pid == os.getpid():
            self._error = None
            try:
                self.put(spec.Connection.Close(200, "goodbye", 0, 0), 0)
                self._answer(spec.Connection.CloseOk, time.monotonic() + timeout, "closing")
            except (LinkLost, PublishError):
                pass  # closed is what was asked for
        self.discard()

    def discard(self) -> None:
        """Drop the connection without a close."""
        self._error = self._error or ConnectionError("the link was discarded")
        self._has_channel = False
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    # -- driving

    @property
    def is_open(self) -> bool:
        """Whether both connection and channel are open, as far as we know."""
        return self._error is None and self._has_channel

    @property
    def is_writing(self) -> bool:
        """Whether bytes wait to be written."""
        return bool(self._outgoing or self._unwritten)

    def is_usable(self) -> bool:
        """Whether it is still open, after reading what the broker may have sent in the meantime."""
        if not self.is_open:
            return False
        try:
            self.turn()
        except LinkLost:
            return False
        return self.is_open

    def turn(self) -> None:
        """Write and read what can be without waiting. Raises: LinkLost."""
        if self._error is not None:
            raise LinkLost(self._error)
        self.flush()
        self._read()

    def run(self, condition: Callable[[], bool], deadline: float | None) -> bool:
        """Write and read until `condition()` or the deadline; whether it holds. Raises: LinkLost.

        What has come before the deadline counts, even if this thread stood still until after it."""
        if self._error is not None:
            raise LinkLost(self._error)
        began = time.monotonic()
        try:
            while not condition():
                now = time.monotonic()
                seconds_left = SLICE if deadline is None else min(SLICE, deadline - now)
                if seconds_left <= 0:
                    self._read()
                    return condition()
                if self._beat:
                    self._keep_alive(now, began)
                self.flush()
                stream = self._usable_stream()
                if stream.keeps_bytes or stream.wait(seconds_left, writable=self.is_writing):
                    self._read()
        finally:
            self.used_at = time.monotonic()
        return True

    def _keep_alive(self, now: float, began: float) -> None:
        if now - self._wrote_at > self._beat / OFTEN:
            self._outgoing.append(HEARTBEAT)
        if now - max(self._heard_at, began) > MISSED * self._beat:
            self._fail(ConnectionError(f"the broker said nothing for {MISSED * self._beat:g} s"))

    def demand(self, condition: Callable[[], bool], deadline: float, doing: str) -> None:
        """`run`, or the named error when the deadline passes. Raises: LinkLost, ConnectionBlocked, PublishTimeout."""
        if not self.run(condition, deadline):
            raise self.late(doing)

    def late(self, doing: str) -> PublishError:
        """The error for a deadline that passed while `doing`."""
        if self.blocked_reason is not None:
            return blocked(self.address, self.blocked_reason)
        return PublishTimeout(f"the deadline passed while {doing} at {self.address.safe_url}")

    def fail(self, error: BaseException) -> None:
        """Treat the link as lost: calls that wait raise LinkLost."""
        self._error = self._error or error

    def _fail(self, error: BaseException) -> None:
        self._error = self._error or error
        raise LinkLost(self._error)

    def _usable_stream(self) -> ByteStream:
        if self._stream is None or self.pid != os.getpid():
            self._fail(ConnectionError("the link is not open in this process"))
        assert self._stream is not None
        return self._stream

    # -- writing

    def put(self, method: object, channel: int = CHANNEL) -> None:
        """Send this method with the next `run` or `flush`."""
        self._outgoing.append(encode_method(method, channel))

    def put_message(self, message: Message) -> int:
        """Publish with the next `run` or `flush`; how many bytes that are.

        Raises: PublishError for a message that cannot be encoded; nothing is sent."""
        encoded, error = attempt(lambda: encode_publish(message, self._frame_max))
        if encoded is None:
            assert error is not None
            raise unwritable(message, error)
        self._outgoing.append(encoded)
        return len(encoded)

    def flush(self) -> None:
        """Write what the socket takes now. Raises: LinkLost."""
        if not self.is_writing:
            return
        stream = self._usable_stream()
        self.is_whole = False
        outgoing, self._outgoing = self._outgoing, []
        waiting = self._unwritten + b"".join(outgoing)
        try:
            taken = stream.write(memoryview(waiting))
        except OSError as error:
            if not is_failure(error):
                raise
            self._read()  # the broker may have sent the reason
            self._fail(error)
        self._unwritten = waiting[taken:]
        self._wrote_at = time.monotonic()
        self.is_whole = True

    def call(self, method: object, answer: AnswerClasses, deadline: float, doing: str) -> Any:
        """Ask the broker; its answer, of this class or one of these. Raises: LinkLost, ConnectionBlocked, PublishTimeout."""
        self.put(method)
        return self._answer(answer, deadline, doing)

    def _answer(self, expected: AnswerClasses, deadline: float, doing: str) -> Any:
        answers = self._answers
        self.demand(lambda: bool(answers), deadline, doing)
        answer = answers.pop(0)
        if not isinstance(answer, expected):
            names = " or ".join(
                answer_class.NAME for answer_class in (expected if isinstance(expected, tuple) else (expected,))
            )
            self._fail(Unreadable(f"{names} was expected, and {answer.NAME} came"))
        return answer

    def ask(self) -> None:
        """Send a method that a live broker answers at once; `is_asked` holds until the answer comes."""
        if not self.is_asked:
            self.is_asked = True
            self.put(spec.Basic.Qos(0, 0, False))

    def ask_prefetch(self, count: int) -> None:
        """Let the broker send so many unacknowledged deliveries to consumers that begin after this."""
        self.put(spec.Basic.Qos(prefetch_count=count))

    # -- reading

    def _read(self) -> None:
        stream = self._usable_stream()
        self.is_whole = False
        while True:
            try:
                data = stream.read()
            except OSError as error:
                if not is_failure(error):
                    raise
                self._fail(error)
            if data is None:
                break
            self._heard_at = time.monotonic()
            if not data:
                self._fail(ConnectionError("the broker ended the connection"))
            self._take(data)
            if self._error is not None:
                raise LinkLost(self._error)
            if not stream.keeps_bytes:
                break
        self.is_whole = True

    def _take(self, data: bytes) -> None:
        try:
            for frame_type, _, payload in self._frames.feed(data):
                if frame_type == spec.FRAME_METHOD:
                    self._hear(decode_method(payload))
                elif frame_type != spec.FRAME_HEARTBEAT:
                    message = self._content.add(frame_type, payload)
                    if message is not None:
                        self._hear_message(*message)
        except Unreadable as error:
            self._fail(error)

    def _hear(self, method: Any) -> None:
        method_class = type(method)
        if method_class is spec.Basic.Ack:
            self.on_confirm(method.delivery_tag, method.multiple, is_ack=True)
        elif method_class in _WITH_CONTENT:
            self._content.begin(method)
        elif method_class is spec.Basic.Nack:
            self.on_confirm(method.delivery_tag, method.multiple, is_ack=False)
        elif method_class is spec.Basic.QosOk:
            self.is_asked = False
        elif method_class is spec.Channel.Close:
            self._on_channel_closed(method)
        elif method_class is spec.Connection.Close:
            self.fail(ConnectionClosedByBroker(method.reply_code, method.reply_text))
            self.put(spec.Connection.CloseOk(), 0)
            self.flush()
        elif method_class is spec.Connection.Blocked:
            self.blocked_reason = method.reason or "no reason given"
        elif method_class is spec.Connection.Unblocked:
            self.blocked_reason = None
        elif method_class is spec.Basic.Cancel:
            self.on_cancelled(method.consumer_tag)
        else:
            self._answers.append(method)

    def _on_channel_closed(self, method: Any) -> None:
        self._has_channel = False
        self.is_asked = False
        self._content.begin(None)
        self.put(spec.Channel.CloseOk())
        self.fail(ChannelClosedByBroker(method.reply_code, method.reply_text))

    def _hear_message(self, method: Any, properties: PropertiesLike, body: bytes, error: Exception | None) -> None:
        if isinstance(method, spec.Basic.Return):
            self.on_return(method, properties)
        else:
            self.on_delivery(method, properties, body, error)
            if isinstance(method, spec.Basic.GetOk):
                self._answers.append(method)

    def on_confirm(self, number: int, multiple: bool, *, is_ack: bool) -> None:
        """basic.ack or basic.nack."""

    def on_return(self, method: PikaMethod, properties: PropertiesLike) -> None:
        """basic.return."""

    def on_delivery(self, method: PikaMethod, properties: PropertiesLike, body: bytes, error: Exception | None) -> None:
        """basic.deliver; `error` tells why the properties cannot be read."""

    def on_cancelled(self, consumer: str) -> None:
        """basic.cancel: the queue is gone, or its node is down."""

    # -- declaring

    def declare(self, entities: Sequence[Declaration], deadline: float, warn: Warn) -> bool:
        """Make sure that entities exist, each once per connection; some are used as they are found. Whether the broker was asked.

        Raises: LinkLost, PublishTimeout, ConnectionBlocked, AccessRefused, PublishError.
        """
        if self._declared.issuperset(entities):
            return False
        self._declared.declare(
            entities, lambda entity, passive: self.declare_one(entity, deadline, passive=passive), warn
        )
        return True

    def trust(self, entities: Sequence[Declaration]) -> None:
        """Take these to exist."""
        self._declared.update(entities)

    def forget(self, entities: Sequence[Declaration]) -> None:
        """Declare these entities again when they are needed: they may have been deleted."""
        self._declared.difference_update(entities)

    def declare_one(self, entity: Declaration, deadline: float, *, passive: bool) -> ChannelClosedByBroker | None:
        """Declare an entity, or ask whether it exists; why the broker refuses that.

        Raises: LinkLost, PublishTimeout, ConnectionBlocked, PublishError."""
        check_name(entity)
        method, answer = declaration(entity, passive=passive)
        encoded, error = attempt(lambda: encode_method(method))
        if encoded is None:
            raise PublishError(f"{entity_name(entity)} cannot be declared: {type(error).__name__}: {error}") from error
        self._outgoing.append(encoded)
        try:
            self._answer(answer, deadline, f"declaring {entity_name(entity)}")
        except LinkLost as lost:
            if not isinstance(lost.cause, ChannelClosedByBroker):
                raise
            self.reopen_channel(deadline)
            return lost.cause
        return None


def delivery_of(method: PikaMethod, properties: PropertiesLike, body: bytes, queue: str) -> Delivery:
    """What basic.deliver or basic.get brought from a queue."""
    return Delivery(
        body, properties, method.exchange, method.routing_key, method.redelivered, queue, method.delivery_tag, 0
    )


# -- the links of a process


class Links(Generic[L]):
    """The connections of one process, and which call has which link, without a lock: at most `limit` links, made by `make`.

    A call has a link from the moment in which `_held` maps the link to the call's frame. One dictionary method does that, which
    nothing can interrupt; so a signal handler, a finalizer or another thread that comes in between takes another link. A call
    need not clean up either: when its frame has ended (an exception was raised at any line, even in a `finally`), its link is
    free to be dropped. A link that was dropped is never given out again, so dropping it twice does no harm.
    """

    def __init__(self, limit: int, make: Callable[[], L]) -> None:
        self.pid = os.getpid()
        self._limit = limit
        self._make = make
        # In the order in which they were made.
        self._all: dict[L, None] = {}
        # The frame of the call that has the link.
        self._held: dict[L, FrameType] = {}

    def __len__(self) -> int:
        return len(self._all)

    def take(self, frame: FrameType, deadline: float, suits: Callable[[L], bool] = lambda link: True) -> L | None:
        """A free link, or a new one that is not open, for the call of this frame; None when the deadline passes before.

        Free links that do not suit are dropped."""
        pause = FIRST_PAUSE
        while True:
            link = self.try_take(frame, suits)
            if link is not None:
                return link
            seconds_left = deadline - time.monotonic()
            if seconds_left <= 0:
                return None
            time.sleep(min(pause, seconds_left))
            pause = min(pause * 2, LONGEST_PAUSE)

    def try_take(self, frame: FrameType, suits: Callable[[L], bool] = lambda link: True) -> L | None:
        """Like `take`, without waiting."""
        return self.take_free(frame, suits) or self._take_new(frame)

    def take_free(self, frame: FrameType, suits: Callable[[L], bool] = lambda link: True) -> L | None:
        """A link that no call has: the first one, so that the others stay idle when few are needed."""
        for link in list(self._all):
            if link not in self._held and self._held.setdefault(link, frame) is frame:
                if suits(link):
                    return link
                self.drop(link)
        return None

    def _take_new(self, frame: FrameType) -> L | None:
        self.reclaim()
        room = self._limit if len(self._all) < self._limit else self._limit + self._held_up_stack(frame)
        if len(self._all) >= room:
            return None
        link = self._make()
        self._held[link] = frame
        self._all[link] = None
        # Of several calls that come at once, only as many as there is room for keep their link.
        if list(self._all).index(link) < room:
            return link
        self.drop(link)
        return None

    def _held_up_stack(self, frame: FrameType | None) -> int:
        """How many links are held by calls further up this stack: they cannot give them back while this call waits."""
        holders = list(self._held.values())
        count = 0
        while frame is not None:
            count += sum(holder is frame for holder in holders)
            frame = frame.f_back
        return count

    def give_back(self, link: L) -> None:
        """Free a link that is in the state in which the next call may use it."""
        if len(self._all) > self._limit:
            self.drop(link)
        else:
            self._held.pop(link, None)

    def drop(self, link: L) -> None:
        """Discard a link that must not be used again."""
        link.discard()
        self._all.pop(link, None)
        self._held.pop(link, None)

    def reclaim(self) -> None:
        """Drop the links of calls that have ended."""
        for link, frame in list(self._held.items()):
            try:
                frame.clear()
            except RuntimeError:
                continue  # it runs
            # Since `items`, the call may have given its link back and ended, and another call may have taken it.
            if self._held.get(link) is frame:
                self.drop(link)

    def is_held_here(self) -> bool:
        """Whether a call further up the stack of the calling thread has a link."""
        return bool(self._held) and self._held_up_stack(sys._getframe(1)) > 0

    def close(self, timeout: float) -> None:
        """Close the free links, within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        frame = sys._getframe()
        while (link := self.take_free(frame)) is not None:
            if self.pid == os.getpid():
                link.close(deadline - time.monotonic())
            self.drop(link)

    def forget(self) -> None:
        """In a forked child: the parent goes on with its links; only our copies of their sockets are closed."""
        for link in list(self._all):
            link.discard()


def say_goodbye(by_process: ByProcess[Links[L]], timeout: float) -> None:
    """At the end of the program: close the connections properly, so that the broker does not log a lost client."""
    if (links := by_process.peek()) is not None:
        links.close(timeout)
