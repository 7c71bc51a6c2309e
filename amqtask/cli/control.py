"""`amqtask control COMMAND`: change running workers."""

from __future__ import annotations

from typing import Any

import click

from amqtask.cli.main import Globals
from amqtask.cli.remote import Remote, ask, find, listing, print_list, read_words, remote_options

# Those that --terminate and --signal are for.
REVOKING = ("revoke", "revoke_by_stamped_headers")


@click.command("control", epilog=listing("control"))
@click.argument("order", metavar="COMMAND", required=False)
@click.argument("words", metavar="[ARGUMENTS]...", nargs=-1)
@click.option("--list", "only_list", is_flag=True, help="List the commands and what they take.")
@click.option("--terminate", is_flag=True, help="revoke…: end the tasks that run, too.")
@click.option("--signal", metavar="NAME", help="revoke… --terminate: by this signal (default: SIGTERM).")
@click.option("--reload", is_flag=True, help="pool_restart: reload modules that are imported already.")
@remote_options
@click.pass_obj
def command(
    settings: Globals,
    order: str | None,
    words: tuple[str, ...],
    only_list: bool,
    terminate: bool,
    signal: str | None,
    reload: bool,
    remote: Remote,
) -> None:
    """Give all workers an order, or those of --destination. The exit code is 69 when none of them answers."""
    if only_list:
        print_list(settings, "control")
        return
    info = find(settings, "control", order)
    arguments = {**read_words(info, words), **_options(info.name, terminate, signal, reload)}
    if info.name == "pool_restart" and not words:
        arguments.pop("modules")  # all of them, as when app.control.pool_restart() is told none
    ask(
        settings,
        info,
        arguments,
        remote,
        may_be_silent=info.name == "shutdown",  # who was told to shut down does not answer
    )


def _options(order: str, terminate: bool, signal: str | None, reload: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if terminate or signal:
        if order not in REVOKING:
            raise click.UsageError(f"--terminate and --signal are for {' and '.join(REVOKING)}")
        found["terminate"] = True
        if signal:
            found["signal"] = signal
    if reload:
        if order != "pool_restart":
            raise click.UsageError("--reload is for pool_restart")
        found["reload"] = True
    return found
