"""`flask amqtask …`: the whole command line with the Flask app's application (entry-point group `flask.commands`).

Flask imports this with each of its own commands, so nothing heavy is imported here.
"""

from __future__ import annotations

from typing import Any

import click

from amqtask.ground.startup import pool_on_command_line


@click.command(
    "amqtask",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def command(ctx: click.Context, arguments: tuple[str, ...]) -> None:
    """Workers and tools of amqtask, e.g. `flask amqtask worker -l info`."""
    from amqtask.client.registry import app_of_flask
    from amqtask.pool import GREEN_POOLS

    pool = pool_on_command_line(arguments)
    if pool in GREEN_POOLS:
        raise click.UsageError(
            f"{pool} must patch Python before Flask is imported. Say `amqtask -A module:create_app worker -P {pool}`, "
            "with the name of your Flask app or of its factory."
        )
    flask: Any = ctx.obj.load_app()  # ctx.obj is Flask's ScriptInfo
    app = app_of_flask(flask)
    if app is None:
        raise click.UsageError(
            f"the Flask app {flask.name!r} has no amqtask application: make one with amqtask.contrib.flask.AmqTask(app), or "
            'put yours into app.extensions["amqtask"].'
        )
    ctx.exit(app.start(list(arguments)))
