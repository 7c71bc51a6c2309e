"""What is wrong with a project and its broker, or will be; why, and what to do.

Each check is a generator over facts that were read before: the application, what the broker says of itself, and what RabbitMQ's
management plugin knows. None changes anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from amqtask.client.registry import BUILT_IN
from amqtask.exceptions import AmqTaskError, QueueNotFound
from amqtask.ground.plugins import near_names
from amqtask.ground.printable import count, first_of
from amqtask.protocol.entities import Queue
from amqtask.protocol.task import as_limit
from amqtask.remote.pauses import pause_of
from amqtask.settings.table import SETTINGS
from amqtask.topology.declarations import all_bindings, dead_letter_queue, is_quorum, too_many

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.ground.shapes import JsonObject
    from amqtask.protocol.entities import Declaration
    from amqtask.remote.pauses import Pause
    from amqtask.transport.contract import QueueState

Severity = Literal["error", "warning", "info"]
ORDER: tuple[Severity, ...] = ("error", "warning", "info")
# RabbitMQ's default consumer_timeout, seconds.
CONSUMER_TIMEOUT = 1800.0
# Seconds that two clocks may differ: ETAs and expiries are exact to about a second.
MOST_DIFFERENCE = 5.0
FEWEST_FILES = 512
NEARLY_FULL = 0.85


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
    # Seconds by which the broker's clock is ahead.
    clock_ahead: float | None = None
    files: int = FEWEST_FILES
    is_root: bool = False


# -- the project


def of_project(facts: Facts) -> Iterator[Finding]:
    """Settings, tasks and schedules; no broker is needed."""
    app, conf = facts.app, facts.app.conf
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
    if conf.broker_transport_options and app.broker.transport == "amqp":
        yield Finding(
            "info", "setting broker_transport_options", "has no effect with RabbitMQ",
            "It is for Redis; RabbitMQ has no visibility timeout, but consumer_timeout.", "Take it away.",
        )  # fmt: skip
    yield from _of_tasks(facts)
    yield from _of_names(app)
    yield from _of_schedule(app)
    yield from _of_urls(app)


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


def _named(said: object) -> Iterator[str]:
    """The tasks that one of these settings names: no patterns, nor what functions decide."""
    if isinstance(said, Mapping):
        yield from (name for name in said if isinstance(name, str) and not {*"*?["} & {*name})
    elif isinstance(said, (list, tuple)):
        for one in said:
            is_pair = isinstance(one, (list, tuple)) and len(one) == 2 and isinstance(one[0], str)
            yield from _named({one[0]: one[1]} if is_pair else one)


def _of_schedule(app: AmqTask) -> Iterator[Finding]:
    for name, entry in dict(app.conf.beat_schedule or {}).items():
        task = entry.get("task") if isinstance(entry, Mapping) else getattr(entry, "task", None)
        if task is not None and not app.tasks.has(str(task)):
            yield Finding(
                "error", f"schedule {name}", f"sends {task!r}, which is no task of this application",
                "Workers move each of its messages to the dead-letter queue.", "Correct the name, or import the task's module.",
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


def of_machine(facts: Facts) -> Iterator[Finding]:
    """This host."""
    if facts.files < FEWEST_FILES:
        yield Finding(
            "warning", "this host", f"gives a process {facts.files} open files",
            "A worker needs some for each child and connection, and stops with `Too many open files`.",
            "ulimit -n 65536, or LimitNOFILE= in the unit.",
        )  # fmt: skip
    ahead = facts.clock_ahead
    if ahead is not None and abs(ahead) > MOST_DIFFERENCE:
        yield Finding(
            "warning", "clocks", f"the broker's is {abs(ahead):.0f} s {'ahead' if ahead > 0 else 'behind'}",
            "ETAs, expiries and waiting times are wrong by as much.", "Run an NTP client on both.",
        )  # fmt: skip


# -- any broker

# (from, fixed in, severity, what, why, what to do), of RabbitMQ; from its release notes.
FAULTS: tuple[tuple[tuple[int, ...], tuple[int, ...], Severity, str, str, str], ...] = (
    ((0,), (3, 10), "error", "is older than amqtask supports", "Quorum queues lack what dead letters need.", "Update to 4.x."),
    ((3, 10), (4, 0), "info", "is not maintained by its makers any more", "Nobody fixes its faults.", "Update to 4.x."),
    (
        (4, 3, 0), (4, 3, 1), "error", "may send at-least-once dead letters to the wrong replica",
        "They are amqtask's default: dead letters can be late or lost (rabbitmq-server#16203).", "Update to 4.3.4 or later.",
    ),
    (
        (4, 3, 1), (4, 3, 3), "warning", "may stop at-least-once dead lettering after repeated changes of members",
        "Dead letters stay in their queues for ever (rabbitmq-server#16652).", "Update to 4.3.4 or later.",
    ),
    (
        (4, 3, 3), (4, 3, 4), "warning", "may stop taking snapshots where the cluster came from 3.13 over 4.2",
        "Disks fill up (rabbitmq-server#16974).", "Update to 4.3.4 or later.",
    ),
)  # fmt: skip


def of_broker(facts: Facts) -> Iterator[Finding]:
    """Version, and what was declared otherwise; queues that nobody consumes, dead letters."""
    if facts.product == "RabbitMQ":
        shown = ".".join(map(str, facts.version))
        for first, fixed, severity, what, why, do in FAULTS:
            if first <= facts.version < fixed:
                yield Finding(severity, f"RabbitMQ {shown}", what, why, do)
    for difference in facts.differences:
        yield Finding(
            "error", difference.partition(":")[0], difference.partition(":")[2].strip() or "is there otherwise",
            "A worker uses it as it is, without what it wants of it.",
            "Delete it when it is empty and let amqtask declare it, or describe it as it is in task_queues.",
        )  # fmt: skip
    defaults = facts.app.queue_defaults
    dead = {letters.name for queue in facts.queues if (letters := dead_letter_queue(queue, defaults)) is not None}
    for name, state in facts.states.items():
        if name in dead:
            if state.ready:
                yield Finding(
                    "warning", f"queue {name}", f"has {count(state.ready, 'dead letter')}",
                    "Tasks failed for good, or were not known.",
                    f"amqtask dead list -Q {name.removesuffix('.dead')}; amqtask dead retry, or purge.",
                )  # fmt: skip
        elif state.ready and (pause := pause_of(facts.paused, name)) is not None:
            yield Finding(
                "info", f"queue {name}", f"is paused by {pause.by}, and has {count(state.ready, 'message')}",
                "No worker takes them meanwhile.", f"amqtask queues resume {pause.queue}",
            )  # fmt: skip
        elif state.ready and not state.consumers and facts.product == "RabbitMQ":
            yield Finding(
                "warning", f"queue {name}", f"has {count(state.ready, 'message')} and no consumer", "No worker takes them.",
                f"Start one: amqtask worker -Q {name}.",
            )  # fmt: skip
    crowd = too_many(facts.queues)
    if crowd:
        yield Finding(
            "warning", "queues", crowd.partition(":")[0], crowd.partition(":")[2].strip(), "Use fewer, or classic ones."
        )


# -- RabbitMQ with its management plugin


def of_management(facts: Facts) -> Iterator[Finding]:
    """Policies, nodes, members of queues, rights."""
    yield from _of_policies(facts)
    for node in facts.nodes:
        yield from _of_node(node)
    disabled = [
        str(flag["name"])
        for flag in facts.flags
        if flag.get("state") == "disabled" and flag.get("stability") == "stable"
    ]
    if disabled:
        yield Finding(
            "warning", "feature flags", f"{count(len(disabled), 'stable flag')} off: {', '.join(disabled[:5])}",
            "The next version of RabbitMQ does not start without them.", "rabbitmqctl enable_feature_flag all",
        )  # fmt: skip
    ours = {queue.name for queue in facts.queues}
    for queue in facts.live_queues:
        members, online = queue.get("members") or (), queue.get("online") or ()
        if queue.get("name") in ours and len(online) < len(members):
            has_majority = 2 * len(online) > len(members)
            yield Finding(
                "warning" if has_majority else "error", f"queue {queue['name']}", f"has {len(online)} of {len(members)} members",
                "One more failure stops it." if has_majority else "It takes and gives nothing without a majority.",
                "Start the missing nodes, or take them out of the cluster.",
            )  # fmt: skip
    yield from _of_rights(facts)


_SHORTENS = {
    "message-ttl": "Messages that wait longer are dropped or dead-lettered before a worker gets them.",
    "expires": "The queue is deleted with its messages when nobody uses it for so long.",
}


def _of_policies(facts: Facts) -> Iterator[Finding]:
    names = [queue.name for queue in facts.queues]
    delays = [entity.name for entity in facts.delays if isinstance(entity, Queue)]
    longest = max((as_limit(facts.app.tasks[name].time_limit) or 0.0 for name in facts.app.tasks.own), default=0.0)
    for policy in facts.policies:
        definition, label = policy.get("definition") or {}, f"policy {policy.get('name')}"
        if str(policy.get("apply-to", "all")) == "exchanges":
            continue
        hit = [name for name in (*names, *delays) if _matches(str(policy.get("pattern", "")), name)]
        if not hit:
            continue
        shown = first_of(hit)
        for key, why in _SHORTENS.items():
            if key in definition:
                yield Finding(
                    "error",
                    label,
                    f"sets {key} = {definition[key]} on {shown}",
                    why,
                    "Give it a pattern that leaves these queues out.",
                )
        if {"max-length", "max-length-bytes"} & definition.keys() and definition.get("overflow") != "reject-publish":
            yield Finding(
                "error", label, f"limits the length of {shown} and drops the oldest", "Tasks are lost without a word.",
                "Add overflow = reject-publish: then the publisher is told.",
            )  # fmt: skip
        timeout = definition.get("consumer-timeout")
        if isinstance(timeout, int) and timeout / 1000 < longest:
            yield Finding(
                "error", label, f"sets consumer-timeout = {timeout} ms on {shown}",
                f"A task may run for {longest:g} s: its channel is closed, and it runs again.",
                "Raise it above the longest time limit.",
            )  # fmt: skip


def _of_node(node: JsonObject) -> Iterator[Finding]:
    name = f"node {node.get('name')}"
    if node.get("running") is False:
        yield Finding(
            "error", name, "does not run", "Its queues have a member less.", "Start it, or take it out of the cluster."
        )
        return
    for key, resource_name in (("mem_alarm", "memory"), ("disk_free_alarm", "free disk")):
        if node.get(key):
            yield Finding(
                "error", name, f"has an alarm: {resource_name}", "It blocks everybody who publishes.",
                "Let workers take what waits, or give it more; look at the watermarks in rabbitmq.conf.",
            )  # fmt: skip
    if node.get("partitions"):
        yield Finding(
            "error",
            name,
            "was separated from others",
            "Parts of the cluster went on without each other.",
            "Restart the smaller part.",
        )
    for used, total, resource_name in (
        ("fd_used", "fd_total", "open files"),
        ("proc_used", "proc_total", "Erlang processes"),
    ):
        limit = node.get(total) or 0
        if limit and (node.get(used) or 0) / limit > NEARLY_FULL:
            yield Finding(
                "warning", name, f"uses {node[used]} of {limit} {resource_name}", "At the limit it takes no more connections.",
                "Raise the limit (ulimit -n, +P), or use fewer queues and connections.",
            )  # fmt: skip


def _of_rights(facts: Facts) -> Iterator[Finding]:
    rights = facts.permissions
    if rights is None:
        return
    for right, name, why in _needed_rights(facts):
        if not _matches(str(rights.get(right, "")) or "^$", name):
            yield Finding(
                "error", f"user {rights.get('user')}", f"may not {right} {name!r}", why, "rabbitmqctl set_permissions"
            )


def _needed_rights(facts: Facts) -> Iterator[tuple[str, str, str]]:
    for queue in facts.queues:
        if queue.name not in facts.states:
            yield "configure", queue.name, "The queue is not there, and amqtask cannot declare it."
        yield "read", queue.name, "A worker cannot consume it."
    for exchange in {binding.source.name for queue in facts.queues for binding in all_bindings(queue)} - {""}:
        yield "write", exchange, "Calls cannot be published to it."
    yield "write", "amq.default", "Results, retries and calls to a queue go through the default exchange."


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error:
        return False  # Erlang's expressions know more than Python's


# -- Redis


def of_redis(facts: Facts) -> Iterator[Finding]:
    """Eviction, persistence, role and memory of a Redis or Valkey."""
    said = facts.server
    if not said or facts.product == "RabbitMQ":
        return
    policy = said.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        yield Finding(
            "error", facts.product, f"evicts keys when memory is short ({policy})", "Queues are keys: whole queues vanish.",
            "maxmemory-policy noeviction, and a Redis of its own for caches.",
        )  # fmt: skip
    if said.get("aof_enabled") == "0":
        is_saved = bool(said.get("save"))
        yield Finding(
            "warning", facts.product, "writes no append-only file",
            f"A restart loses {'what came since the last snapshot' if is_saved else 'everything'}.", "appendonly yes",
        )  # fmt: skip
    if said.get("role") == "slave":
        yield Finding(
            "error", facts.product, "is a replica", "It takes no messages.", "Name the master, or use sentinel://."
        )
    if said.get("rdb_last_bgsave_status") == "err":
        yield Finding(
            "error", facts.product, "could not save its last snapshot",
            "It takes no writes until it can (stop-writes-on-bgsave-error).",
            "Look at its log: a full disk, or vm.overcommit_memory.",
        )  # fmt: skip
    limit, used = (int(said.get(name) or 0) for name in ("maxmemory", "used_memory"))
    if limit and used / limit > NEARLY_FULL:
        yield Finding(
            "warning", facts.product, f"uses {used / limit:.0%} of maxmemory", "When it is full it refuses what is published.",
            "Let workers take what waits, or raise maxmemory.",
        )  # fmt: skip
    if facts.version and facts.version < (6, 2):
        yield Finding(
            "error", facts.product, "is older than 6.2", "Commands that amqtask uses are missing.", "Update it."
        )


CHECKS = (of_project, of_machine, of_broker, of_management, of_redis)


def diagnose(facts: Facts) -> list[Finding]:
    """All that is found, errors first."""
    return by_severity(dict.fromkeys(finding for check in CHECKS for finding in check(facts)))


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """Errors first."""
    return sorted(findings, key=lambda finding: ORDER.index(finding.severity))
