"""`amqtask relay`: publish what waits in the outbox, or look at it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from amqtask.assembly import build_relay
from amqtask.cli.daemon import Process, runs_until_told
from amqtask.cli.globals import Globals
from amqtask.cli.output import echo, json_option, print_json
from amqtask.ground.printable import count
from amqtask.outbox.contract import Failing, Waiting
from amqtask.outbox.relay import BATCH, Relay

if TYPE_CHECKING:
    from amqtask.ground.shapes import JsonObject

SHOWN = 20


@click.command("relay")
@click.option("--once", is_flag=True, help="Publish what is due, and end.")
@click.option("--status", is_flag=True, help="Say what waits, and what could not be published.")
@click.option("--retry", is_flag=True, help="Make all that failed due at once, and end.")
@click.option("--interval", type=click.FloatRange(min=0.01), help="Seconds between two looks [outbox_interval].")
@click.option("--batch", type=click.IntRange(min=1), default=BATCH, show_default=True, help="Rows per transaction.")
@runs_until_told
@json_option
@click.pass_obj
def command(
    settings: Globals,
    once: bool,
    status: bool,
    retry: bool,
    interval: float | None,
    batch: int,
    process: Process,
    as_json: bool,
) -> int:
    """Publish the calls that committed transactions left in the outbox, until Ctrl-C or TERM.

    Several may run at once, also on other hosts. --status ends with 1 when something could not be published.
    """
    app = settings.load()
    relay = build_relay(app, batch=batch, interval=interval)
    try:
        if status:
            return _status(relay, as_json=as_json)
        if retry:
            due = relay.store.retry_now()
            _say({"due": due}, f"{count(due, 'row')} due again", as_json=as_json)
            return 0
        if once:
            done = relay.drain()
            summary = f"{count(done.sent, 'message')} published, {done.failed} failed"
            _say({"sent": done.sent, "failed": done.failed}, summary, as_json=as_json)
            return 1 if done.failed else 0
        process.run(settings, relay.run, relay.stop)
        return 0
    finally:
        relay.store.close()
        app.close()


def _status(relay: Relay, *, as_json: bool) -> int:
    waiting, failing = relay.store.waiting(), relay.store.failing(SHOWN)
    if as_json:
        oldest = waiting.oldest.isoformat() if waiting.oldest else None
        rows = [{**row._asdict(), "created_at": row.created_at.isoformat()} for row in failing]
        print_json({"waiting": waiting.rows, "oldest": oldest, "failing": waiting.failing, "rows": rows})
    else:
        for line in _lines(relay.store.name, waiting, failing):
            echo(line)
    return 1 if waiting.failing else 0


def _lines(name: str, waiting: Waiting, failing: Sequence[Failing]) -> list[str]:
    since = f", the oldest since {waiting.oldest:%Y-%m-%d %H:%M:%S}" if waiting.oldest else ""
    lines = [f"{name}: {count(waiting.rows, 'row')} waiting{since}"]
    lines += [f"  {row.id} {row.task}[{row.task_id}], {count(row.attempts, 'attempt')}: {row.error}" for row in failing]
    if waiting.failing > len(failing):
        lines.append(f"  and {waiting.failing - len(failing)} more")
    return lines


def _say(document: JsonObject, line: str, *, as_json: bool) -> None:
    if as_json:
        print_json(document)
    else:
        echo(line)
