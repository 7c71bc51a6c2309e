"""`amqtask migrate`: move messages between brokers, or between queues of one broker, without losing any."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple

import click

from amqtask.app import AmqTask
from amqtask.cli import params
from amqtask.cli.base import Globals, echo, json_option, print_json, signals_to
from amqtask.cli.broker import api_option, known_queues, refuse_memory
from amqtask.cli.params import CommaList
from amqtask.exceptions import AppNotFound, OperationalError, QueueNotFound
from amqtask.ground.printable import count
from amqtask.protocol.message import Delivery, Message
from amqtask.services.delayed import delay_queues, seconds_until
from amqtask.topology.declarations import declarations, work_queue
from amqtask.topology.delays import TO_HEADER, waiting_priority
from amqtask.transport.broker import Broker, open_broker
from amqtask.transport.contract import BATCH, Admin, BrokerOptions, Moved, Publisher
from amqtask.transport.inventory import ManagementApi
from amqtask.worker.finisher import copied_properties

if TYPE_CHECKING:
    from amqtask.protocol.entities import Declaration


class Transfer(NamedTuple):
    """From one queue to another, and the message that a delivery becomes there; None for one that stays."""

    source: str
    destination: str
    convert: Callable[[Delivery], Message | None]

    def __str__(self) -> str:
        return self.source if self.source == self.destination else f"{self.source} -> {self.destination}"


@click.command("migrate")
@click.argument("source", required=False)
@click.argument("destination", required=False)
@click.option(
    "-Q",
    "--queues",
    type=CommaList(),
    default=(),
    shell_complete=params.complete_queues,
    help="Queues to move: a,b or old:new [the application's].",
)
@click.option("-T", "--tasks", type=CommaList(), default=(), help="Only these tasks; others stay.")
@click.option("-n", "--limit", type=click.IntRange(min=1), help="Stop after so many messages.")
@click.option("-F", "--forever", is_flag=True, help="Go on with what arrives later, until Ctrl+C.")
@click.option(
    "-t", "--timeout", type=click.FloatRange(min=0), default=1.0, show_default=True,
    help="With --forever: seconds between two looks at empty queues.",
)  # fmt: skip
@click.option("--delayed", is_flag=True, help="Also what waits for its time in the delay levels.")
@api_option
@click.option("--copy", is_flag=True, help="Leave the messages where they are, too.")
@click.option("-a", "--ack-messages", is_flag=True, help="Accepted for Celery's sake: messages are moved, see --copy.")
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@json_option
@click.pass_obj
def command(
    settings: Globals,
    source: str | None,
    destination: str | None,
    queues: tuple[str, ...],
    tasks: tuple[str, ...],
    limit: int | None,
    forever: bool,
    timeout: float,
    delayed: bool,
    api: str | None,
    copy: bool,
    ack_messages: bool,
    force: bool,
    as_json: bool,
) -> int:
    """Move messages from the broker SOURCE to the broker DESTINATION, or between queues of one broker (-Q old:new).

    Each message is acknowledged after the destination's confirm, so nothing is lost, however this ends; what was on its way
    when it is killed may be in both places. SOURCE is the application's broker unless told, DESTINATION is SOURCE unless told.
    """
    _refuse_nonsense(forever, delayed, copy, ack_messages, destination, tasks)
    app = _load(settings, is_told=bool(source and queues))
    if source is None:
        refuse_memory(app)
    origin = open_told(app, source) if source else app.broker
    target = open_told(app, destination) if destination else origin
    transfers = _transfers(app, queues, tasks)
    _refuse_circles(transfers, origin, target)
    if not force:
        where = f"from {origin.safe_url} to {target.safe_url}" if destination else f"on {origin.safe_url}"
        summary = ", ".join(map(str, transfers)) + (" and what is delayed" if delayed else "")
        click.confirm(f"{'Copy' if copy else 'Move'} messages {where}: {summary}?", abort=True, err=as_json)
    show = _show if sys.stderr.isatty() and not settings.quiet else None
    publisher = target.publisher(name="amqtask migrate", on_warning=lambda text: echo(text, err=True))
    try:
        with origin.admin() as admin, _stopping() as is_stopped:
            existing = _existing(admin, transfers, must_exist=bool(queues))
            if delayed:
                renames = {transfer.source: transfer.destination for transfer in transfers} if queues else None
                waiting = delay_queues(app, admin, ManagementApi(api, origin.addresses[0]) if api else None)
                # They first: what comes out meanwhile goes to the queues that are moved after them.
                existing = [
                    *(
                        Transfer(name, "the delay levels", Delayed(app, level, renames, tasks))
                        for level, name in waiting
                    ),
                    *existing,
                ]
            run = _Migration(admin, publisher, copy, show, is_stopped)
            run.all(existing, limit)
            while forever and run.may_go_on(limit):
                admin.wait(timeout)
                run.all(existing, limit)
            was_stopped = is_stopped()
    finally:
        publisher.close()
    return _tell(run, copy, was_stopped, as_json)


def _refuse_nonsense(
    forever: bool, delayed: bool, copy: bool, ack_messages: bool, destination: str | None, tasks: Sequence[str]
) -> None:
    if ack_messages and copy:
        raise click.UsageError("say either --ack-messages or --copy")
    if forever and (copy or tasks or delayed):
        raise click.UsageError(
            "--forever would look at what stays in the queue again and again; leave --copy, --tasks and --delayed out"
        )
    if delayed and not destination:
        raise click.UsageError("--delayed moves what waits for its time to another broker: say SOURCE and DESTINATION")


def _load(settings: Globals, *, is_told: bool) -> AmqTask:
    """The application; where brokers and queues are told, none is needed."""
    try:
        return settings.load()
    except AppNotFound:
        if settings.app or not is_told:
            raise
        return AmqTask("migrate", set_as_current=False)


def open_told(app: AmqTask, url: str) -> Broker:
    """The broker of a URL: with TLS if that says so, or cannot say it (sentinel://) and the application's settings have it."""
    is_secure = url.startswith(("amqps:", "rediss", "valkeys", "sentinel"))
    options = BrokerOptions(
        url,
        use_ssl=app.conf.broker_use_ssl if is_secure else None,
        transport_options=app.conf.broker_transport_options or {},
        event_exchange=app.conf.event_exchange,
    )
    return open_broker(options, {})


def _existing(admin: Admin, transfers: Sequence[Transfer], *, must_exist: bool) -> list[Transfer]:
    """Transfers from queues that exist. Raises: QueueNotFound, before anything moves, for a queue that was named."""
    existing = []
    for transfer in transfers:
        try:
            admin.state(transfer.source)
        except QueueNotFound:
            if must_exist:
                raise
            continue
        existing.append(transfer)
    return existing


class _Migration:
    """One connection to the source, one publisher to the destination, and what has moved so far, by queue."""

    def __init__(
        self,
        admin: Admin,
        publisher: Publisher,
        copy: bool,
        show: Callable[[Transfer, Moved], None] | None,
        is_stopped: Callable[[], bool],
    ) -> None:
        self._admin = admin
        self._publisher = publisher
        self._copy = copy
        self._show = show
        self._is_stopped = is_stopped
        self.done: dict[Transfer, Moved] = {}
        self.failure: OperationalError | None = None

    @property
    def moved(self) -> int:
        """How many messages have moved."""
        return sum(done.moved for done in self.done.values())

    def may_go_on(self, limit: int | None) -> bool:
        """Whether nobody has stopped the migration, the brokers are there, and the limit is not reached."""
        return not self._is_stopped() and self.failure is None and (limit is None or self.moved < limit)

    def all(self, transfers: Sequence[Transfer], limit: int | None) -> None:
        """Move what is in the queues now; `limit` counts the messages of all queues."""
        for transfer in transfers:
            if not self.may_go_on(limit):
                return
            try:
                self._move(transfer, None if limit is None else limit - self.moved)
            except OperationalError as error:  # the connection to the source broke; what has moved has moved
                self.failure = error

    def _move(self, transfer: Transfer, limit: int | None) -> None:
        before = self.done.setdefault(transfer, Moved())

        def on_progress(progress: Moved) -> None:
            self.done[transfer] = _sum(before, progress)
            if progress.is_over:
                self.failure = progress.failure
            if self._show is not None:
                self._show(transfer, self.done[transfer])

        self._admin.move(
            transfer.source,
            self._publisher,
            transfer.convert,
            limit=limit,
            acknowledge=not self._copy,
            is_stopped=self._is_stopped,
            on_progress=on_progress,
        )


def _sum(earlier: Moved, later: Moved) -> Moved:
    return Moved(
        earlier.moved + later.moved,
        earlier.repeated + later.repeated,
        earlier.kept + later.kept,
        later.failed,  # they stayed, and are counted again
        earlier.failure or later.failure,
    )


def _transfers(app: AmqTask, names: tuple[str, ...], tasks: Sequence[str]) -> list[Transfer]:
    pairs = [name.partition(":") for name in names] or [
        (queue.name, "", "") for queue in known_queues(app) if not queue.broadcast
    ]
    return [_transfer(app, old, new or old, tasks) for old, _, new in pairs]


def _transfer(app: AmqTask, source: str, destination: str, tasks: Sequence[str]) -> Transfer:
    declare = declare_queue(app, destination)

    def convert(delivery: Delivery) -> Message | None:
        return as_sent(delivery, destination, declare) if is_wanted(delivery, tasks) else None

    return Transfer(source, destination, convert)


def _refuse_circles(transfers: Sequence[Transfer], origin: Broker, target: Broker) -> None:
    if _places(origin).isdisjoint(_places(target)):
        return
    for transfer in transfers:
        if transfer.source == transfer.destination:
            raise click.UsageError(
                f"queue {transfer.source!r} would move onto itself; name another queue (-Q {transfer.source}:NEW) or "
                "another broker (SOURCE DESTINATION)"
            )


def _places(broker: Broker) -> set[object]:
    """Where its queues are: a host and a virtual host, or a server and a database."""
    return {(address.host, address.port, address.vhost) for address in broker.addresses} or {broker.safe_url}


@contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """Let Ctrl+C and TERM wait for the batch on its way; a second one ends at once."""
    received: list[int] = []

    def stop(signum: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(signum)

    with signals_to(stop, signal.SIGINT, signal.SIGTERM):
        yield lambda: bool(received)


def _show(transfer: Transfer, done: Moved) -> None:
    click.echo("\r", nl=False, err=True)
    echo(f"{transfer.source} -> {transfer.destination}: {done.moved}", nl=False, err=True)


def _tell(run: _Migration, copy: bool, stopped: bool, as_json: bool) -> int:
    done = run.done
    failed = sum(counts.failed for counts in done.values())
    failure = run.failure or next((counts.failure for counts in done.values() if counts.failed), None)
    if as_json:
        print_json(
            {
                "queues": [
                    {
                        "source": transfer.source,
                        "destination": transfer.destination,
                        **{name: getattr(counts, name) for name in ("moved", "repeated", "kept", "failed")},
                    }
                    for transfer, counts in done.items()
                ],
                "stopped": stopped,
                "error": str(failure) if failure else None,
            }
        )
    else:
        _print(done, copy, stopped)
        if failure is not None:
            prefix = f"{count(failed, 'message')} could not be published and stay where they were: " if failed else ""
            echo(f"amqtask: {prefix}{failure}", err=True)
    return 1 if failure is not None else 0


def _print(done: dict[Transfer, Moved], copy: bool, stopped: bool) -> None:
    if done and sys.stderr.isatty():
        click.echo("\r", nl=False, err=True)
    for transfer, counts in done.items():
        kept = f", {counts.kept} of other tasks stay" if counts.kept else ""
        moved = count(counts.moved, "message")
        echo(f"{transfer.source} -> {transfer.destination}: {moved} {'copied' if copy else 'moved'}{kept}")
        if counts.repeated:
            echo(
                f"  {counts.repeated} of them had been delivered before. If an earlier migration was killed, up to {BATCH} may "
                "be there twice.",
                err=True,
            )
    if stopped:
        echo("Stopped; run it again for the rest.", err=True)


# -- What is published: messages as they were sent, and delayed ones with the time that is left to them.


def as_sent(delivery: Delivery, queue: str, declare: tuple[Declaration, ...] = ()) -> Message:
    """The message for another queue: all as it is, but for what the broker wrote on its way here; and it survives a restart.

    Its own time to live (`expiration`) begins again.
    """
    properties = replace(copied_properties(delivery.properties), expiration=delivery.properties.expiration)
    return Message(delivery.body, properties, exchange="", routing_key=queue, declare=declare)


def is_wanted(delivery: Delivery, tasks: Sequence[str]) -> bool:
    """Whether its task is among those; all are when none are named."""
    return not tasks or (delivery.properties.headers or {}).get("task") in tasks


def declare_queue(app: AmqTask, name: str) -> tuple[Declaration, ...]:
    """As the application has the queue; one that it does not know, and may not create, as a missing queue is made."""
    try:
        return app.queues.declarations(app.queues[name])
    except QueueNotFound:
        return declarations(work_queue(name, app.queue_defaults), app.queue_defaults)


class Delayed:
    """Turns a delayed message of a level into one that waits for the rest of its time at the destination. `renames` are the
    queues (old → new) whose messages are meant; None: all."""

    def __init__(self, app: AmqTask, level: int, renames: Mapping[str, str] | None, tasks: Sequence[str]) -> None:
        self._app = app
        self._level = level
        self._renames = renames
        self._tasks = tasks
        self._declared: dict[tuple[str, str], tuple[Declaration, ...]] = {}

    def __call__(self, delivery: Delivery) -> Message | None:
        headers = delivery.properties.headers or {}
        to_exchange, key = headers.get(TO_HEADER), delivery.routing_key
        exchange = to_exchange if isinstance(to_exchange, str) else ""
        if self._renames is not None:
            if exchange or key not in self._renames:
                return None
            key = self._renames[key]
        if not is_wanted(delivery, self._tasks):
            return None
        properties = replace(copied_properties(delivery.properties), priority=waiting_priority(delivery.properties))
        message = Message(delivery.body, properties, exchange, key, self._declare(exchange, key))
        return self._app.delays.delayed(message, seconds_until(headers, self._level))

    def _declare(self, exchange: str, key: str) -> tuple[Declaration, ...]:
        """What the target needs: a queue's declarations, or those of the application's queues that are bound to an exchange."""
        address = (exchange, "" if exchange else key)
        if address not in self._declared:
            self._declared[address] = self._on(exchange) if exchange else declare_queue(self._app, key)
        return self._declared[address]

    def _on(self, exchange: str) -> tuple[Declaration, ...]:
        bound = [queue for queue in known_queues(self._app) if queue.exchange and queue.exchange.name == exchange]
        return tuple(declaration for queue in bound for declaration in self._app.queues.declarations(queue))
