"""`amqtask completion SHELL`: what makes a shell complete our commands, options, pools, queues and tasks."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from amqtask.cli.globals import COMPLETE_VARIABLE, PROGRAM

HOWTO = {
    "bash": 'eval "$(amqtask completion bash)" in ~/.bashrc',
    "zsh": 'eval "$(amqtask completion zsh)" in ~/.zshrc, after compinit',
    "fish": "amqtask completion fish > ~/.config/fish/completions/amqtask.fish",
}


@click.command("completion", epilog="\b\n" + "\n".join(f"  {line}" for line in HOWTO.values()))
@click.argument("shell", type=click.Choice(list(HOWTO)))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell."""
    completion_class = get_completion_class(shell)
    if completion_class is None:
        raise click.ClickException(f"the installed click has no completion for {shell}")
    click.echo(completion_class(ctx.find_root().command, {}, PROGRAM, COMPLETE_VARIABLE).source())
