"""The panel: answers Celery's remote control (pidbox) on a connection of its own.

A worker's mailbox is exclusive to its connection, so that a second worker of the same name is noticed: it logs that, works on,
and gets no remote control until the name is free. So it tries again from time to time: after a lost connection that the broker
has not noticed yet, its own name becomes free by itself.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from amqtask.exceptions import AccessRefused, AmqTaskError, EncodeError, MessageError
from amqtask.ground.loop import Aside, OneTimer
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.control import Command, mailbox, read_command, reply_exchange, reply_message
from amqtask.protocol.serialization import signs
from amqtask.remote.commands import find_custom
from amqtask.services.command_context import Control, Later, PanelState
from amqtask.services.revoking import Mingle
from amqtask.transport.contract import ConsumerListener
from amqtask.transport.declare import QueueLocked

if TYPE_CHECKING:
    from amqtask.exceptions import PublishError
    from amqtask.pool import Loop
    from amqtask.protocol.message import Delivery, Message
    from amqtask.transport.contract import Consumer, LoopPublisher

logger = bounded_logger("amqtask.worker")

RETRY_SECONDS = 30.0
PREFETCH = 100
# Questions at once that wait for a server, each in a thread of its own.
MOST_ASKING = 10


class Panel(ConsumerListener):
    """Consumes the worker's mailbox and replies. The publisher for replies and questions connects with the first one.

    `make_consumer` makes a consumer without acks: a command that is lost with its worker is useless for another one. With
    `mingles` a worker that starts asks its neighbours for revoked tasks. `on_listening`: it hears orders (again).
    """

    name = "panel"

    def __init__(
        self,
        control: Control,
        *,
        loop: Loop,
        make_consumer: Callable[[ConsumerListener], Consumer],
        make_publisher: Callable[[], LoopPublisher],
        accept: frozenset[str],
        serializer: str = "json",
        prefix: str = "celery",
        queue_ttl: float = 300.0,
        queue_expires: float = 10.0,
        mingles: bool = False,
        on_listening: Callable[[], None] = lambda: None,
    ) -> None:
        self._control = control
        self._loop = loop
        self._make_consumer = make_consumer
        self._make_publisher = make_publisher
        self._accept = accept
        self._serializer = serializer
        self._writing = Aside(loop, is_slow=signs(serializer))
        self._on_listening = on_listening
        self._prefix = prefix
        self._hostname = control.worker.setup.hostname
        self._state = PanelState(control)
        self._mailbox = mailbox(self._hostname, prefix, ttl=queue_ttl, expires=queue_expires)
        self._mingle = (
            Mingle(
                control,
                loop=loop,
                publish=self._publish,
                accept=accept,
                serializer=serializer,
                prefix=prefix,
                queue_ttl=queue_ttl,
                queue_expires=queue_expires,
            )
            if mingles
            else None
        )
        self._consumer: Consumer | None = None
        self._publisher: LoopPublisher | None = None
        self._timer = OneTimer(loop)
        self._asking = 0
        self._has_warned = False
        self._stopped = False

    def start(self) -> None:
        if self._consumer is None and not self._stopped:
            if self._mingle is None:
                self._consume()
            else:
                self._mingle.start(self._consume)

    def _consume(self) -> None:
        self._consumer = self._make_consumer(self)
        self._consumer.add_queue(self._mailbox, prefetch=PREFETCH)
        if self._mingle is not None:
            self._mingle.listen(self._consumer)
        self._consumer.start()

    def stop(self) -> None:
        self._stopped = True
        self._timer.cancel()
        if self._mingle is not None:
            self._mingle.stop()
        self._writing.finish()
        if self._publisher is not None:
            self._publisher.stop()
        self._drop_consumer()

    def go_to(self, host: str, reason: str) -> None:
        """Take commands over this host."""
        if self._consumer is not None:
            self._consumer.go_to(host, reason)

    def _drop_consumer(self) -> None:
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            consumer.stop()

    # -- commands

    def on_delivery(self, delivery: Delivery) -> None:
        if self._mingle is not None and delivery.queue == self._mingle.queue.name:
            self._mingle.on_reply(delivery)
            return
        try:
            command = read_command(*delivery.content, self._accept)
        except MessageError as error:
            logger.warning("control: a message that is not a command: %s", error)
            return
        self._control.lamport.adjust((delivery.properties.headers or {}).get("clock"))
        if self._mingle is not None and command.method == "hello" and self._mingle.heard(command):
            return
        self._control.heard(command)
        if command.is_for(self._hostname):
            self._obey(command)

    def _obey(self, command: Command) -> None:
        logger.debug("control: %s %s", command.method, dict(command.arguments))
        payload = self._answer(command, partial(self._run, command))
        if isinstance(payload, Later) and self._asking >= MOST_ASKING:
            payload = {"error": f"{MOST_ASKING} such questions wait for an answer already"}
        if isinstance(payload, Later):
            self._asking += 1
            arguments = (command, payload)
            threading.Thread(target=self._ask, args=arguments, name=f"amqtask {command.method}", daemon=True).start()
        elif command.wants_reply and payload is not None:
            self._reply(command, payload)

    def _answer(self, command: Command, answer: Callable[[], object]) -> object:
        try:
            return answer()
        except AmqTaskError as error:
            return {"error": str(error)}
        except Exception as error:  # a user's command, or arguments of anybody's
            logger.exception("control: command %s failed", command.method)
            return {"error": repr(error)}

    def _ask(self, command: Command, later: Later) -> None:
        """In a thread of its own: the loop goes on meanwhile."""
        answer: Callable[[], object]
        try:
            answer = partial(later.answer, later.ask())
        except Exception as error:  # noqa: BLE001 - `_answer` logs it, and it is the answer
            answer = partial(_raise, error)
        self._loop.call_soon_threadsafe(lambda: self._found(command, answer))

    def _found(self, command: Command, answer: Callable[[], object]) -> None:
        self._asking -= 1
        if command.wants_reply and not self._stopped:
            self._reply(command, self._answer(command, answer))

    def _run(self, command: Command) -> object:
        from amqtask.services.commands import COMMANDS

        custom = find_custom(command.method)
        if custom is not None:
            return custom(self._state, **command.arguments)
        function = COMMANDS.get(command.method)
        if function is None:
            logger.error("No such control command: %s", command.method)
            return {"error": f"no such command: {command.method!r}"}
        return function(self._control, command.arguments)

    def _reply(self, command: Command, payload: object) -> None:
        if signs(self._serializer):
            # What a thread signs must not change meanwhile; of what has no copy `_written` says that it cannot be sent.
            with contextlib.suppress(Exception):
                payload = copy.deepcopy(payload)
        self._writing.make(partial(self._written, command, payload), partial(self._send, command))

    def _written(self, command: Command, payload: object) -> Message:
        try:
            return self._reply_message(command, payload)
        except EncodeError as error:
            logger.error("control: the reply to %s cannot be sent: %s", command.method, error)
            return self._reply_message(command, {"error": f"the reply cannot be sent: {error}"})

    def _send(self, command: Command, message: Message) -> None:
        exchange = reply_exchange(self._prefix)
        if command.reply_exchange == exchange.name:
            message.declare = (exchange,)
        self._publish(message, _note_reply)

    def _publish(self, message: Message, on_done: Callable[[PublishError | None], None]) -> None:
        if self._publisher is None:
            self._publisher = self._make_publisher()
            self._publisher.start()
        self._publisher.publish(message, on_done)

    def _reply_message(self, command: Command, payload: object) -> Message:
        return reply_message(command, self._hostname, payload, serializer=self._serializer, clock=self._control.clock)

    # -- the consumer's events

    def on_consuming(self, epoch: int) -> None:
        if self._has_warned:
            self._has_warned = False
            logger.warning("control: remote control of %s works again", self._hostname)
        if self._mingle is not None and self._consumer is not None:
            self._mingle.ask(self._consumer)
        self._on_listening()

    def on_connection_lost(self, error: Exception) -> None:
        logger.info("control: connection lost: %s", error)
        if self._mingle is not None and self._consumer is not None:
            self._mingle.listen(self._consumer)

    def on_cancelled(self, queue: str, reason: str) -> None:
        logger.debug("control: consumer cancelled: %s", reason)

    def on_warning(self, text: str) -> None:
        logger.debug("control: %s", text)

    def on_fatal(self, error: Exception) -> None:
        """Usually the mailbox is locked by another owner; the worker goes on without remote control."""
        if not self._has_warned:
            self._has_warned = True
            logger.warning("%s: this one takes no remote control. %s (%s)", *self._reason(error), error)
        self._drop_consumer()
        if not self._stopped:
            self._timer.set(RETRY_SECONDS, self.start)

    def _reason(self, error: Exception) -> tuple[str, str]:
        """Why the mailbox cannot be consumed, and what to do."""
        if isinstance(error, QueueLocked):
            return f"another worker named {self._hostname} is running", "Give each worker a name of its own (-n w2@%h)."
        if isinstance(error, AccessRefused):
            return (
                f"the broker's user may not have the mailbox of worker {self._hostname}",
                "It needs rights on queues and exchanges named *.celery.pidbox and *.reply.celery.pidbox; a worker that is not "
                "to be asked says worker_enable_remote_control = False.",
            )
        return f"worker {self._hostname} cannot have its mailbox", "It tries again."


def _raise(error: Exception) -> NoReturn:
    raise error


def _note_reply(error: PublishError | None) -> None:
    if error is not None:
        logger.debug("control: a reply was not delivered: %s", error)
