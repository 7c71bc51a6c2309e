"""`amqtask beat`: send periodic tasks when they are due; list them; show what would be sent."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import click

from amqtask.beat.build import build_beat, leader_name, short_name
from amqtask.beat.contract import BeatOptions
from amqtask.beat.operating import KeepsToItself, Schedules, as_row, call_text
from amqtask.cli import daemon
from amqtask.cli.base import Globals, ParamType, echo, echo_text, json_option, print_json, print_table, with_options
from amqtask.cli.broker import refuse_memory
from amqtask.cli.daemon import expand, node_name
from amqtask.cli.logs import is_in_json, set_up
from amqtask.cli.params import Extensible, own_options
from amqtask.exceptions import OperationalError
from amqtask.ground import VERSION
from amqtask.ground.printable import bounded_logger

if TYPE_CHECKING:
    from datetime import tzinfo

    from amqtask.app import AmqTask
    from amqtask.beat.contract import Entry
    from amqtask.ground.shapes import JsonObject
    from amqtask.remote.kept import Pause

logger = bounded_logger("amqtask.beat")

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


class Duration(ParamType):
    """`90`, `30s`, `10m`, `24h`, `7d`."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        if isinstance(value, timedelta):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw]?)", str(value).strip())
        if match is None or float(match[1]) <= 0:
            self.fail(f"{value!r} is not a duration such as 90, 30s, 10m, 24h or 7d", param, ctx)
        return timedelta(seconds=float(match[1]) * _UNITS[match[2]])


@click.command("beat", cls=Extensible, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-A", "--app", "told_app", metavar="MODULE[:ATTR]", help="The application (also before `beat`).")
@click.option("--list", "lists", is_flag=True, help="List the entries with their last and next runs, then end.")
@click.option("--dry-run", type=Duration(), metavar="DURATION", help="Print what would be sent (24h), then end.")
@json_option
@click.option("--pause", metavar="ENTRY", help="Have no beat send this entry until somebody resumes it, then end.")
@click.option("--resume", metavar="ENTRY", help="Have the beat that leads send it again, then end.")
@click.option("--run", metavar="ENTRY", help="Send the task of this entry now, then end.")
@daemon.detach_option
@click.option("-s", "--schedule", type=click.Path(), help="The file with last runs [beat_schedule_filename].")
@click.option(
    "-S", "--scheduler", metavar="NAME", help="Where entries come from: file, memory, django, or module:Class."
)
@click.option(
    "--max-interval",
    type=click.FloatRange(min=0, min_open=True),
    help="Seconds between looks at the schedule, at most.",
)
@click.option(
    "--enable-remote-control/--no-enable-remote-control",
    "remote_control",
    default=None,
    help="Answer `inspect ping` [beat_enable_remote_control].",
)
@click.option("--relay", is_flag=True, help="Publish what waits in the outbox, too (see `amqtask relay`).")
@click.option("-n", "--hostname", metavar="NAME", help="Node name for `inspect ping` and file names.")
@daemon.loglevel_option("WARNING")
@daemon.log_format_option
@with_options(daemon.NODE)
@click.pass_obj
def command(settings: Globals, /, **params: Any) -> int:
    """Send periodic tasks: `amqtask -A tasks beat -l info`. Any number may run; one of them sends, the others wait."""
    app = settings.load(params["told_app"])
    own_options(app, click.get_current_context(), params)
    node = node_name(params["hostname"] or "celerybeat@%h")
    told = {name: params[name] for name in ("schedule", "scheduler", "max_interval", "remote_control")}
    options = BeatOptions(hostname=node, **told)
    try:
        if _is_done(app, options, params):
            return 0
    except KeepsToItself as error:
        raise click.UsageError(f"{error}.") from error
    logfile, pidfile = (expand(params[key], node) if params[key] else None for key in ("logfile", "pidfile"))
    daemon.become(pidfile=pidfile, logfile=logfile, **daemon.of_node(params))
    prints = set_up(
        app.conf,
        loglevel=params["loglevel"].upper(),
        logfile=logfile,
        log_format=params["log_format"],
        color=settings.color,
        hostname=node,
    )
    process = build_beat(app, options)
    if is_in_json(app.conf, params["log_format"]):
        about = {re.sub(r"\W+", "_", name): value for name, value in _about(app, options)}
        logger.info("beat: starting", extra=about)
    elif not settings.quiet:
        echo_text(_banner(_about(app, options)))
    relaying = None
    if params["relay"]:
        from amqtask.assembly import build_relaying

        relaying = build_relaying(app)
    with prints:
        if relaying is None:
            return process.run()
        relaying.start()
        try:
            return process.run()
        finally:
            relaying.stop()


def _is_done(app: AmqTask, options: BeatOptions, params: Mapping[str, Any]) -> bool:
    """Whether something was asked for that needs no beat; then it is done."""
    changes = {name: params[name] for name in ("pause", "resume", "run")}
    schedules = Schedules(app, options)
    if any(value is not None for value in changes.values()):
        refuse_memory(app)
        _change(schedules, **changes)
    elif params["lists"]:
        _list(schedules, app.timezone, as_json=params["as_json"])
    elif params["dry_run"] is not None:
        _show_what_would_be_sent(schedules, app.timezone, params["dry_run"], as_json=params["as_json"])
    else:
        return False
    return True


def _about(app: AmqTask, options: BeatOptions) -> list[tuple[str, str]]:
    return [
        ("app", app.main or "__main__"),
        ("broker", app.broker_name),
        ("entries from", short_name(options.scheduler or app.conf.beat_scheduler)),
        ("time zone", str(app.timezone)),
        ("leaders' queue", leader_name(app, options.scheduler)),
    ]


def _banner(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["", f" amqtask beat {VERSION}", "", *(f"  {name:<14} {value}" for name, value in rows), ""])


def _list(schedules: Schedules, zone: tzinfo, *, as_json: bool) -> None:
    now = datetime.now(timezone.utc)
    paused = _paused(schedules)
    scheduler = schedules.scheduler([_unless_paused(entry, paused) for entry in schedules.entries()], now)
    rows = []
    for name, entry in sorted(scheduler.entries.items()):
        pause = paused.get(name)
        by = None if pause is None else {"by": pause.by, "since": pause.began}
        rows.append(
            {**as_row(entry, scheduler.next_of(name)), "enabled": entry.enabled or pause is not None, "paused": by}
        )
    if as_json:
        print_json(rows)
        return
    print_table(
        ("name", "task", "schedule", "last run", "next run", "runs"),
        [
            (
                row["name"],
                row["task"],
                row["schedule"] + _state(row),
                *(_local(row[key], zone) for key in ("last_run_at", "next_due_at")),
                row["total_run_count"],
            )
            for row in rows
        ],
    )


def _paused(schedules: Schedules) -> dict[str, Pause]:
    try:
        return schedules.pauses.read()
    except OperationalError as error:
        echo(f"The broker does not say which are paused: {error}", err=True)
        return {}


def _unless_paused(entry: Entry, paused: Mapping[str, Pause]) -> Entry:
    return replace(entry, enabled=False) if entry.name in paused else entry


def _state(row: JsonObject) -> str:
    if row["paused"] is not None:
        return f" (paused by {row['paused']['by']})"
    return "" if row["enabled"] else " (disabled)"


def _show_what_would_be_sent(schedules: Schedules, zone: tzinfo, span: timedelta, *, as_json: bool) -> None:
    now = datetime.now(timezone.utc)
    paused = _paused(schedules)
    scheduler = schedules.scheduler([entry for entry in schedules.entries() if entry.name not in paused], now)
    for due in scheduler.upcoming(now + span):
        entry = due.entry
        if as_json:
            print_json(
                {"due_at": due.due_at, "name": entry.name, "task": entry.task, "args": list(entry.args),
                 "kwargs": dict(entry.kwargs), "options": dict(entry.options)},
                one_line=True,
            )  # fmt: skip
        else:
            echo(f"{_local(due.due_at, zone)}  {entry.name}  {call_text(entry)}")


def _change(schedules: Schedules, pause: str | None, resume: str | None, run: str | None) -> None:
    if pause is not None:
        done = schedules.pause(pause)
        echo(f"{pause} is paused, until `amqtask beat --resume`." if done else f"{pause} was paused already.")
    if resume is not None:
        echo(f"{resume} is resumed." if schedules.resume(resume) else f"{resume} was not paused.")
    if run is not None:
        echo(f"{run} is sent as {schedules.run(run)}.")


def _local(moment: datetime | None, zone: tzinfo | None) -> str | None:
    if moment is None:
        return None
    return moment.astimezone(zone).strftime("%Y-%m-%d %H:%M:%S%z")
