"""`amqtask worker`: Celery's worker options, short and long."""

from __future__ import annotations

import os
import platform
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from amqtask.assembly import build_worker
from amqtask.cli import daemon, handover, params
from amqtask.cli.base import Decorator, Globals, ParamType, echo_text, with_options
from amqtask.cli.daemon import expand, node_name
from amqtask.cli.logs import enable_own_loggers, is_in_json, set_up
from amqtask.cli.params import CommaList, Extensible, own_options
from amqtask.exceptions import ConfigurationError
from amqtask.ground import VERSION
from amqtask.ground.plugins import load
from amqtask.ground.printable import bounded_logger, count, mask_urls
from amqtask.pool import GREEN_POOLS, OURS, find_pool
from amqtask.topology.declarations import base_of
from amqtask.worker.options import WorkerOptions, usable_processors

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.cli.reload import Reloader
    from amqtask.ground.shapes import JsonObject, OptionDict
    from amqtask.worker.worker import Worker

logger = bounded_logger("amqtask.worker")

HAVE_CHILDREN = frozenset({"prefork", "processes"})


class Port(click.IntRange):
    """A port. Kubernetes sets <NAME>_PORT=tcp://… for each Service: one named amqtask-worker-metrics means no port of ours."""

    name = "port"

    def __init__(self) -> None:
        super().__init__(1, 65535)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        text = str(value)
        if text.startswith(("tcp://", "udp://", "sctp://")) and text in os.environ.values():
            return None
        return super().convert(value, param, ctx)


PORT = Port()


class Autoscale(ParamType):
    """`max,min` (Celery's order; the larger is the maximum), or just the maximum."""

    name = "max,min"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = [int(part) for part in str(value).split(",")]
        except ValueError:
            numbers = []
        if not 1 <= len(numbers) <= 2 or min(numbers) < 0 or max(numbers) < 1:
            self.fail(f"{value!r} is not MAX,MIN, e.g. --autoscale=10,3", param, ctx)
        return max(numbers), min(numbers) if len(numbers) == 2 else 0


class Concurrency(ParamType):
    """A number of slots, or `auto`: the processors this process may use."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if value == "auto":
            return usable_processors()
        try:
            number = int(value)
        except ValueError:
            number = 0
        if number < 1:
            self.fail(f"{value!r} is not a number of slots (1 or more, or auto)", param, ctx)
        return number


def _pool_name(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None:
        try:
            find_pool(value)
        except ConfigurationError as error:
            raise click.BadParameter(str(error), ctx=ctx, param=param) from error
    return value


WORKER: list[Decorator] = [
    click.option("-A", "--app", "told_app", metavar="MODULE[:ATTR]", help="The application (also before `worker`)."),
    click.option("-n", "--hostname", metavar="NAME", help="Node name: w1@%h, with %h host, %n name, %d domain."),
    daemon.detach_option,
    click.option("-S", "--statedb", type=click.Path(), help="File that keeps revoked ids between runs."),
    daemon.loglevel_option("WARNING"),
    daemon.log_format_option,
    click.option("-O", "--optimization", type=click.Choice(["default", "fair"]), help="Dispatch is always fair."),
    click.option(
        "--prefetch-multiplier",
        type=click.FloatRange(min=0),
        help="Unanswered deliveries per slot [adaptive].",
    ),
    click.option("--disable-prefetch", is_flag=True, help="Take only what can run at once."),
]
POOL: list[Decorator] = [
    click.option("-c", "--concurrency", type=Concurrency(), help="Slots [number of processors]."),
    click.option(
        "-P", "--pool", envvar="AMQTASK_POOL", callback=_pool_name, metavar="NAME", shell_complete=params.complete_pools,
        help="prefork, threads, solo, eventlet, gevent, asyncio, a plug-in's; or prefork:4=reports,asyncio:200=web.",
    ),
    click.option("-E", "--task-events", "--events", is_flag=True, help="Send task events for monitors."),
    click.option("--time-limit", type=float, help="Hard limit of every task, in seconds."),
    click.option("--soft-time-limit", type=float, help="Soft limit of every task, in seconds."),
    click.option("--max-tasks-per-child", type=click.IntRange(min=1), help="Replace a child after so many tasks."),
    click.option("--max-memory-per-child", type=click.IntRange(min=1), help="Replace a child above so many KiB."),
    click.option(
        "--pool-start-method", type=click.Choice(["fork", "spawn"]), help="fork, which is the only way."
    ),
    click.option("--autoscale", type=Autoscale(), help="Grow and shrink the pool with the backlog."),
]  # fmt: skip
QUEUES: list[Decorator] = [
    click.option(
        "-Q",
        "--queues",
        type=CommaList(),
        default=(),
        shell_complete=params.complete_queues,
        help="Queues to consume [task_queues, or default]; name:2, 2+, 1-4: at most, reserved slots.",
    ),
    click.option("-X", "--exclude-queues", type=CommaList(), default=(), help="Configured queues to leave alone."),
    click.option("-I", "--include", type=CommaList(), default=(), help="More modules to import."),
    click.option("--purge", "--discard", is_flag=True, help="Delete what waits in the queues first."),
]
FEATURES: list[Decorator] = [
    click.option("--without-gossip", is_flag=True, help="Accepted; workers do not gossip."),
    click.option("--without-mingle", is_flag=True, help="Do not ask other workers what was revoked."),
    click.option("--without-heartbeat", is_flag=True, help="Send no worker heartbeat events."),
    click.option("--heartbeat-interval", type=click.FloatRange(min=0), help="Seconds between heartbeat events."),
    click.option("--relay", is_flag=True, help="Publish what waits in the outbox, too (see `amqtask relay`)."),
    click.option("--metrics-port", type=PORT, help="Serve /metrics for Prometheus (extra `metrics`)."),
    click.option("--health-port", type=PORT, help="Serve /live and /ready for probes; may be the same port."),
    click.option(
        "--http-host", default="0.0.0.0", show_default=True, metavar="ADDRESS", help="Where these two listen."
    ),
    click.option("-B", "--beat", is_flag=True, help="Send periodic tasks too; any number of workers may."),
    click.option(
        "-s", "--schedule", "--schedule-filename", type=click.Path(), help="With -B: the file with last runs."
    ),
    click.option("--scheduler", metavar="NAME", help="With -B: file, memory, django, or module:Class."),
]
RELOAD: list[Decorator] = [
    click.option(
        "--reload", is_flag=True, allow_from_autoenv=False,
        help="For development: replace the worker when the project's files change (extra `reload`).",
    ),
    click.option(
        "--reload-dir", "reload_dirs", multiple=True, metavar="FOLDER",
        type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder to watch; may be repeated [here].",
    ),
    click.option(
        "--reload-include", "reload_patterns", multiple=True, metavar="PATTERN",
        help="Files to watch beside *.py, such as '*.toml'; may be repeated.",
    ),
    click.option(
        "--reload-timeout", type=click.FloatRange(min=0), default=5.0, show_default=True, metavar="SECONDS",
        help="How long running tasks may go on with the old code; then they run again.",
    ),
]  # fmt: skip


@click.command("worker", cls=Extensible, context_settings={"help_option_names": ["-h", "--help"]})
@with_options(WORKER, POOL, QUEUES, FEATURES, RELOAD, daemon.NODE)
@click.pass_obj
def command(settings: Globals, /, **params: Any) -> int:
    """Start a worker: `amqtask worker -Q cma_queue -P eventlet -c 5`."""
    if (params["schedule"] or params["scheduler"]) and not params["beat"]:
        raise click.UsageError("--schedule and --scheduler are for the embedded scheduler: say -B too.")
    if params["reload"] and not handover.is_child():
        return _reloaded(settings, params)
    app = settings.load(params["told_app"])
    of_app = own_options(app, click.get_current_context(), params)
    options = _worker_options(app, params)._replace(of_app=of_app)
    _check_pool_options(params)
    if handover.is_child():
        app.import_modules()
        handover.await_go()
    daemon.become(pidfile=options.pidfile, logfile=options.logfile, **daemon.of_node(params))
    daemon.refuse_pickle_as_root(app.conf.accept_content)
    prints = set_up(
        app.conf,
        loglevel=options.loglevel,
        logfile=options.logfile,
        logfile_of=partial(expand, params["logfile"], str(options.hostname)) if params["logfile"] else None,
        log_format=options.log_format,
        color=settings.color,
        hostname=options.hostname or "",
    )
    _tell_useless(str(options.pool), params)
    worker = build_worker(app, options)
    enable_own_loggers()  # its modules may have set logging up, too
    logger.debug("names in the configuration that are no settings: %s", ", ".join(app.conf.unknown_names()) or "none")
    if is_in_json(app.conf, options.log_format):
        logger.info("worker: starting", extra=_about(app, options, worker))
    elif not (settings.quiet or handover.is_repeated()):
        echo_text(_banner(app, options, worker))
    with prints:
        exit_code = worker.run()
    if worker.lifecycle.shutdown.restarts:
        daemon.start_anew(settings.started_in)
    return exit_code


def _reloaded(settings: Globals, params: dict[str, Any]) -> int:
    """This command in a child process, which is replaced when files change. Raises: UsageError, ConfigurationError."""
    if params["detach"]:
        raise click.UsageError("--reload is for a terminal, and --detach for the background: say one of them.")
    reloader: Reloader = load("amqtask.cli.reload").Reloader(
        daemon.this_command(),
        folder=settings.started_in,
        watched=params["reload_dirs"] or [Path.cwd()],
        patterns=["*.py", *params["reload_patterns"]],
        patience=params["reload_timeout"],
        stands_by=settings.loaded is None,
    )
    return reloader.run()


def _check_pool_options(params: dict[str, object]) -> None:
    """Raises: UsageError."""
    if params["pool_start_method"] == "spawn":
        raise click.UsageError("--pool-start-method spawn: prefork's children are forked; there is no other way.")


def _tell_useless(pool: str, params: dict[str, object]) -> None:
    useless = [
        f"--{name.replace('_', '-')}"
        for name in ("max_tasks_per_child", "max_memory_per_child")
        if params[name] and pool not in HAVE_CHILDREN and pool in OURS
    ]
    if useless:
        logger.warning("%s: no effect, the %s pool has no child processes.", " and ".join(useless), pool)


def _worker_options(app: AmqTask, params: OptionDict) -> WorkerOptions:
    pool = params["pool"] or app.conf.worker_pool
    if pool in GREEN_POOLS and params["pool"] is None:
        raise click.UsageError(
            f"worker_pool = {pool!r} is set in the configuration, but {pool} must patch Python before anything is "
            f"imported. Say it on the command line (-P {pool}) or in the environment (AMQTASK_POOL={pool})."
        )
    node = node_name(params["hostname"])
    paths = {**params, "statedb": params["statedb"] or app.conf.worker_state_db}
    logfile, pidfile, statedb = (
        expand(paths[key], node) if paths[key] else None for key in ("logfile", "pidfile", "statedb")
    )
    options: OptionDict = {name: params[name] for name in WorkerOptions._fields if name in params}
    for flag in ("disable_prefetch", "task_events", "relay"):  # not given: as the settings say
        options[flag] = options[flag] or None
    options.update(pool=pool, hostname=node, loglevel=params["loglevel"].upper())
    return WorkerOptions(**{**options, "logfile": logfile, "pidfile": pidfile, "statedb": statedb})


def _banner(app: AmqTask, options: WorkerOptions, worker: Worker) -> str:
    about, slots = _about(app, options, worker), worker.division.stats()
    tasks = about["tasks"]
    rows = [
        ("app", f"{about['app']} ({count(len(tasks), 'task')})"),
        ("broker", about["broker"]),
        ("results", about["results"]),
        ("concurrency", f"{about['concurrency']} ({about['pool']})"),
        ("task events", "ON" if about["task_events"] else "OFF (-E lets monitors see this worker's tasks)"),
    ]
    lines = ["", f" {options.hostname or ''} · amqtask {VERSION} on {platform.system()}", "", "[config]"]
    lines += [f"  {name:<12} {value}" for name, value in rows]
    lines += ["", "[queues]"]
    queues = [queue for queue in worker.queues if base_of(queue.name) == queue.name]
    width = max((len(queue.name) for queue in queues), default=0)
    for queue in queues:
        exchange, own_slots = queue.exchange.name if queue.exchange else "", slots.get(queue.name, {}).get("slots", "")
        where = f"exchange={exchange or '(default)'} key={queue.routing_key or queue.name}"
        lines.append(f"  {queue.name:<{width}}  {where}{own_slots and f' slots={own_slots}'}")
    if options.loglevel in ("DEBUG", "INFO"):
        lines += ["", "[tasks]", *(f"  {name}" for name in tasks)]
        lines += [] if tasks else ["  (none: is the module with your tasks imported?)"]
    return "\n".join([*lines, ""])


def _about(app: AmqTask, options: WorkerOptions, worker: Worker) -> JsonObject:
    """What a worker says of itself when it starts."""
    backend = app.backend_url
    return {
        "app": app.main or "__main__",
        "broker": app.broker_name,
        "results": mask_urls(backend, "**") if backend else "disabled",
        "pool": str(options.pool),
        "concurrency": worker.concurrency,
        "task_events": bool(app.conf.worker_send_task_events or app.conf.task_history),
        "queues": [queue.name for queue in worker.queues],
        "tasks": sorted(app.tasks.own),
    }
