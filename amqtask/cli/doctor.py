"""`amqtask doctor`: reads what a project and its broker are like, and prints what is found wrong with them (`diagnosis`)."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from amqtask.cli.broker import api_option, open_api
from amqtask.cli.diagnosis import ORDER, Facts, Finding, by_severity, diagnose
from amqtask.cli.globals import Globals
from amqtask.cli.output import echo, json_option, print_json
from amqtask.cli.topology import planned, planned_delays
from amqtask.exceptions import AmqTaskError, ConfigurationError, OperationalError, QueueNotFound
from amqtask.ground.printable import count
from amqtask.protocol.entities import Binding, Queue
from amqtask.transport.inventory import check as check_by_amqp

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.transport.contract import Admin, QueueState
    from amqtask.transport.inventory import ManagementApi


def read_facts(app: AmqTask, api: str | None) -> tuple[Facts, list[Finding]]:
    """The facts, and why some could not be read."""
    app.load_tasks()
    facts = Facts(app, files=min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 1 << 30), is_root=os.geteuid() == 0)
    if app.broker.transport == "amqp":
        facts.product = "RabbitMQ"
    failed: list[Finding] = []
    try:
        facts.queues = [entity for entity in planned(app, ()) if isinstance(entity, Queue)]
        facts.delays = planned_delays(app, ())
    except AmqTaskError:
        facts.queues = list(app.queues.consumed)  # a route names a queue that there is not, which is said of its task
    readers: list[tuple[str, Any]] = []
    if app.broker.is_shared:
        readers.append(("broker", lambda: _read_broker(facts)))
    if app.backend_url and app.broker.is_shared:
        readers.append(("result store", lambda: _look_at_results(app)))
    if api:
        readers.append(("management plugin", lambda: _read_management(facts, open_api(app, api))))
    for subject, read in readers:
        try:
            read()
        except AmqTaskError as error:
            why = (
                "Workers and callers cannot reach it either." if subject != "management plugin" else "It was not asked."
            )
            do = "Start it, or correct the URL, the user and the rights."
            if _in_container() and re.search(r"localhost|\b127\.|::1", str(error)):
                do = "In a container that is the container itself: name the host, service or pod that it runs in."
            if isinstance(error, ConfigurationError):  # it was not even asked
                why, do = "Workers and callers do not take it either.", "Correct the setting."
            failed.append(Finding("error", subject, str(error), why, do))
    return facts, failed


def _in_container() -> bool:
    return "KUBERNETES_SERVICE_HOST" in os.environ or any(map(os.path.exists, ("/.dockerenv", "/run/.containerenv")))


def _look_at_results(app: AmqTask) -> None:
    if app.backend is not None and not app.backend.reply_to():
        app.backend.find("amqtask doctor")


def _read_broker(facts: Facts) -> None:
    app = facts.app
    with app.broker.admin() as admin:
        name, _, version = admin.server.rpartition(" ")
        facts.product, facts.version = name, tuple(map(int, re.findall(r"\d+", version)[:3]))
        began = time.time()
        facts.server = admin.about()
        if "server_time" in facts.server:
            facts.clock_ahead = float(facts.server["server_time"]) - (began + time.time()) / 2
        facts.states = dict(_states(admin, facts.queues))
        with contextlib.suppress(OperationalError):  # who may not read that may not pause either
            facts.paused = app.control.pauses.read()
        plan = [entity for entity in (*facts.queues, *facts.delays) if not isinstance(entity, Binding)]
        facts.differences = [
            f"{type(difference.entity).__name__.lower()} {difference.entity.name}: {difference.detail}"
            for difference in check_by_amqp(admin, plan)
            if difference.status == "differs" and not isinstance(difference.entity, Binding)
        ]


def _states(admin: Admin, queues: Iterable[Queue]) -> Iterator[tuple[str, QueueState]]:
    for queue in queues:
        try:
            yield queue.name, admin.state(queue.name)
        except QueueNotFound:
            continue  # it is declared when it is first used


def _read_management(facts: Facts, management: ManagementApi) -> None:
    facts.policies = management.policies()
    facts.nodes, facts.clock_ahead = management.nodes()
    facts.live_queues = management.queues()
    facts.flags = management.feature_flags()
    facts.permissions = management.permissions()


@click.command("doctor")
@api_option
@json_option
@click.pass_obj
def command(settings: Globals, api: str | None, as_json: bool) -> int:
    """Say what is wrong with the project and its broker, or will be, and what to do. Exit code 1 when there is an error.

    Nothing is changed. With --api RabbitMQ's management plugin is asked, too: policies, rights, nodes, alarms, clocks.
    """
    app = settings.load()
    facts, failed = read_facts(app, api)
    findings = by_severity([*failed, *diagnose(facts)])
    app.close()
    if as_json:
        print_json([finding._asdict() for finding in findings])
    else:
        _print(facts, findings, api)
    return 1 if any(finding.severity == "error" for finding in findings) else 0


def _print(facts: Facts, findings: Sequence[Finding], api: str | None) -> None:
    for finding in findings:
        echo(f"{finding.severity:<8} {finding.subject} {finding.what}")
        echo(f"         why: {finding.why}")
        echo(f"         do:  {finding.do}")
    if facts.product == "RabbitMQ" and not api:
        echo("With --api http://…:15672 policies, rights, nodes and clocks are looked at, too.")
    numbers = [count(sum(finding.severity == severity for finding in findings), severity) for severity in ORDER[:2]]
    echo(", ".join(numbers))
