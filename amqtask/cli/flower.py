"""`amqtask flower`: runs the installed Flower, unchanged, on our broker.

Flower is a sub-command of Celery's command line and takes everything from a Celery application: the broker, the names of
exchanges, and the tasks that its buttons may be pressed for. Such an application is made here from ours.
"""

from __future__ import annotations

import importlib.util
import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from amqtask.cli.base import Globals

if TYPE_CHECKING:
    from collections.abc import Sequence

    from amqtask.app import AmqTask
    from amqtask.ground.shapes import JsonObject, Keywords, Options, SettingDict
    from amqtask.transport.url import TlsOptions

# What Flower has to know as workers do; where our defaults and Celery's differ, ours count.
SHARED = (
    "accept_content", "broker_connection_timeout", "broker_heartbeat", "control_exchange", "control_queue_expires",
    "control_queue_ttl", "enable_utc", "event_exchange", "event_queue_expires", "event_queue_prefix", "event_queue_ttl",
    "event_serializer", "result_accept_content", "result_serializer", "task_default_queue", "task_serializer",
    "timezone",
)  # fmt: skip
MISSING = (
    'Flower is not installed here: pip install "flower>=2" into the same environment as amqtask. '
    "(It brings Celery with it, of whose command line it is a part.)"
)

_OURS = {"-A": "app", "--app": "app", "-b": "broker", "--broker": "broker"}


@click.command(
    "flower",
    context_settings={
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
        "help_option_names": ["-h", "--help"],
    },
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def command(settings: Globals, arguments: tuple[str, ...]) -> None:
    """Start Flower, the web monitor: `amqtask -A tasks flower --port=5555`.

    All options are Flower's own, and -A and --broker as Flower 0.9 had them: https://flower.readthedocs.io/en/latest/config.html
    """
    for package in ("flower", "celery"):
        if importlib.util.find_spec(package) is None:
            raise click.ClickException(MISSING)
    arguments = told_among(arguments, settings)
    app = settings.load()
    if not app.broker.is_shared:
        raise click.ClickException("Flower needs RabbitMQ or Redis; memory:// lives inside each process")
    quiet = ["--quiet"] if settings.quiet else []
    celery_app(app).start([*quiet, "flower", *arguments])


def told_among(arguments: tuple[str, ...], settings: Globals) -> tuple[str, ...]:
    """Take the application (-A) and the broker (-b), which Flower 0.9 had among its own options; what remains is Flower's."""
    flower_options: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        name, is_joined, value = argument.partition("=")
        field = _OURS.get(name)
        if field is None:
            flower_options.append(argument)
        else:
            setattr(settings, field, value if is_joined else next(remaining, None))
    return tuple(flower_options)


def celery_app(app: AmqTask) -> Any:
    """A Celery application that knows our broker, exchanges, routes and the names of our tasks."""
    import celery

    app.load_tasks()
    application = celery.Celery(app.main or "amqtask")
    application.conf.update(celery_settings(app))
    application.conf.task_routes = (_route(app),)
    for name in app.tasks.own:
        ignores = bool(app.tasks[name].ignore_result)
        application.task(name=name, typing=False, ignore_result=ignores)(_runs_elsewhere)
    return application


def celery_settings(app: AmqTask) -> SettingDict:
    """The settings of a Celery application that talks to the same workers."""
    settings: SettingDict = {name: getattr(app.conf, name) for name in SHARED}
    addresses = app.broker_addresses
    settings["broker_url"] = ";".join(app.broker.urls)
    if addresses and addresses[0].tls is not None:
        settings["broker_use_ssl"] = _ssl(addresses[0].tls)
        settings["broker_login_method"] = addresses[0].login_method
    if app.backend_url:
        settings["result_backend"] = app.backend_url
    return {name: value for name, value in settings.items() if value is not None}


def _ssl(tls: TlsOptions) -> JsonObject:
    """TLS options as kombu takes them."""
    options = {
        "ca_certs": tls.cafile,
        "certfile": tls.certfile,
        "keyfile": tls.keyfile,
        "cert_reqs": ssl.CERT_REQUIRED if tls.verify else ssl.CERT_NONE,
        "server_hostname": tls.server_hostname,
    }
    return {name: value for name, value in options.items() if value is not None}


def _route(app: AmqTask) -> Callable[..., dict[str, object]]:
    """Calls from Flower go where ours would go. Celery must not declare those queues: it would do it otherwise."""
    import kombu

    def route(
        name: str, args: Sequence[object], kwargs: Keywords, options: Options, task: object = None, **_: object
    ) -> JsonObject:
        addressed = {key: options[key] for key in ("queue", "exchange", "routing_key") if options.get(key)}
        target = app.router.route(name, args or (), kwargs or {}, addressed)
        exchange = kombu.Exchange(target.exchange, no_declare=True)
        return {"queue": kombu.Queue(target.routing_key, exchange, target.routing_key, no_declare=True)}

    return route


def _runs_elsewhere(*args: object, **kwargs: object) -> None:
    raise NotImplementedError("this is Flower's list of task names; tasks run in workers")
