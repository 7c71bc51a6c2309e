"""`amqtask history`: read what happened to tasks from the broker into the index, until Ctrl-C or TERM."""

from __future__ import annotations

import click

from amqtask.assembly import build_indexer
from amqtask.cli import daemon
from amqtask.cli.broker import refuse_memory
from amqtask.cli.globals import Globals
from amqtask.cli.logs import LEVELS, check_logfile, set_up
from amqtask.cli.output import echo, json_option, print_json
from amqtask.exceptions import OperationalError
from amqtask.ground.printable import count


@click.command("history")
@click.option("--once", is_flag=True, help="Take in what is there, and end.")
@click.option("-l", "--loglevel", type=click.Choice(LEVELS, case_sensitive=False), default="INFO", show_default=True)
@click.option("--log-format", metavar="FORMAT", help="`json`, or a logging format string.")
@click.option("-f", "--logfile", help="Log to this file.")
@click.option("-D", "--detach", is_flag=True, help="Run in the background.")
@click.option("--pidfile", type=click.Path(), help="Write the process id here.")
@json_option
@click.pass_obj
def command(
    settings: Globals,
    once: bool,
    loglevel: str,
    log_format: str | None,
    logfile: str | None,
    detach: bool,
    pidfile: str | None,
    as_json: bool,
) -> int:
    """Index the events that the broker has kept (task_history), so that `amqtask tasks` and app.history find them.

    The index is what history_url names. One process for all is enough; where two share an index, one at a time goes on.
    """
    app = settings.load()
    refuse_memory(app)
    indexer = build_indexer(app)
    try:
        if once:
            while indexer.read_once():
                pass
            total = indexer.count
            print_json({"events": total}) if as_json else echo(f"{count(total, 'event')} taken in")
            return 0
        if logfile:
            check_logfile(logfile)
        daemon.become(pidfile=pidfile, in_background=detach, uid=None, gid=None, umask=None)
        prints = set_up(
            app.conf, loglevel=loglevel.upper(), logfile=logfile, log_format=log_format, color=settings.color
        )
        with prints:
            daemon.until_told(indexer.run, indexer.stop)
    except OperationalError as error:
        raise click.ClickException(str(error)) from error
    finally:
        indexer.close()
        app.close()
    return 0
