"""Revoked tasks: the commands about them, and `hello`, with which workers exchange them (celery/worker/control.py)."""

from __future__ import annotations

import signal
import sys
import time
import uuid
from collections.abc import Callable, Container, Iterable, Mapping
from typing import TYPE_CHECKING

from amqtask.exceptions import AmqTaskError, ConfigurationError, PublishError, Unroutable
from amqtask.ground.loop import OneTimer
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.control import CANCEL, TREE, Command, command_message, read_reply, reply_exchange, reply_queue
from amqtask.worker.revoked import Revocations, Stamp, stamps_in

if TYPE_CHECKING:
    from amqtask.execution.request import Request
    from amqtask.ground.shapes import CommandArguments, JsonFields, JsonObject
    from amqtask.pool import Loop
    from amqtask.protocol.message import Delivery, Message
    from amqtask.services.command_context import Control
    from amqtask.transport.contract import Consumer

logger = bounded_logger("amqtask.worker")


def revoked(control: Control, arguments: CommandArguments) -> object:
    return list(control.worker.revoked.ids)


def hello(control: Control, arguments: CommandArguments) -> object:
    """A worker that starts sends its revokes and asks for ours."""
    after = arguments.get("revoked_after")
    answer = revoked_state(
        control, after=float(after) if after else 0.0, without=frozenset(arguments.get("revoked") or ())
    )
    learn_revoked(control, arguments)
    return {**answer, "clock": control.clock}


def revoked_state(control: Control, *, after: float = 0.0, without: Container[str] = ()) -> JsonObject:
    """The revokes of a `hello`, in both directions: ids as Celery 5.7 sends them, beside them fields that only we use.

    Only those that were revoked `after` that Unix time, and `without` the ids that the other worker has: lists may be long.
    """
    revocations = control.worker.revoked
    ids = {task_id: since for task_id, since in revocations.ids.items() if since >= after and task_id not in without}
    stamps = [[name, value, since] for (name, value), since in revocations.stamps.items() if since >= after]
    trees = {one: since for one, since in revocations.trees.items() if since >= after}
    return {
        "revoked": list(ids),
        "revoked_at": list(ids.values()),
        "revoked_stamps": stamps,
        "revoked_trees": trees,
    }


def learn_revoked(control: Control, state: JsonFields) -> None:
    """Take over the revokes of another worker; Celery's workers send only ids, or times that mean nothing here."""
    ids, times = list(state.get("revoked") or ()), state.get("revoked_at")
    if not isinstance(times, list) or len(times) != len(ids):
        times = [time.time()] * len(ids)
    stamps = {(str(name), value): float(since) for name, value, since in state.get("revoked_stamps") or ()}
    trees = {str(key): float(since) for key, since in (state.get("revoked_trees") or {}).items()}
    revoked = {str(key): float(since) for key, since in zip(ids, times, strict=True)}
    control.operations.learn_revoked(revoked, stamps, trees)


def revoke(control: Control, arguments: CommandArguments) -> object:
    ids = ids_of(arguments)
    if not ids:
        return {"error": "no task id was given"}
    is_tree = bool(arguments.get(TREE))
    matches = matcher(ids, is_tree=is_tree)
    if arguments.get(CANCEL):
        control.operations.ask_to_end(matches)
    if arguments.get("terminate"):
        return _terminate(control, arguments, lambda: control.operations.revoke(ids, tree=is_tree), matches)
    control.operations.revoke(ids, tree=is_tree)
    logger.info("Tasks flagged as revoked%s: %s", ", with all that belongs to them" if is_tree else "", ", ".join(ids))
    return {"ok": f"tasks {', '.join(ids)} flagged as revoked"}


def revoke_by_stamped_headers(control: Control, arguments: CommandArguments) -> object:
    headers = _by_name(arguments.get("headers"))
    stamps = stamps_of(arguments)
    if not stamps:
        return {"error": "no stamp was given: headers is {name: value or list of values}"}
    if arguments.get("terminate"):
        revocations = Revocations()
        revocations.add_stamps(stamps, time.time())
        return _terminate(
            control,
            arguments,
            lambda: control.operations.revoke_stamps(stamps),
            lambda request: revocations.covers(request.id, request.headers),
            otherwise=f"headers {headers} were not terminated",
        )
    control.operations.revoke_stamps(stamps)
    logger.info("Stamps flagged as revoked: %s", _spelled(stamps))
    return {"ok": f"headers {headers} flagged as revoked, but not terminated"}


def matcher(ids: Iterable[str], *, is_tree: bool) -> Callable[[Request], bool]:
    """Whether a request is one of these; with `is_tree` also whether it belongs to one."""
    revocations = Revocations(max_ids=sys.maxsize)
    (revocations.add_trees if is_tree else revocations.add)(ids, time.time())
    return lambda request: revocations.covers(request.id, request.headers)


def terminate(control: Control, arguments: CommandArguments) -> object:
    return revoke(control, {**arguments, "terminate": True})


def _terminate(
    control: Control,
    arguments: CommandArguments,
    flag: Callable[[], list[Request]],
    matches: Callable[[Request], bool],
    otherwise: str = "terminate: tasks unknown",
) -> object:
    """Revoke waiting requests and end running ones; neither when there is no such signal. `otherwise` is the reply when no
    request was here."""
    signum = signal_number(arguments.get("signal"))
    stopped = [request for request in flag() if matches(request)]
    ended, going_on = control.operations.terminate(matches, signum)
    if any(control.operations.find(request) is not None for request in going_on):
        names = ", ".join(request.id for request in going_on)
        return {"error": f"the {control.worker.pool.name} pool cannot end what runs: {names}"}
    names = ", ".join(dict.fromkeys(request.id for request in (*ended, *stopped)))
    logger.info("Terminating %s (%s)", names or "nothing that is here", arguments.get("signal") or "SIGTERM")
    return {"ok": f"terminate: {names}" if names else otherwise}


def signal_number(signal_name: object) -> int | None:
    """SIGTERM, TERM, 15 or "15" as a number; None for nothing. Raises: ConfigurationError."""
    if signal_name in (None, ""):
        return None
    upper_name = str(signal_name).upper()
    try:
        if upper_name.isdigit():
            return int(signal.Signals(int(upper_name)))
        return int(signal.Signals[upper_name if upper_name.startswith("SIG") else f"SIG{upper_name}"])
    except (KeyError, ValueError):
        raise ConfigurationError(f"there is no signal {signal_name!r} (it is like SIGTERM, KILL or 9)") from None


def ids_of(arguments: CommandArguments) -> dict[str, None]:
    """The task ids of an order, each once, in the given order."""
    task_ids = arguments.get("task_id") or arguments.get("task_ids") or ()
    return dict.fromkeys([task_ids] if isinstance(task_ids, str) else [str(task_id) for task_id in task_ids])


def stamps_of(arguments: CommandArguments) -> dict[Stamp, None]:
    """The stamps of an order, each once, in the given order."""
    return dict.fromkeys(stamps_in(_by_name(arguments.get("headers"))))


def _by_name(headers: object) -> dict[str, object]:
    """Stamps by their names, from a mapping, or from the command line's `name=value` arguments."""
    if isinstance(headers, Mapping):
        return {str(name): value for name, value in headers.items()}
    if isinstance(headers, (list, tuple)):
        by_name: dict[str, object] = {}
        for argument in headers:
            name, separator, value = str(argument).partition("=")
            if separator:
                values = by_name.setdefault(name, [])
                assert isinstance(values, list)
                values.append(value)
        return by_name
    return {}


def _spelled(stamps: Iterable[Stamp]) -> str:
    return ", ".join(f"{name}={value}" for name, value in stamps)


# -- Mingle: a worker that starts asks its neighbours for revoked tasks (celery/worker/consumer/mingle.py).
#
# Model. Before the worker has a mailbox, a command for nobody goes to all mailboxes, mandatory: when the broker returns it,
# there is no neighbour, and the worker starts its tasks. (One that starts in the same moment may be missed: it knows only what
# its state file has.) `hello` goes there once the worker has its own: when that copy is back, every neighbour has its copy,
# and answers within milliseconds unless it is busy. The number of neighbours is unknown; so with any the worker starts no task
# until no answer came for QUIET_SECONDS after its own copy or the last answer, but at most for HOLD_SECONDS after its start (a
# broker that is away must not hold it longer). Later answers are taken for LISTEN_SECONDS, and count for tasks that have not
# begun. After a lost connection it asks again, without holding tasks: revokes of the meantime did not reach it. It then asks
# only for those: after a restart of the broker all workers ask each other at once, and their lists may be long.

QUIET_SECONDS = 0.03
HOLD_SECONDS = 0.3
LISTEN_SECONDS = 5.0
PREFETCH = 100
NAMESAKE = (
    "another worker named %s is running: commands for one of them reach both, and monitors take them for one. Give each worker a "
    "name of its own (-n w2@%%h)."
)
# Clocks of two hosts differ, and a lost connection is noticed late (broker_heartbeat).
MARGIN_SECONDS = 600.0


class Mingle:
    """Asks and hears over the panel's publisher and consumer; the panel calls it with replies and events."""

    def __init__(
        self,
        control: Control,
        *,
        loop: Loop,
        publish: Callable[[Message, Callable[[PublishError | None], None]], None],
        accept: frozenset[str],
        serializer: str,
        prefix: str,
        queue_ttl: float,
        queue_expires: float,
    ) -> None:
        self._control = control
        self._publish = publish
        self._accept = accept
        self._serializer = serializer
        self._prefix = prefix
        self._oid = str(uuid.uuid4())
        self.queue = reply_queue(self._oid, prefix, ttl=queue_ttl, expires=queue_expires)
        self._ticket = ""
        self._neighbours = 0
        # Unix time at which the connection was lost; 0 after we have asked again.
        self._lost_at = 0.0
        self._is_holding = False
        self._has_held = False
        # What follows the look for neighbours, until it is called.
        self._and_then: Callable[[], None] | None = None
        # Timers that release the tasks: the latest one, and the one that each answer puts off.
        self._last_release, self._next_release = OneTimer(loop), OneTimer(loop)
        self._deaf_timer = OneTimer(loop)

    def start(self, and_then: Callable[[], None]) -> None:
        """The first time hold the worker's tasks back, and look whether it has neighbours; then, or now, call `and_then`, which
        has it take commands. It is ready when it does."""
        if self._has_held:
            and_then()
            return
        self._has_held = self._is_holding = True
        self._and_then = and_then
        self._control.worker.dispatcher.hold()
        self._control.worker.lifecycle.hold_back()
        self._last_release.set(HOLD_SECONDS, self._too_late)
        message = self._message(Command("ping", destination=(self._control.worker.setup.hostname,)))
        message.mandatory = True
        self._publish(message, self._looked)

    def _looked(self, error: PublishError | None) -> None:
        if isinstance(error, Unroutable):
            logger.info("mingle: all alone")
            self._release()
        self._go_on()

    def _too_late(self) -> None:
        self._release()
        self._go_on()
        self._control.worker.lifecycle.let_go()

    def _go_on(self) -> None:
        and_then, self._and_then = self._and_then, None
        if and_then is not None:
            and_then()

    def listen(self, consumer: Consumer) -> None:
        """Consume the queue for answers, also again, on a new connection."""
        if self._ticket and not self._lost_at:
            self._lost_at = time.time()
        self._deaf_timer.cancel()
        consumer.add_queue(self.queue, prefetch=PREFETCH)

    def ask(self, consumer: Consumer) -> None:
        """Send `hello`: the mailbox and the queue for answers are consumed now."""
        self._control.worker.lifecycle.let_go()
        self._ticket, self._neighbours = str(uuid.uuid4()), 0
        after = self._lost_at - MARGIN_SECONDS if self._lost_at else 0.0
        self._lost_at = 0.0
        arguments = {
            "from_node": self._control.worker.setup.hostname,
            **revoked_state(self._control, after=after),
            "revoked_after": after,
        }
        hello = Command(
            "hello",
            arguments,
            ticket=self._ticket,
            reply_exchange=reply_exchange(self._prefix).name,
            reply_key=self._oid,
        )
        message = self._message(hello)
        message.declare = ()  # the exchange exists, because the mailbox is bound to it
        logger.debug("mingle: searching for neighbors")
        self._publish(message, _note)
        self._deaf_timer.set(LISTEN_SECONDS, lambda: self._be_deaf(consumer))

    def _message(self, command: Command) -> Message:
        clock = self._control.lamport.forward()
        return command_message(command, self._prefix, serializer=self._serializer, clock=clock)

    def heard(self, hello: Command) -> bool:
        """A `hello` came: whether it is one of our own. Of the last one, all neighbours have their copies now."""
        if hello.ticket == self._ticket:
            self._release_soon()
        if hello.reply_key == self._oid:
            return True
        self._compare(str(hello.arguments.get("from_node")))
        return False

    def on_reply(self, delivery: Delivery) -> None:
        """A neighbour's answer."""
        try:
            reply = read_reply(*delivery.content, self._accept)
            if reply.ticket != self._ticket or not isinstance(reply.payload, dict) or "error" in reply.payload:
                return
            self._control.lamport.adjust(reply.payload.get("clock"))
            learn_revoked(self._control, reply.payload)
        except (AmqTaskError, TypeError, ValueError, OverflowError, AttributeError, RecursionError) as error:
            logger.warning("mingle: an answer that cannot be read: %s", error)
            return
        self._neighbours += 1
        logger.info("mingle: sync with %s", reply.nodename)
        self._compare(reply.nodename)
        self._release_soon()

    def _compare(self, nodename: str) -> None:
        # RabbitMQ has one mailbox for a name, so the second worker is refused; Redis has one for everybody.
        if nodename == self._control.worker.setup.hostname:
            logger.warning(NAMESAKE, nodename)

    # -- holding

    def _release_soon(self) -> None:
        self._next_release.cancel()
        if self._is_holding:
            self._next_release.set(QUIET_SECONDS, self._release)

    def _release(self) -> None:
        if self._is_holding:
            self._is_holding = False
            self._control.worker.dispatcher.release()
            self._control.worker.wake()

    def _be_deaf(self, consumer: Consumer) -> None:
        if not self._neighbours:
            logger.debug("mingle: no answer")
        consumer.cancel_queue(self.queue.name)

    def stop(self) -> None:
        """Cancel the timers, and release the held tasks."""
        for timer in (self._last_release, self._next_release, self._deaf_timer):
            timer.cancel()
        self._and_then = None
        self._release()


def _note(error: PublishError | None) -> None:
    if error is not None:
        logger.debug("mingle: nobody was asked: %s", error)
