"""`amqtask console`: serve the console."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

import click

from amqtask.cli.base import Globals, echo
from amqtask.cli.broker import load_shared
from amqtask.cli.daemon import log_format_option, loglevel_option
from amqtask.cli.handover import is_repeated
from amqtask.cli.logs import set_up
from amqtask.exceptions import ConfigurationError
from amqtask.ground.plugins import load

_LOCAL = ("127.0.0.1", "::1", "localhost")


@click.command("console")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; others than this machine need users."
)
@click.option("-p", "--port", type=click.IntRange(0, 65535), default=5556, show_default=True, help="Port to listen on.")
@click.option(
    "--user",
    multiple=True,
    metavar="NAME:HASH",
    help="Who may come, beside console_users; --hash-password prints HASH.",
)
@click.option("--no-index", is_flag=True, help="Leave the reading of kept events to `amqtask history`.")
@click.option("--no-alerts", is_flag=True, help="Leave the look-out for alerts to another console.")
@click.option("--fd", type=int, hidden=True, help="The number of a socket that listens already.")
@click.option("--hash-password", is_flag=True, help="Ask for a password, print it as console_users has it, and end.")
@loglevel_option("INFO")
@log_format_option
@click.pass_obj
def command(
    settings: Globals,
    host: str,
    port: int,
    user: tuple[str, ...],
    no_index: bool,
    no_alerts: bool,
    fd: int | None,
    hash_password: bool,
    loglevel: str,
    log_format: str | None,
) -> int:
    """Serve the console, and index what happens to tasks (task_history), until Ctrl-C or TERM.

    Without users (console_users, console_user_header, console_oidc) it is for this machine only.
    """
    try:
        access_module, web, uvicorn = (
            load(name) for name in ("amqtask.console.access", "amqtask.console.web", "uvicorn")
        )
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"the console needs {error.name}: pip install 'amqtask[console]'") from error
    if hash_password:
        echo(access_module.hashed(click.prompt("Password", hide_input=True, confirmation_prompt=True)))
        return 0
    app = load_shared(settings)
    conf = app.conf
    operators = None if conf.console_operators is None else frozenset(conf.console_operators)
    login = _oidc(conf.console_oidc, operators) if conf.console_oidc else None
    access = access_module.Access({**conf.console_users, **_named(user)}, conf.console_user_header, operators, login)
    if access.is_local_only and host not in _LOCAL:
        raise ConfigurationError(
            f"without users the console is for this machine only, not for {host}: set console_users, console_oidc, or "
            "console_user_header behind a proxy that says who it is"
        )
    if fd is None:
        port = _free_port(host, port)
    if not conf.task_history:
        echo("task_history is off, so no task is found here: set task_history = True.", err=True)
    set_up(conf, loglevel=loglevel.upper(), logfile=None, log_format=log_format, color=settings.color)
    server: Any
    served = web.console(
        app, access=access, indexes=not no_index, watches=not no_alerts, is_ending=lambda: server.should_exit
    )
    server = uvicorn.Server(uvicorn.Config(served, host=host, port=port, log_config=None, access_log=False))
    shown = f"[{host}]" if ":" in host else host
    if not is_repeated():
        echo(f"The console is on http://{shown}:{port}" + (", for this machine only." if access.is_local_only else "."))
    try:
        server.run(sockets=None if fd is None else [socket.socket(fileno=fd)])
    except KeyboardInterrupt:
        pass
    finally:
        app.close()
    return 0 if server.started else 1


def _free_port(host: str, port: int) -> int:
    """The port, or for 0 a free one, before anything is said or begun. Raises: ConfigurationError."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.create_server(address[:2], family=family) as listener:
            return int(listener.getsockname()[1])
    except OSError as error:
        raise ConfigurationError(
            f"the console cannot be served on {host}:{port}: {error.strerror}. Another port is -p (of `amqtask dev`: "
            "--console-port)"
        ) from error


def _named(users: tuple[str, ...]) -> dict[str, str]:
    for user in users:
        if ":scrypt$" not in user:
            raise click.UsageError(
                f"--user wants NAME:HASH, not {user.partition(':')[0]!r} alone; --hash-password prints the hash"
            )
    return {name: password for name, _, password in (user.partition(":") for user in users)}


def _oidc(options: Mapping[str, Any], operators: frozenset[str] | None) -> Any:
    try:
        oidc = load("amqtask.console.oidc")
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"console_oidc needs {error.name}: pip install 'amqtask[console-oidc]'") from error
    return oidc.OidcLogin(oidc.OidcOptions.of(options, operators))
