"""`amqtask doctor`: reads what a project and its broker are like, and prints what is found wrong with them (`diagnosis`)."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import resource
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from amqtask.cli.base import Globals, echo, json_option, print_json
from amqtask.cli.broker import api_option, open_admin, open_api
from amqtask.cli.diagnosis import diagnose
from amqtask.cli.project_checks import ORDER, Facts, Finding, by_severity
from amqtask.cli.topology import planned, planned_delays
from amqtask.exceptions import AccessRefused, AmqTaskError, ConfigurationError, OperationalError
from amqtask.ground import VERSION
from amqtask.ground.printable import count, mask_urls
from amqtask.protocol.entities import Binding, Queue
from amqtask.transport.broker import open_broker
from amqtask.transport.contract import BrokerOptions
from amqtask.transport.inventory import check as check_by_amqp
from amqtask.transport.redis import SCHEMES

if TYPE_CHECKING:
    from amqtask.app import AmqTask
    from amqtask.ground.shapes import JsonObject
    from amqtask.transport.contract import Admin
    from amqtask.transport.inventory import ManagementApi
    from amqtask.transport.url import BrokerAddress

# Seconds that workers have to answer.
ANSWER_SECONDS = 1.0


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
        readers.append(("workers", lambda: _read_workers(facts)))
    if app.backend_url and app.broker.is_shared:
        readers.append(("result store", lambda: _look_at_results(facts)))
    if app.broker.is_shared and app.conf.flow_store:
        readers.append(("flow store", lambda: _read_store(facts, "flow_store", app.conf.flow_store)))
    if api:
        readers.append(("management plugin", lambda: _read_management(facts, open_api(app, api))))
    for subject, read in readers:
        try:
            read()
        except AmqTaskError as error:
            failed += _failure(subject, error)
    for address in app.broker_addresses[1:]:
        try:
            _look_at(facts, address)
        except AmqTaskError as error:
            failed.append(
                Finding(
                    "warning", f"broker {address.host}:{address.port}", str(error), "When the others are away there is none.",
                    "Start it, or correct its URL, user and rights.",
                )
            )  # fmt: skip
    return facts, failed


def _failure(subject: str, error: AmqTaskError) -> Iterator[Finding]:
    if subject == "workers":
        return  # what keeps us from asking them is told of the broker
    why = "Workers and callers cannot reach it either." if subject != "management plugin" else "It was not asked."
    do = "Start it, or correct the URL, the user and the rights."
    if isinstance(error, ConfigurationError):
        why, do = "Workers and callers do not take it either.", "Correct the setting."  # it was not even asked
    elif not isinstance(error, AccessRefused) and _in_container() and re.search(r"localhost|\b127\.|::1", str(error)):
        do = "In a container that is the container itself: name the host, service or pod that it runs in."
    yield Finding("error", subject, str(error), why, do)


def _in_container() -> bool:
    return "KUBERNETES_SERVICE_HOST" in os.environ or any(map(os.path.exists, ("/.dockerenv", "/run/.containerenv")))


def _look_at_results(facts: Facts) -> None:
    app = facts.app
    if app.backend is not None and not app.backend.reply_to():
        app.backend.find("amqtask doctor")
        with contextlib.suppress(AmqTaskError):  # it answers, if not to this
            _read_store(facts, "result_backend", str(app.backend_url))


def _read_store(facts: Facts, setting: str, url: str) -> None:
    """What the Redis behind a setting says, unless it is the broker."""
    conf = facts.app.conf
    if url.partition("://")[0] not in SCHEMES:
        return
    options = conf.flow_store_options if setting == "flow_store" else conf.result_backend_transport_options
    use_ssl = None if setting == "flow_store" else conf.redis_backend_use_ssl
    broker = open_broker(BrokerOptions(urls=url, use_ssl=use_ssl, transport_options=options or {}), {})
    with broker.admin() as admin:
        said = admin.about()
    if said.get("run_id") != facts.server.get("run_id", ""):
        facts.stores[setting] = said


def _look_at(facts: Facts, address: BrokerAddress) -> None:
    conf = facts.app.conf
    options = BrokerOptions(urls=address.url, use_ssl=conf.broker_use_ssl, login_method=conf.broker_login_method)
    with open_broker(options, {}).admin() as admin:
        admin.about()


def _read_workers(facts: Facts) -> None:
    """How far the clocks of those that answer are ahead, as far as the way of the question allows to say."""
    asked = time.time()
    answers = facts.app.control.inspect(timeout=ANSWER_SECONDS).stats() or {}
    heard = time.time()
    for name, stats in answers.items():
        said = stats.get("time") if isinstance(stats, dict) else None
        if isinstance(said, float):
            ahead = said - asked if said < asked else max(0.0, said - heard)
            facts.worker_clocks[name] = ahead


def _read_broker(facts: Facts) -> None:
    app = facts.app
    with app.broker.admin() as admin:
        name, _, version = admin.server.rpartition(" ")
        facts.product, facts.version = name, tuple(map(int, re.findall(r"\d+", version)[:3]))
        began = time.time()
        facts.server = admin.about()
        if "server_time" in facts.server:
            facts.clock_ahead = float(facts.server["server_time"]) - (began + time.time()) / 2
        facts.states = admin.states([queue.name for queue in facts.queues])  # others are declared when they are used
        with contextlib.suppress(OperationalError):  # who may not read that may not pause either
            facts.paused = app.control.pauses.read()
        plan = [entity for entity in (*facts.queues, *facts.delays) if not isinstance(entity, Binding)]
        facts.differences = [
            f"{type(difference.entity).__name__.lower()} {difference.entity.name}: {difference.detail}"
            for difference in check_by_amqp(admin, plan)
            if difference.status == "differs" and not isinstance(difference.entity, Binding)
        ]
        planned_names = {entity.name for entity in plan}
        for exchange, user in _named_exchanges(facts):
            if exchange not in planned_names and not _is_there(admin, exchange):
                facts.missing_exchanges.setdefault(exchange, []).append(user)


def _named_exchanges(facts: Facts) -> Iterator[tuple[str, str]]:
    """Exchanges that queues and tasks name, and who does."""
    app = facts.app
    for queue in facts.queues:
        if dead_letters := queue.argument_map.get("x-dead-letter-exchange"):
            yield str(dead_letters), f"queue {queue.name}"
    for name in app.tasks.own:
        try:
            route = app.router.route(name, (), {}, {}, app.tasks[name])
        except Exception:  # noqa: BLE001 - told by the project's checks, or the user's function needs a call's arguments
            continue
        declared = {getattr(entity, "name", "") for entity in route.declare}
        if route.exchange and route.exchange not in declared:
            yield route.exchange, f"task {name}"


def _is_there(admin: Admin, exchange: str) -> bool:
    try:
        return admin.has_exchange(exchange)
    except OperationalError:
        return True  # who may not look does not know


def _read_management(facts: Facts, management: ManagementApi) -> None:
    facts.policies = management.policies()
    facts.nodes, facts.clock_ahead = management.nodes()
    facts.live_queues = management.queues()
    facts.flags = management.feature_flags()
    facts.permissions = management.permissions()
    with contextlib.suppress(OperationalError):  # an administrator's
        facts.most_queues = management.most_queues()


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


# -- `amqtask report`: versions and settings for a bug report.

PACKAGES = ("pika", "aio-pika", "billiard", "click", "eventlet", "gevent", "redis", "celery")


@click.command("report")
@click.option("--server", is_flag=True, help="Ask the broker for its version, too.")
@json_option
@click.pass_obj
def report_command(settings: Globals, server: bool, as_json: bool) -> None:
    """Print versions, and the application's settings without secrets."""
    app = settings.load()
    report: JsonObject = {
        "amqtask": VERSION,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "broker": app.broker_name,
        "server": None,
        "results": mask_urls(app.backend_url, "**") if app.backend_url else None,
        "settings": dict(sorted(app.conf.table().items())),
        "unknown_settings": app.conf.unknown_names(),
    }
    if server:
        with open_admin(app) as admin:
            report["server"] = admin.server
    if as_json:
        print_json(report)
    else:
        _print_report(report)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _print_report(report: JsonObject) -> None:
    echo(f"amqtask {report['amqtask']}, Python {report['python']} on {report['platform']}")
    for name, version in report["packages"].items():
        echo(f"  {name:<10} {version or '-'}")
    server = f" ({report['server']})" if report["server"] else ""
    echo(f"broker {report['broker']}{server}")
    echo(f"results {report['results'] or 'disabled'}")
    for name, value in report["settings"].items():
        echo(f"  {name} = {value!r}{_remark(name, report['unknown_settings'])}")


def _remark(name: str, unknown: dict[str, str | None]) -> str:
    if name not in unknown:
        return ""
    near = unknown[name]
    return f"  (no setting of amqtask's{f'; did you mean {near}?' if near else ''})"
