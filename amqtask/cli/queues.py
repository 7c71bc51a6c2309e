"""`amqtask queues`: how much waits, who consumes, how fast it goes, how old the oldest message is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import click

from amqtask.cli.base import Globals, echo, json_option, print_json, print_table
from amqtask.cli.broker import api_option, chosen_queues, known_queues, load_shared, open_admin, open_api, task_routes
from amqtask.cli.params import complete_queues, queues_option
from amqtask.exceptions import QueueNotFound
from amqtask.ground.printable import count, duration, local_time
from amqtask.protocol.task import PUBLISHED_AT
from amqtask.remote.kept import pause_of
from amqtask.services.delayed import MOST_COUNTED, Which, look
from amqtask.topology.declarations import all_bindings, own_dead_letters
from amqtask.transport.contract import Admin, QueueState
from amqtask.transport.inventory import ManagementApi

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.ground.shapes import Headers, JsonFields, JsonObject, Replies
    from amqtask.remote.control import Control

# (title, field) in the order they are printed; a column that nobody knows anything of is left out.
COLUMNS = (
    ("QUEUE", "queue"),
    ("READY", "ready"),
    ("UNACKED", "unacked"),
    ("CONSUMERS", "consumers"),
    ("DEAD", "dead"),
    ("CHANGE/S", "change_per_second"),
    ("IN/S", "in_per_second"),
    ("OUT/S", "out_per_second"),
    ("OLDEST", "oldest_seconds"),
    ("PAUSED BY", "paused_by"),
)


@dataclass(slots=True)
class Row:
    """One queue; None is what is not known: the queue is not there, or nobody was asked.

    `unacked` are delivered and not yet acknowledged; `dead` wait in its dead-letter queue; `change_per_second` is how
    fast `ready` grew; `in_per_second` and `out_per_second` are publishes and acknowledgements; times are seconds.
    """

    queue: str
    ready: int | None = None
    unacked: int | None = None
    consumers: int | None = None
    dead: int | None = None
    change_per_second: float | None = None
    in_per_second: float | None = None
    out_per_second: float | None = None
    oldest_seconds: float | None = None
    paused_by: str | None = None


@click.group("queues", invoke_without_command=True)
@queues_option
@click.option(
    "-i",
    "--interval",
    type=click.FloatRange(min=0, min_open=True),
    help="Look twice, so many seconds apart, for CHANGE/S.",
)
@click.option("-w", "--watch", type=click.FloatRange(min=0.1), help="Look again every so many seconds, until Ctrl+C.")
@click.option(
    "--oldest",
    is_flag=True,
    help="Age of the oldest message, by its timestamp. Takes it and gives it back: it counts as delivered once more.",
)
@click.option(
    "--delayed",
    is_flag=True,
    help="The delayed tasks instead, by due time. Those in the broker count as delivered once more.",
)
@api_option
@json_option
@click.pass_context
def queues_command(
    ctx: click.Context,
    queues: tuple[str, ...],
    interval: float | None,
    watch: float | None,
    oldest: bool,
    delayed: bool,
    api: str | None,
    as_json: bool,
) -> int:
    """Depth, consumers, rates and age of the application's queues (or of -Q). Exit code 1 when one is not there.

    The last line has the delayed tasks (eta, countdown, retries) of all applications of the virtual host. Those that are
    due within minutes are in the hands of workers: `amqtask inspect scheduled` shows them, --api counts them as UNACKED.

    Over AMQP the broker tells what is ready, and how many consume; the management plugin (--api) also what is delivered and not
    yet acknowledged, and the rates in and out.
    """
    if ctx.invoked_subcommand is not None:
        return 0
    settings: Globals = ctx.obj
    if delayed:
        return _print_delayed(settings, queues, as_json)
    if watch and interval:
        raise click.UsageError(
            "--watch looks again and again, and has CHANGE/S from its second look on: leave --interval out"
        )
    app = settings.load()
    rows: list[Row] = []
    with ExitStack() as stack:
        look = _Look(app, queues, stack.enter_context(open_admin(app)), open_api(app, api) if api else None, oldest)
        for rows in look.repeatedly(watch or interval):
            if watch:
                _print(rows, look.missing, as_json, one_line=True)
            elif interval is None or look.times == 2:
                break
        if not watch:
            _print(rows, look.missing, as_json)
    if oldest and any(row.ready for row in rows) and not any(row.oldest_seconds is not None for row in rows):
        echo(
            "The messages do not say when they were published, so their age is not known: see the setting task_send_timestamp.",
            err=True,
        )
    return 1 if any(row.ready is None for row in rows) else 0


@queues_command.command("pause")
@click.argument("names", nargs=-1, required=True, shell_complete=complete_queues)
@json_option
@click.pass_obj
def pause(settings: Globals, names: tuple[str, ...], as_json: bool) -> None:
    """Have no worker consume queues until `amqtask queues resume`, whatever restarts meanwhile.

    What workers have begun goes on; what they only hold goes back. Celery's workers take no notice.
    """
    _pause_or_resume(settings, names, as_json, lambda control, name: control.pause_queue(name))


@queues_command.command("resume")
@click.argument("names", nargs=-1, required=True, shell_complete=complete_queues)
@json_option
@click.pass_obj
def resume(settings: Globals, names: tuple[str, ...], as_json: bool) -> None:
    """Have workers consume paused queues again."""
    _pause_or_resume(settings, names, as_json, lambda control, name: control.resume_queue(name))


def _pause_or_resume(
    settings: Globals, names: Sequence[str], as_json: bool, order: Callable[[Control, str], Replies]
) -> None:
    with load_shared(settings) as app:
        answers = {name: order(app.control, name) for name in names}
        paused = app.control.pauses.read()
    if as_json:
        print_json({"paused": [pause._asdict() for pause in paused.values()], "answers": answers})
        return
    for name, replies in answers.items():
        echo(f"{name} is {'paused' if name in paused else 'not paused'}; {count(len(replies), 'worker')} answered")


def _print_delayed(settings: Globals, queues: Sequence[str], as_json: bool) -> int:
    """The delayed tasks for these queues (all: of the virtual host), the soonest first."""
    with load_shared(settings) as app:
        waiting = look(app, Which())
    tasks = [task for task in waiting.tasks if not queues or any(Which(queue=name).has(task) for name in queues)]
    if as_json:
        print_json([asdict(task) for task in tasks])
    else:
        now = datetime.now(timezone.utc)
        print_table(
            ("DUE", "IN", "TASK", "ID", "QUEUE", "HELD BY"),
            [
                (
                    local_time(task.due),
                    duration(max(0.0, (task.due - now).total_seconds())),
                    task.task,
                    task.id,
                    task.queue,
                    task.held_by,
                )
                for task in tasks
            ],
        )
    if waiting.is_part:
        echo(
            f"{waiting.total} delayed tasks wait: more than {MOST_COUNTED} are not looked at one by one, so these are the first "
            "of each delay queue.",
            err=True,
        )
    return 0


class _Look:
    """Looks at the queues, again and again."""

    def __init__(
        self, app: AmqTask, names: tuple[str, ...], admin: Admin, api: ManagementApi | None, oldest: bool
    ) -> None:
        chosen = [queue for queue in chosen_queues(app, names) if not queue.broadcast]
        self._names = [(queue.name, own_dead_letters(queue, app.queue_defaults)) for queue in chosen]
        self._admin = admin
        # Where delayed tasks of all applications wait; whoever asks for some queues does not ask for these.
        levels = [name for _, name in app.delays.queue_names(())]
        self._delays = [] if names else levels if admin.delay_queues is None else list(admin.delay_queues)
        self._delays_name = f"{app.delays.prefix}.*"
        self._api = api
        self._oldest = oldest
        self._pauses = app.control.pauses
        self.times = 0
        # Queues that cannot be looked at, and why.
        self.missing: dict[str, str] = {}

    def repeatedly(self, seconds: float | None) -> Iterator[list[Row]]:
        """A list of rows now, and with `seconds` another so often."""
        rows = self._look()
        at = time.monotonic()
        yield rows
        while seconds is not None:
            self._admin.wait(seconds)
            last, before, at = {row.queue: row for row in rows}, at, time.monotonic()
            rows = self._look()
            for row in rows:
                old = last.get(row.queue, row)
                if row.ready is not None and old.ready is not None:
                    row.change_per_second = round((row.ready - old.ready) / (at - before), 3)
            yield rows

    def _look(self) -> list[Row]:
        self.times += 1
        self.missing = {}
        states = self._admin.states([name for pair in self._names for name in pair if name is not None])
        rows = [self._row(name, dead, states) for name, dead in self._names]
        paused = self._pauses.read()
        for row in rows:
            if (pause := pause_of(paused, row.queue)) is not None:
                row.paused_by = f"{pause.by} since {local_time(pause.began)}"
        delayed = self._delayed()
        if self._api is not None:
            by_name = {str(queue["name"]): queue for queue in self._api.queues()}
            for row in rows:
                _add(row, by_name.get(row.queue, {}))
            if delayed is not None:
                delayed.unacked = sum(
                    by_name.get(name, {}).get("messages_unacknowledged") or 0 for name in self._delays
                )
        if self._oldest:
            for row in rows:
                if row.ready:
                    row.oldest_seconds = self._age(row.queue)
        return rows if delayed is None else [*rows, delayed]

    def _delayed(self) -> Row | None:
        """All delay queues in a row; None where none has been made yet."""
        states = self._admin.states(self._delays).values()
        if not states:
            return None
        return Row(
            self._delays_name, sum(state.ready for state in states), consumers=max(state.consumers for state in states)
        )

    def _row(self, name: str, dead: str | None, states: Mapping[str, QueueState]) -> Row:
        row = Row(name)
        try:
            row.ready, row.consumers = states.get(name) or self._admin.state(name)
        except QueueNotFound as error:
            self.missing[name] = str(error)
            return row
        if dead is not None and dead in states:
            row.dead = states[dead].ready
        return row

    def _age(self, name: str) -> float | None:
        first = next(iter(self._admin.browse(name, 1)), None)
        return None if first is None else age(first.properties.timestamp, first.properties.headers or {}, time.time())


def age(timestamp: datetime | float | None, headers: Headers, now: float) -> float | None:
    """Seconds since a message was published, by its own or by the broker's timestamp; None when it has none.

    RabbitMQ writes one with `message_interceptors.incoming.set_header_timestamp.overwrite = false`
    (https://www.rabbitmq.com/docs/message-interceptors): the property, in whole seconds, and the header in milliseconds;
    our publishers write the header with `task_send_timestamp`.
    """
    exact = headers.get(PUBLISHED_AT)
    if isinstance(exact, int):
        return max(0.0, now - exact / 1000)
    if isinstance(timestamp, datetime):
        when = timestamp if timestamp.tzinfo else timestamp.replace(tzinfo=timezone.utc)
        return max(0.0, now - when.timestamp())
    return None if timestamp is None else max(0.0, now - timestamp)


def _add(row: Row, queue: JsonFields) -> None:
    """Add the figures that only the management plugin knows. They are some seconds old; a queue that it has not seen has none."""
    row.unacked = queue.get("messages_unacknowledged")
    stats = queue.get("message_stats") or {}
    row.in_per_second = _rate(stats, "publish_details")
    row.out_per_second = _rate(stats, "ack_details")
    head = queue.get("head_message_timestamp")
    row.oldest_seconds = age(head, {}, time.time()) if head else None


def _rate(stats: JsonFields, name: str) -> float | None:
    rate = (stats.get(name) or {}).get("rate")
    return None if rate is None else float(rate)


def _print(rows: Sequence[Row], missing: Mapping[str, str], as_json: bool, *, one_line: bool = False) -> None:
    data = [asdict(row) for row in rows]
    if as_json:
        print_json(data, one_line=one_line)
        return
    columns = [column for column in COLUMNS[:5] if column[1] != "unacked" or _is_known(data, "unacked")]
    columns += [column for column in COLUMNS[5:] if _is_known(data, column[1])]
    print_table([title for title, _ in columns], [[entry[field] for _, field in columns] for entry in data])
    for problem in missing.values():
        echo(problem, err=True)
    if one_line:
        echo()


def _is_known(data: Sequence[JsonFields], field: str) -> bool:
    return any(entry[field] is not None for entry in data)


# -- `amqtask list`: the application's tasks and where they go; the bindings of its queues.

# Each worker that consumes a broadcast has a queue of its own, `bcast.<unique>`.
ANY_BROADCAST = "bcast.*"


@click.group("list")
def list_command() -> None:
    """List tasks, or bindings."""


@list_command.command("tasks", short_help="Registered tasks, and where they go.")
@json_option
@click.pass_obj
def tasks(settings: Globals, as_json: bool) -> None:
    """The registered tasks, and the queue, exchange and routing key that a call of each goes to."""
    rows: list[JsonObject] = [
        {
            "task": name,
            "queue": route.queue.name if route is not None and route.queue is not None else None,
            "exchange": None if route is None else route.exchange,
            "routing_key": None if route is None else route.routing_key,
        }
        for name, route in task_routes(settings.load())
    ]
    if as_json:
        print_json(rows)
        return
    print_table(
        ["TASK", "QUEUE", "EXCHANGE", "ROUTING KEY"],
        [[row["task"], row["queue"], _exchange(row["exchange"]), row["routing_key"]] for row in rows],
    )


@list_command.command("bindings", short_help="Queues, exchanges and routing keys.")
@api_option
@json_option
@click.pass_obj
def bindings(settings: Globals, api: str | None, as_json: bool) -> None:
    """Queues, exchanges and routing keys: of the application's plan, or with --api all that the broker has."""
    app = settings.load()
    rows = _bound_on_broker(app, api) if api else list(_planned(app))
    if as_json:
        print_json(rows)
        return
    cells = [[row["destination"], _exchange(row["source"]), row["routing_key"]] for row in rows]
    print_table(["DESTINATION", "SOURCE", "ROUTING KEY"], cells)
    if not api:
        echo("These are planned; --api asks the broker's management plugin what is there.", err=True)


def _planned(app: AmqTask) -> Iterator[JsonObject]:
    for queue in known_queues(app):
        if not queue.broadcast:
            yield _row("", queue.name, "queue", queue.name, {})
        for binding in all_bindings(queue):
            destination_type = "exchange" if binding.to_exchange else "queue"
            to = ANY_BROADCAST if queue.broadcast else binding.destination
            yield _row(binding.source.name, to, destination_type, binding.routing_key, dict(binding.arguments))


def _bound_on_broker(app: AmqTask, api: str) -> list[JsonObject]:
    fields = ("source", "destination", "destination_type", "routing_key", "arguments")
    rows = [_row(*(entry[field] for field in fields)) for entry in open_api(app, api).bindings()]
    return sorted(rows, key=lambda row: (row["destination"], row["source"], row["routing_key"]))


def _row(
    source: str, destination: str, destination_type: str, routing_key: str, arguments: dict[str, object]
) -> JsonObject:
    return {
        "source": source,
        "destination": destination,
        "destination_type": destination_type,
        "routing_key": routing_key,
        "arguments": arguments,
    }


def _exchange(name: str | None) -> str | None:
    return "(default)" if name == "" else name
