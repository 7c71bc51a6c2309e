"""What is wrong with a project and its broker, or will be; why, and what to do.

Each check is a generator over facts that were read before: the application (amqtask.cli.project_checks), what the broker says of
itself, and what RabbitMQ's management plugin knows. None changes anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from amqtask.cli.project_checks import FEWEST_FILES, Finding, by_severity, of_project
from amqtask.ground.printable import count, first_of
from amqtask.protocol.entities import Queue
from amqtask.protocol.task import as_limit
from amqtask.remote.kept import pause_of
from amqtask.topology.declarations import all_bindings, dead_letter_queue, is_quorum, too_many

if TYPE_CHECKING:
    from amqtask.cli.project_checks import Facts, Severity
    from amqtask.ground.shapes import JsonObject

# Seconds that two clocks may differ: ETAs and expiries are exact to about a second.
MOST_DIFFERENCE = 5.0
NEARLY_FULL = 0.85


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
    for worker, ahead in facts.worker_clocks.items():
        if abs(ahead) > MOST_DIFFERENCE:
            yield Finding(
                "warning", "clocks", f"that of {worker} is {abs(ahead):.0f} s {'ahead' if ahead > 0 else 'behind'}",
                "Its tasks expire too early or too late, and history has wrong times.", "Run an NTP client on its host.",
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
    for exchange, users in facts.missing_exchanges.items():
        are_queues = all(user.startswith("queue ") for user in users)
        yield Finding(
            "error", f"exchange {exchange}", f"is not there, and is named by {first_of(users)}",
            "Dead letters of it are gone without a word." if are_queues else "Calls of it are refused.",
            "Declare it, or name one in task_queues.",
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
    wanted = {entity.name for entity in (*facts.queues, *facts.delays) if isinstance(entity, Queue)}
    wanted |= {str(queue.get("name")) for queue in facts.live_queues}
    if facts.most_queues is not None and len(wanted) > facts.most_queues:
        yield Finding(
            "error", "virtual host", f"may have {count(facts.most_queues, 'queue')}, and {len(wanted)} are needed",
            "RabbitMQ refuses to declare the others.", "rabbitmqctl set_vhost_limits",
        )  # fmt: skip
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
    queues = [*facts.queues, *(entity for entity in facts.delays if isinstance(entity, Queue))]
    longest = max((as_limit(facts.app.tasks[name].time_limit) or 0.0 for name in facts.app.tasks.own), default=0.0)
    in_force = {queue.name: _policies_of(queue, facts.policies) for queue in queues}
    for policy in facts.policies:
        definition, label = policy.get("definition") or {}, f"policy {policy.get('name')}"
        hit = [name for name, policies in in_force.items() if policy in policies]
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


_KINDS = {"classic_queues": False, "quorum_queues": True}


def _policies_of(queue: Queue, policies: Sequence[JsonObject]) -> list[JsonObject]:
    """Those that hold: of all that match the one with the highest priority, and of the operator's, too."""
    matching = [
        policy
        for policy in policies
        if (kind := str(policy.get("apply-to", "all"))) not in ("exchanges", "streams")
        and _KINDS.get(kind, is_quorum(queue)) == is_quorum(queue)
        and _matches(str(policy.get("pattern", "")), queue.name)
    ]
    holding = []
    for is_operators in (False, True):
        those = [policy for policy in matching if bool(policy.get("operator")) == is_operators]
        highest = max((policy.get("priority", 0) for policy in those), default=0)
        holding += [policy for policy in those if policy.get("priority", 0) == highest]
    return holding


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


_EVICTED = {
    "result_backend": "Results and counts of chords vanish: who waits for them waits in vain.",
    "flow_store": "Locks and places vanish: a unique task runs twice, limits are exceeded.",
}


def of_stores(facts: Facts) -> Iterator[Finding]:
    """Eviction in a Redis that has results, or locks and places."""
    for setting, other in facts.stores.items():
        policy = other.get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            yield Finding(
                "warning", f"setting {setting}", f"names a Redis that evicts keys when memory is short ({policy})",
                _EVICTED[setting], "maxmemory-policy noeviction, and a Redis of its own for caches.",
            )  # fmt: skip


def of_redis(facts: Facts) -> Iterator[Finding]:
    """Eviction, persistence, role and memory of a Redis or Valkey that is the broker."""
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
    if said.get("aof_last_write_status") == "err":
        yield Finding(
            "error", facts.product, "could not write its append-only file", "It takes no writes until it can.",
            "Look at its log: a full disk?",
        )  # fmt: skip
    if (
        said.get("cluster_enabled") == "1"
        and facts.app.broker.transport == "redis"
        and "+cluster" not in facts.app.broker.safe_url
    ):
        yield Finding(
            "error", facts.product, "is a node of a cluster", "It refuses keys that other nodes have (MOVED).",
            "Write redis+cluster:// (docs/redis.md).",
        )  # fmt: skip
    clients, most = (int(said.get(name) or 0) for name in ("connected_clients", "maxclients"))
    if most and clients / most > NEARLY_FULL:
        yield Finding(
            "warning", facts.product, f"has {clients} of {most} clients", "At the limit it takes no more connections.",
            "Raise maxclients, or have fewer processes.",
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


CHECKS = (of_project, of_machine, of_broker, of_management, of_stores, of_redis)


def diagnose(facts: Facts) -> list[Finding]:
    """All that is found, errors first."""
    return by_severity(dict.fromkeys(finding for check in CHECKS for finding in check(facts)))
