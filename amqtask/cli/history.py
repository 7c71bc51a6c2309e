"""`amqtask history`: read what happened to tasks from the broker into the index, until Ctrl-C or TERM."""

from __future__ import annotations

import click

from amqtask.assembly import build_indexer
from amqtask.cli.broker import load_shared
from amqtask.cli.daemon import Process, runs_until_told
from amqtask.cli.globals import Globals
from amqtask.cli.output import echo, json_option, print_json
from amqtask.exceptions import OperationalError
from amqtask.ground.printable import count


@click.command("history")
@click.option("--once", is_flag=True, help="Take in what is there, and end.")
@runs_until_told
@json_option
@click.pass_obj
def command(settings: Globals, once: bool, process: Process, as_json: bool) -> int:
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
            print_json({"events": total}) if as_json else echo(f"{count(total, 'event')} taken in")
        else:
            process.run(settings, indexer.run, indexer.stop)
    except OperationalError as error:
        raise click.ClickException(str(error)) from error
    finally:
        indexer.close()
        app.close()
    return 0
