"""What runs until it is told to end: `amqtask relay` publishes what waits in the outbox, `amqtask history` fills the index."""

from __future__ import annotations

from collections.abc import Sequence

import click

from amqtask.assembly import build_indexer, build_relay
from amqtask.cli.base import Globals, echo, json_option, print_json, tell
from amqtask.cli.broker import load_shared
from amqtask.cli.daemon import Process, runs_until_told
from amqtask.exceptions import OperationalError
from amqtask.ground.printable import count
from amqtask.outbox.contract import Failing, Waiting
from amqtask.outbox.relay import BATCH, Relay

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
            tell({"due": due}, f"{count(due, 'row')} due again", as_json=as_json)
            return 0
        if once:
            done = relay.drain()
            summary = f"{count(done.sent, 'message')} published, {done.failed} failed"
            tell({"sent": done.sent, "failed": done.failed}, summary, as_json=as_json)
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


# -- `amqtask history`: read what happened to tasks from the broker into the index, until Ctrl-C or TERM.


@click.command("history")
@click.option("--once", is_flag=True, help="Take in what is there, and end.")
@runs_until_told
@json_option
@click.pass_obj
def history_command(settings: Globals, once: bool, process: Process, as_json: bool) -> int:
    """Index the events that the broker has kept (task_history), so that `amqtask tasks` and app.history find them.

    The index is what history_url names. One process for all is enough; where two share an index, one at a time goes on.
    """
    app = load_shared(settings)
    indexer = build_indexer(app)
    try:
        if once:
            while indexer.read_once():
                pass
            total = indexer.count
            tell({"events": total}, f"{count(total, 'event')} taken in", as_json=as_json)
        else:
            process.run(settings, indexer.run, indexer.stop)
    except OperationalError as error:
        raise click.ClickException(str(error)) from error
    finally:
        indexer.close()
        app.close()
    return 0
