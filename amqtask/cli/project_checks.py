"""What is wrong with a project: its settings, queues, tasks, routes and schedules; no broker is asked. What `amqtask doctor`
reads (Facts), and what it finds (Finding), of a broker too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, NamedTuple

from amqtask.beat.build import find_store
from amqtask.beat.settings_store import entry_of
from amqtask.client.registry import BUILT_IN
from amqtask.exceptions import AmqTaskError, ConfigurationError, QueueNotFound
from amqtask.ground.plugins import near_names
from amqtask.pool import find_pool
from amqtask.protocol.serialization import check_usable, content_types, dumps
from amqtask.protocol.task import as_limit
from amqtask.settings.table import SETTINGS
from amqtask.topology.declarations import dead_letter_queue, is_quorum
from amqtask.transport.redis import CLIENT_OPTIONS

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.ground.shapes import JsonObject
    from amqtask.protocol.entities import Declaration, Queue
    from amqtask.remote.kept import Pause
    from amqtask.settings import Settings
    from amqtask.transport.contract import QueueState

# -- What `amqtask doctor` reads (Facts), and what it finds (Finding).

Severity = Literal["error", "warning", "info"]
ORDER: tuple[Severity, ...] = ("error", "warning", "info")
FEWEST_FILES = 512


class Finding(NamedTuple):
    """One thing that is wrong, or will be."""

    severity: Severity
    subject: str
    what: str
    why: str
    do: str


@dataclass(slots=True)
class Facts:
    """What was read. `server` is what the broker says of itself; what nobody could say is empty or None."""

    app: AmqTask
    product: str = ""
    version: tuple[int, ...] = ()
    server: Mapping[str, str] = field(default_factory=dict)
    queues: Sequence[Queue] = ()
    # Exchanges and queues that delays need.
    delays: Sequence[Declaration] = ()
    states: Mapping[str, QueueState] = field(default_factory=dict)
    paused: Mapping[str, Pause] = field(default_factory=dict)
    differences: Sequence[str] = ()
    policies: Sequence[JsonObject] = ()
    nodes: Sequence[JsonObject] = ()
    live_queues: Sequence[JsonObject] = ()
    flags: Sequence[JsonObject] = ()
    permissions: JsonObject | None = None
    # How many queues the virtual host may have.
    most_queues: int | None = None
    # Seconds by which the broker's clock is ahead.
    clock_ahead: float | None = None
    # Exchanges that are not there, and what needs them: queues for dead letters, tasks.
    missing_exchanges: dict[str, list[str]] = field(default_factory=dict)
    # What the Redis behind a setting says of itself; `broker` is in `server`.
    stores: dict[str, Mapping[str, str]] = field(default_factory=dict)
    # Seconds by which workers' clocks are ahead of ours.
    worker_clocks: dict[str, float] = field(default_factory=dict)
    files: int = FEWEST_FILES
    is_root: bool = False


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """Errors first."""
    return sorted(findings, key=lambda finding: ORDER.index(finding.severity))


# RabbitMQ's default consumer_timeout, seconds.
CONSUMER_TIMEOUT = 1800.0


def of_project(facts: Facts) -> Iterator[Finding]:
    """Settings, tasks and schedules; no broker is needed."""
    app, conf = facts.app, facts.app.conf
    yield from _of_setting_names(conf)
    if conf.task_always_eager:
        yield Finding(
            "error", "setting task_always_eager", "is on", "Calls run where they are made: no worker gets a task.",
            "Switch it off outside of tests.",
        )  # fmt: skip
    if any("pickle" in str(accepted) for accepted in conf.accept_content):
        yield Finding(
            "error" if facts.is_root else "warning", "setting accept_content", "takes pickle",
            "Whoever can publish to the broker can run any code in the workers.",
            "Take pickle away; json carries dates, UUIDs and more.",
        )  # fmt: skip
    if conf.broker_heartbeat == 0:
        yield Finding(
            "warning", "setting broker_heartbeat", "is off", "A connection that a firewall has forgotten looks open for hours.",
            "Leave it to the default.",
        )  # fmt: skip
    if app.backend_url and not conf.result_expires:
        yield Finding(
            "warning", "setting result_expires", "keeps results for ever", "The result store grows until it is full.",
            "Set seconds or a timedelta.",
        )  # fmt: skip
    if conf.task_acks_late is False:
        yield Finding(
            "info", "setting task_acks_late", "is off", "A worker that dies loses the tasks that it has.",
            "Leave it to the default, and give acks_late=False to tasks that must not run twice.",
        )  # fmt: skip
    if conf.enable_utc is False and not conf.timezone:
        yield Finding(
            "warning", "setting enable_utc", "has no effect, and there is no timezone",
            "Schedules and times without a zone are in UTC; Celery's would be in the zone of the machine.",
            "Name the zone in the setting timezone.",
        )  # fmt: skip
    if conf.broker_transport_options and app.broker.transport == "amqp":
        yield Finding(
            "info", "setting broker_transport_options", "has no effect with RabbitMQ",
            "It is for Redis; RabbitMQ has no visibility timeout, but consumer_timeout.", "Take it away.",
        )  # fmt: skip
    yield from _of_values(app)
    yield from _of_serializers(app)
    yield from _of_queues(facts)
    yield from _of_tasks(facts)
    yield from _of_names(app)
    yield from _of_patterns(app)
    yield from _of_schedule(app)
    yield from _of_urls(app)
    yield from _of_redis_options(app)


def _of_setting_names(conf: Settings) -> Iterator[Finding]:
    for name, near in conf.unknown_names().items():
        hint = f"Write {near}." if near else "Take it away if no library of yours reads it."
        yield Finding(
            "warning" if near else "info", f"setting {name}", "is no setting of amqtask's", "It has no effect here.", hint,
        )  # fmt: skip
    configured = conf.table()
    for setting in SETTINGS:
        if setting.name in configured and not setting.doc:
            yield Finding(
                "info", f"setting {setting.name}", "is accepted and has no effect", "It has another fate here than in Celery.",
                "See docs/coming-from-celery.md, and take it away.",
            )  # fmt: skip


def _of_values(app: AmqTask) -> Iterator[Finding]:
    """Names of things that are looked for when a worker, a beat or a console starts."""
    conf = app.conf
    looks: list[tuple[str, Callable[[], object], str]] = [
        ("timezone", lambda: app.timezone, "Beat does not start, nor does a worker that is told of times."),
        ("worker_pool", lambda: find_pool(conf.worker_pool), "Workers do not start."),
    ]
    if conf.beat_scheduler or conf.beat_schedule:
        looks.append(("beat_scheduler", lambda: find_store(conf.beat_scheduler), "Beat does not start."))
    for name, look, why in looks:
        try:
            look()
        except AmqTaskError as error:
            yield Finding("error", f"setting {name}", "cannot be used", f"{error}. {why}", "Correct it.")
    if conf.task_history and find_spec("sqlalchemy") is not None:
        try:
            app.history.index.check()
        except AmqTaskError as error:
            yield Finding(
                "warning", "setting history_url", "cannot be used on this host", str(error),
                "Correct it, if the console, `amqtask history` or a program that searches runs here.",
            )  # fmt: skip


def _of_serializers(app: AmqTask) -> Iterator[Finding]:
    conf = app.conf
    usable = set()
    for setting in ("accept_content", "task_serializer", "event_serializer", "result_serializer"):
        try:
            names = [conf[setting]] if isinstance(conf[setting], str) else list(conf[setting])
            check_usable(names)
            for name in names:
                dumps({}, name)
            usable.add(setting)
        except AmqTaskError as error:
            yield Finding(
                "error", f"setting {setting}", "cannot be used", str(error), "Install, set up or name another one."
            )
    if "accept_content" not in usable:
        return
    written = {"setting task_serializer": conf.task_serializer} if "task_serializer" in usable else {}
    written |= {
        f"task {name}": serializer
        for name in app.tasks.own
        if (serializer := app.tasks[name].serializer) not in (None, conf.task_serializer)
    }
    for subject, serializer in written.items():
        if not content_types([serializer]) <= content_types(conf.accept_content):
            yield Finding(
                "error", subject, f"writes messages in {serializer}, which accept_content does not name",
                "Workers move them to the dead-letter queue.", f"Add {serializer!r} there, or write in json.",
            )  # fmt: skip
    readers = conf.result_accept_content or conf.accept_content
    by_message = "result_serializer" in usable and str(app.backend_url).startswith("rpc")
    if by_message and not content_types([conf.result_serializer]) <= content_types(readers):
        yield Finding(
            "error", "setting result_serializer", f"is {conf.result_serializer}, which result_accept_content does not name",
            "Who waits for a result gets an error.", f"Add {conf.result_serializer!r} there, or write in json.",
        )  # fmt: skip


def _of_queues(facts: Facts) -> Iterator[Finding]:
    """What queues of RabbitMQ are declared with."""
    if facts.app.broker.transport != "amqp":
        return
    dead = {letters.name for queue in facts.queues if (letters := dead_letter_queue(queue, facts.app.queue_defaults))}
    for queue in facts.queues:
        if queue.name not in dead and not queue.broadcast:
            for severity, what, why, do in _of_queue(queue):
                yield Finding(severity, f"queue {queue.name}", what, why, do)


def _of_queue(queue: Queue) -> Iterator[tuple[Severity, str, str, str]]:
    said = queue.argument_map
    if queue.name.startswith("amq."):
        yield "error", "has a name that begins with amq.", "RabbitMQ keeps such names for itself.", "Rename it."
    if {"x-max-length", "x-max-length-bytes"} & said.keys() and not str(said.get("x-overflow")).startswith("reject-"):
        yield (
            "error",
            "has a length limit and drops the oldest",
            "Tasks are lost without a word.",
            "Set x-overflow = reject-publish.",
        )
    for name, why in (
        ("x-message-ttl", "Messages that wait longer are dropped or dead-lettered before a worker gets them."),
        ("x-expires", "It is deleted with its messages when no worker consumes it for so long."),
    ):
        if name in said:
            yield "warning", f"has {name} = {said[name]}", why, "Give calls `expires`, where they get out of date."
    if not queue.durable:
        yield "warning", "is not durable", "A restart of RabbitMQ loses it with its messages.", "Leave `durable` alone."
    elif queue.auto_delete:
        yield (
            "warning",
            "is deleted with its last consumer",
            "A deployment loses the messages that wait.",
            "Leave `auto_delete` alone.",
        )
    elif "x-dead-letter-exchange" not in said:
        yield (
            "info",
            "has no dead-letter queue",
            "What cannot run or fails for good is gone.",
            "Leave task_dead_letter alone.",
        )
    limit = said.get("x-delivery-limit")
    if isinstance(limit, int) and limit < 0:
        yield (
            "warning",
            "has no delivery limit",
            "A task that ends its worker's process is delivered for ever.",
            "Leave x-delivery-limit alone.",
        )


# Of Redis, in broker_transport_options: what Celery knows beside what we do.
_OF_CELERY = (
    "visibility_timeout", "fanout_prefix", "fanout_patterns", "queue_order_strategy", "priority_steps", "sep", "unacked_key",
    "unacked_index_key", "unacked_mutex_key", "unacked_mutex_expire", "unacked_restore_limit", "ack_emulation", "retry_policy",
    "polling_interval", "retry_on_timeout", "socket_keepalive_options", "region", "max_retries", "interval_start",
    "interval_step", "interval_max", "credential_provider", "socket_read_size",
)  # fmt: skip
_OURS = ("lease", "master_name", "min_other_sentinels", "sentinel_kwargs", "global_keyprefix")
_USUAL = {"sep": "\x06\x16", "priority_steps": [0, 3, 6, 9], "fanout_prefix": True, "fanout_patterns": True}


def _of_redis_options(app: AmqTask) -> Iterator[Finding]:
    if app.broker.transport != "redis":
        return
    setting, options = "setting broker_transport_options", app.conf.broker_transport_options or {}
    names = (*CLIENT_OPTIONS, *_OURS, *_OF_CELERY)
    for name in sorted(map(str, options.keys() - set(names))):
        near = near_names(name, names, alike=0.8)
        if near:
            yield Finding(
                "warning", setting, f"has {name!r}, which is no option", "It has no effect.", f"Write {near[0]!r}."
            )
    for name, usual in _USUAL.items():
        if name in options and (list(options[name]) if isinstance(usual, list) else options[name]) != usual:
            yield Finding(
                "warning", setting, f"has {name} = {options[name]!r}",
                "It has no effect here: workers and callers of Celery's with it use other keys of the same Redis.",
                "Take it away, in Celery's programs too.",
            )  # fmt: skip
    timeout = as_limit(options.get("visibility_timeout"))
    longest = max((as_limit(app.tasks[name].time_limit) or 0.0 for name in app.tasks.own), default=0.0)
    if timeout is not None and timeout < longest:
        yield Finding(
            "warning", setting, f"has a visibility_timeout of {timeout:g} s, and a task may run for {longest:g} s",
            "It has no effect here, but workers of Celery's on these queues run such tasks twice.",
            "Raise it above the longest time limit and ETA.",
        )  # fmt: skip


def _of_tasks(facts: Facts) -> Iterator[Finding]:
    app = facts.app
    task_names = [name for name in app.tasks.own if not name.startswith(BUILT_IN)]
    if not task_names:
        yield Finding(
            "warning", "application", "has no tasks", "A worker moves every message to the dead-letter queue.",
            "Name their modules in `include` or `imports`, or call autodiscover_tasks().",
        )  # fmt: skip
    # From 4.3 on our consumers of quorum queues ask for more themselves.
    timed = (
        facts.product == "RabbitMQ"
        and (facts.version < (4, 3) or not all(is_quorum(queue) for queue in facts.queues))
        and not any("x-consumer-timeout" in queue.argument_map for queue in facts.queues)
    )
    for name in task_names:
        task = app.tasks[name]
        hard, soft = as_limit(task.time_limit), as_limit(task.soft_time_limit)
        if hard is not None and soft is not None and soft >= hard:
            yield Finding(
                "error", f"task {name}", f"has a soft limit of {soft:g} s that is not below its hard limit of {hard:g} s",
                "The soft one never comes.", "Make soft_time_limit the smaller one.",
            )  # fmt: skip
        longest = hard or soft
        if timed and longest is not None and longest > CONSUMER_TIMEOUT:
            yield Finding(
                "warning", f"task {name}", f"may run for {longest:g} s",
                "RabbitMQ's consumer_timeout is 30 minutes by default: then the channel is closed, and the task runs again.",
                "Raise consumer_timeout in rabbitmq.conf, or give its queue x-consumer-timeout (milliseconds).",
            )  # fmt: skip
    for name in app.tasks.own:
        try:
            app.router.route(name, (), {}, {}, app.tasks[name])
        except QueueNotFound as error:
            yield Finding("error", f"task {name}", "has no queue", str(error), "Name the queue in task_queues.")
        except AmqTaskError as error:
            yield Finding(
                "error", "setting task_routes", "cannot be used", str(error), "Correct it: nothing is routed."
            )
            break
        except Exception:  # noqa: BLE001 - the user's route function, which may need the arguments of a call
            continue


def _of_names(app: AmqTask) -> Iterator[Finding]:
    own = app.tasks.own
    for setting in ("task_routes", "task_annotations"):
        named = dict.fromkeys(_named(app.conf[setting]))
        others = [task for task in own if task not in named]
        for name in named:
            if app.tasks.has(name):
                continue
            # With another path to the module, or misspelt. Others' tasks may have names of their own.
            paths = [task for task in others if task.endswith(f".{name}") or name.endswith(f".{task}")]
            for near in paths[:1] or near_names(name, others, alike=0.9):
                yield Finding(
                    "warning", f"setting {setting}", f"names {name!r}, which is no task of this application",
                    f"Nothing of it holds for {near!r}.", f"Write {near!r}, if that is meant.",
                )  # fmt: skip


def _of_patterns(app: AmqTask) -> Iterator[Finding]:
    """Patterns of routes that match nothing, where they would match if a module's name were another."""
    modules = {name.rpartition(".")[0] for name in app.tasks.own} - {""}
    for pattern in dict.fromkeys(_named(app.conf.task_routes, patterns=True)):
        stem = pattern.removesuffix(".*")
        if stem != pattern and not any(fnmatchcase(name, pattern) for name in app.tasks.own):
            for near in near_names(stem, modules, alike=0.85):
                yield Finding(
                    "warning", "setting task_routes", f"has {pattern!r}, which matches no task of this application",
                    f"Nothing of it holds for the tasks of {near}.", f"Write '{near}.*', if that is meant.",
                )  # fmt: skip


def _named(said: object, *, patterns: bool = False) -> Iterator[str]:
    """The tasks (or the patterns) that one of these settings names; not what functions decide."""
    if isinstance(said, Mapping):
        yield from (name for name in said if isinstance(name, str) and bool({*"*?["} & {*name}) == patterns)
    elif isinstance(said, (list, tuple)):
        for one in said:
            is_pair = isinstance(one, (list, tuple)) and len(one) == 2 and isinstance(one[0], str)
            yield from _named({one[0]: one[1]} if is_pair else one, patterns=patterns)


def _of_schedule(app: AmqTask) -> Iterator[Finding]:
    for name, fields in dict(app.conf.beat_schedule or {}).items():
        subject = f"schedule {name}"
        try:
            entry = entry_of(app, name, fields)
        except ConfigurationError as error:
            yield Finding("error", subject, "cannot be used", f"{error}. Beat does not start.", "Correct it.")
            continue
        if not app.tasks.has(entry.task):
            yield Finding(
                "error", subject, f"sends {entry.task!r}, which is no task of this application",
                "Workers move it to the dead-letter queue.", "Correct the name, or import the task's module.",
            )  # fmt: skip
            continue
        try:
            app.tasks[entry.task].check_arguments(tuple(entry.args), dict(entry.kwargs))
        except TypeError as error:
            yield Finding(
                "error", subject, "sends arguments that its task does not take", f"{error}. Beat cannot send it.",
                "Correct `args` and `kwargs`.",
            )  # fmt: skip


def _of_urls(app: AmqTask) -> Iterator[Finding]:
    for address in app.broker_addresses if app.broker.transport == "amqp" else ():
        is_near = address.host in ("localhost", "::1", "") or address.host.startswith("127.")
        if address.user == "guest" and not is_near:
            yield Finding(
                "error", f"broker {address.host}", "is used as guest", "RabbitMQ lets guest in from its own machine only.",
                "Make a user: rabbitmqctl add_user, set_permissions.",
            )  # fmt: skip
        if not is_near and not address.tls:
            yield Finding(
                "info", f"broker {address.host}", "is spoken to without TLS", "Passwords and arguments can be read on the way.",
                "Use amqps:// where the network is not yours alone (docs/tls.md).",
            )  # fmt: skip
