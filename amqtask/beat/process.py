"""A process that does nothing but beat: its loop, its signals, its end."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from amqtask.exceptions import MessageError
from amqtask.ground import systemd
from amqtask.ground.loop import OneTimer
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.control import PREFIX, mailbox, read_command, reply_message
from amqtask.transport.contract import ConsumerListener
from amqtask.worker.shutdown import EX_FAILURE, EX_OK, SignalHandlers

if TYPE_CHECKING:
    from amqtask.beat.contract import BeatService
    from amqtask.pool import Loop
    from amqtask.protocol.message import Delivery
    from amqtask.transport.contract import Consumer, LoopPublisher


# -- Answers `inspect ping` as the node `celerybeat@host`, and nothing else (celery/beat.py, BeatPidbox): for health checks.
#
# It lives on beat's own loop, so that it answers is a sign that beat turns.

logger = bounded_logger("amqtask.beat")

RETRY_SECONDS = 30.0


class Pinged(ConsumerListener):
    """Listens on a mailbox of its own; `start` and `stop`. Consumer (without acks) and publisher are made when it connects."""

    def __init__(
        self,
        nodename: str,
        *,
        loop: Loop,
        make_transport: Callable[[], tuple[Callable[[ConsumerListener], Consumer], LoopPublisher]],
        accept: frozenset[str],
        serializer: str = "json",
        prefix: str = PREFIX,
    ) -> None:
        self.nodename = nodename
        self._make_transport = make_transport
        self._accept = accept
        self._serializer = serializer
        self._mailbox = mailbox(nodename, prefix)
        self._consumer: Consumer | None = None
        self._publisher: LoopPublisher | None = None
        self._timer = OneTimer(loop)
        self._is_stopped = False

    def start(self) -> None:
        """Begin to consume the mailbox."""
        if self._consumer is None and not self._is_stopped:
            make_consumer, self._publisher = self._make_transport()
            self._consumer = make_consumer(self)
            self._consumer.add_queue(self._mailbox, prefetch=10)
            self._consumer.start()
            self._publisher.start()

    def stop(self) -> None:
        """Stop consuming, and close the connection."""
        self._is_stopped = True
        self._timer.cancel()
        self._drop()

    def _drop(self) -> None:
        consumer, self._consumer = self._consumer, None
        publisher, self._publisher = self._publisher, None
        if publisher is not None:
            publisher.stop()
        if consumer is not None:
            consumer.stop()

    # -- what the consumer tells

    def on_delivery(self, delivery: Delivery) -> None:
        """A command: only ping is for us, and an error would spoil the answers of workers."""
        try:
            command = read_command(*delivery.content, self._accept)
        except MessageError as error:
            logger.debug("beat: a message that is not a command: %s", error)
            return
        if command.method == "ping" and command.wants_reply and command.is_for(self.nodename) and self._publisher:
            reply = reply_message(command, self.nodename, {"ok": "pong"}, serializer=self._serializer)
            self._publisher.publish(reply, lambda error: None)

    def on_connection_lost(self, error: Exception) -> None:
        """The consumer connects again by itself."""
        logger.info("beat: the connection for remote control is lost: %s", error)

    def on_warning(self, text: str) -> None:
        """Log at debug level only: beat's own connection has the same warning."""
        logger.debug("beat: remote control: %s", text)

    def on_fatal(self, error: Exception) -> None:
        """No queue of that name can be had, as a rule because another beat has it: log, and try again later."""
        logger.warning(
            "beat: no answers to ping as %s, trying again later: is there another beat of that name? Give each its own "
            "(-n beat2@%%h). (%s)",
            self.nodename,
            error,
        )
        self._drop()
        if not self._is_stopped:
            self._timer.set(RETRY_SECONDS, self.start)


# Seconds that the end of the process waits for messages on their way to the broker.
STOP_SECONDS = 5.0


class RunnableLoop(Protocol):
    """A loop that this process turns."""

    def run(self) -> None: ...

    def stop(self) -> None: ...

    def close(self) -> None: ...


class Service(Protocol):
    """A service that runs on beat's loop, too."""

    def start(self) -> None: ...

    def stop(self) -> None: ...


class BeatProcess:
    """Runs one beat until TERM, INT or QUIT, or until it cannot go on. A second signal ends it on the spot."""

    def __init__(
        self,
        loop: Loop,
        runner: RunnableLoop,
        make_beat: Callable[[Callable[[Exception], None]], BeatService],
        companion: Service | None = None,
    ) -> None:
        self._companion = companion
        self._loop = loop
        self._runner = runner
        self.beat = make_beat(self._fail)
        self.exit_code = EX_OK
        self._is_ending = False
        self._handlers = SignalHandlers(loop, self._on_signal)
        self._notifier = systemd.Notifier(loop, is_stopping=lambda: self._is_ending)

    def run(self, *, install_signals: bool = True) -> int:
        """Run beat until it ends; returns the exit code."""
        if install_signals:
            self._handlers.install()
        try:
            self.beat.start()
            if self._companion is not None:
                self._companion.start()
            if systemd.is_asked():
                self._notifier.start()
            self._runner.run()
        finally:
            self._notifier.stop()
            self._handlers.restore()
            self._runner.close()
        return self.exit_code

    def stop(self) -> None:
        """End in good order; may be called from any thread."""
        self._loop.call_soon_threadsafe(lambda: self._on_signal(signal.SIGTERM))

    def _on_signal(self, signum: int) -> None:
        if self._is_ending:
            self._runner.stop()
            return
        self._is_ending = True
        if self._companion is not None:
            self._companion.stop()
        self.beat.stop(self._runner.stop)
        self._loop.call_later(STOP_SECONDS, self._runner.stop)

    def _fail(self, error: Exception) -> None:
        self.exit_code = EX_FAILURE
        self._on_signal(signal.SIGTERM)
