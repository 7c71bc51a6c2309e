"""`amqtask doctor`: every seeded fault is found, and nothing on a clean project and broker."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from amqtask import AmqTask, Queue
from amqtask.cli.diagnosis import diagnose
from amqtask.cli.main import run
from amqtask.cli.project_checks import Facts, Finding
from amqtask.cli.topology import planned
from amqtask.ground import current
from amqtask.remote.kept import Pause
from amqtask.transport.contract import QueueState

Seed = Callable[[AmqTask], dict[str, Any]]


def project(broker: str = "amqp://shop:secret@localhost//", **settings: Any) -> AmqTask:
    app = AmqTask("clean", broker=broker, task_default_queue="work", set_as_current=False, **settings)

    @app.task(name="bill", time_limit=60, soft_time_limit=50)
    def bill() -> None: ...

    return app


def facts(app: AmqTask, **changes: Any) -> Facts:
    """What is read where all is well."""
    app.finalize()
    queues = [] if "queues" in changes else [entity for entity in planned(app, ()) if isinstance(entity, Queue)]
    known = Facts(
        app,
        product="RabbitMQ",
        version=(4, 3, 4),
        queues=queues,
        states={queue.name: QueueState(0, 1) for queue in queues},
        policies=[{"name": "others", "pattern": "^cache", "apply-to": "queues", "definition": {"message-ttl": 1}}],
        nodes=[{"name": "rabbit@a", "running": True, "fd_used": 10, "fd_total": 1000, "partitions": []}],
        live_queues=[{"name": "work", "members": ["a", "b", "c"], "online": ["a", "b", "c"]}],
        flags=[{"name": "quorum_queue", "state": "enabled", "stability": "stable"}],
        permissions={"user": "shop", "configure": ".*", "write": ".*", "read": ".*"},
        clock_ahead=0.2,
        files=65536,
    )
    return replace(known, **changes)


def redis(**said: str) -> Facts:
    app = project("redis://localhost")
    fields = {
        "maxmemory_policy": "noeviction",
        "aof_enabled": "1",
        "role": "master",
        "maxmemory": "0",
        "used_memory": "9",
    }
    return facts(app, product="Redis", version=(7, 0, 15), server={**fields, **said})


def policy(**definition: Any) -> dict[str, Any]:
    policies = [{"name": "p", "pattern": "^work$", "apply-to": "queues", "definition": definition}]
    return {"policies": policies}


def paused() -> dict[str, Any]:
    return {"states": {"work.fair.3": QueueState(7, 0)}, "paused": {"work": Pause("work", 0.0, "ann")}}


def with_task(**options: Any) -> AmqTask:
    app = project()

    @app.task(name="odd", **options)
    def odd() -> None: ...

    return app


def node(**fields: Any) -> dict[str, Any]:
    return {"nodes": [{"name": "rabbit@a", "running": True, **fields}]}


def members(online: int) -> dict[str, Any]:
    return {"live_queues": [{"name": "work", "members": ["a", "b", "c"], "online": ["a", "b", "c"][:online]}]}


def unroutable() -> AmqTask:
    return project(task_routes={"bill": "gone"}, task_create_missing_queues=False)


def named(**settings: Any) -> AmqTask:
    app = project(**settings)

    @app.task(name="shop.bills.write")
    def write() -> None: ...

    return app


def others() -> AmqTask:
    """Routes of tasks that are here, of others', and by a pattern."""
    return named(task_routes={"shop.bills.write": "q", "shop.bills.writes": "q", "mail.send": "q", "bills.*": "q"})


def misrouted() -> AmqTask:
    return project(task_routes={"bill": {"queue": "work", "prioritty": 3}})


def queue(**arguments: Any) -> AmqTask:
    """Whose queue is declared with these."""
    return project(task_queues=[Queue("work", **arguments)])


def patterns() -> AmqTask:
    """A route whose pattern names a module that there is not."""
    return named(task_routes={"shop.bill.*": "q", "elsewhere.*": "q"})


def scheduled(**entry: Any) -> AmqTask:
    return project(beat_schedule={"s": {"task": "bill", **entry}})


def store(setting: str) -> dict[str, Any]:
    return {"stores": {setting: {"maxmemory_policy": "allkeys-lru"}}}


def shadowed() -> dict[str, Any]:
    """Policies of which RabbitMQ applies none to `work`: another has a higher priority, or they are for other kinds."""
    ttl = {"pattern": ".*", "definition": {"message-ttl": 1}}
    better = {
        "name": "better",
        "pattern": ".*",
        "apply-to": "queues",
        "priority": 2,
        "definition": {"max-in-memory": 9},
    }
    others = [{"name": kind, "apply-to": kind, "priority": 1, **ttl} for kind in ("all", "streams", "classic_queues")]
    return {"policies": [*others, better]}


OLD_FLAG = {"name": "f", "state": "disabled", "stability": "stable"}


OPERATORS = {"name": "o", "pattern": "^work$", "apply-to": "all", "operator": True, "definition": {"expires": 1000}}


def rights(**changed: str) -> dict[str, Any]:
    return {"permissions": {"user": "shop", "configure": ".*", "write": ".*", "read": ".*", **changed}}


SEEDS: list[tuple[str, Callable[[], Facts], str]] = [
    ("near setting", lambda: facts(project(task_ack_late=True)), "warning setting task_ack_late"),
    ("no effect", lambda: facts(project(broker_pool_limit=3, enable_utc=True)), "info setting enable_utc"),
    ("eager", lambda: facts(project(task_always_eager=True)), "error setting task_always_eager"),
    ("pickle", lambda: facts(project(accept_content=["json", "pickle"])), "warning setting accept_content"),
    ("pickle as root", lambda: facts(project(accept_content=["json", "pickle"]), is_root=True), "error setting accept_content"),
    ("heartbeat", lambda: facts(project(broker_heartbeat=0)), "warning setting broker_heartbeat"),
    ("results", lambda: facts(project(result_backend="redis://h", result_expires=0)), "warning setting result_expires"),
    ("limits", lambda: facts(with_task(time_limit=10, soft_time_limit=20)), "error task odd"),
    ("long task", lambda: facts(with_task(time_limit=7200), version=(4, 2, 1)), "warning task odd may run"),
    ("route", lambda: facts(unroutable(), queues=[]), "error task bill has no queue"),
    ("option of a route", lambda: facts(misrouted(), queues=[]), "error setting task_routes cannot be used"),
    ("options", lambda: facts(project(broker_transport_options={"visibility_timeout": 9})), "info setting broker_transport"),
    ("misspelt route", lambda: facts(named(task_routes=({"shop.bills.writ": "q"},))), "warning setting task_routes names"),
    ("route by path", lambda: facts(named(task_routes=[("bills.write", "q")])), "warning setting task_routes names"),
    ("annotation", lambda: facts(named(task_annotations={"my.shop.bills.write": {}})), "warning setting task_annotations"),
    ("schedule", lambda: facts(project(beat_schedule={"s": {"task": "nobody", "schedule": 5}})), "error schedule s"),
    ("guest", lambda: facts(project("amqp://guest:guest@broker")), "error broker broker is used as guest"),
    ("no TLS", lambda: facts(project("amqp://a:b@broker")), "info broker broker is spoken to without TLS"),
    ("files", lambda: facts(project(), files=256), "warning this host"),
    ("clock", lambda: facts(project(), clock_ahead=-60.0), "warning clocks the broker's is 60 s behind"),
    ("old broker", lambda: facts(project(), version=(3, 8, 9)), "error RabbitMQ 3.8.9"),
    ("4.3.0", lambda: facts(project(), version=(4, 3, 0)), "error RabbitMQ 4.3.0"),
    ("4.3.2", lambda: facts(project(), version=(4, 3, 2)), "warning RabbitMQ 4.3.2"),
    ("4.3.3", lambda: facts(project(), version=(4, 3, 3)), "warning RabbitMQ 4.3.3"),
    ("differs", lambda: facts(project(), differences=["queue work: x-queue-type is 'classic'"]), "error queue work"),
    ("no consumer", lambda: facts(project(), states={"work": QueueState(7, 0)}), "warning queue work has 7 messages"),
    ("paused", lambda: facts(project(), **paused()), "info queue work.fair.3 is paused by ann, and has 7 messages"),
    ("crowd", lambda: facts(project(task_queues=[Queue(f"q{n}") for n in range(101)])), "warning queues 204 quorum"),
    ("dead", lambda: facts(project(), states={"work.dead": QueueState(3, 0)}), "warning queue work.dead has 3 dead"),
    ("ttl", lambda: facts(project(), **policy(**{"message-ttl": 1000})), "error policy p sets message-ttl"),
    ("expires", lambda: facts(project(), **policy(expires=1000)), "error policy p sets expires"),
    ("length", lambda: facts(project(), **policy(**{"max-length": 10})), "error policy p limits the length"),
    ("timeout", lambda: facts(project(), **policy(**{"consumer-timeout": 1000})), "error policy p sets consumer-timeout"),
    ("alarm", lambda: facts(project(), **node(mem_alarm=True)), "error node rabbit@a has an alarm: memory"),
    ("disk", lambda: facts(project(), **node(disk_free_alarm=True)), "error node rabbit@a has an alarm: free disk"),
    ("node", lambda: facts(project(), **node(running=False)), "error node rabbit@a does not run"),
    ("split", lambda: facts(project(), **node(partitions=["rabbit@b"])), "error node rabbit@a was separated"),
    ("handles", lambda: facts(project(), **node(fd_used=99, fd_total=100)), "warning node rabbit@a uses 99 of 100"),
    ("flags", lambda: facts(project(), flags=[OLD_FLAG]), "warning feature flags"),
    ("member", lambda: facts(project(), **members(2)), "warning queue work has 2 of 3"),
    ("majority", lambda: facts(project(), **members(1)), "error queue work has 1 of 3"),
    ("read", lambda: facts(project(), **rights(read="^other")), "error user shop may not read 'work'"),
    ("configure", lambda: facts(project(), states={}, **rights(configure="")), "error user shop may not configure 'work'"),
    ("write", lambda: facts(project(), **rights(write="^work")), "error user shop may not write 'amq.default'"),
    ("local time", lambda: facts(project(enable_utc=False)), "warning setting enable_utc has no effect"),
    ("time zone", lambda: facts(project(timezone="Europe/Berln")), "error setting timezone cannot be used"),
    ("pool", lambda: facts(project(worker_pool="prefrok")), "error setting worker_pool cannot be used"),
    ("scheduler", lambda: facts(project(beat_scheduler="shop:Nothing")), "error setting beat_scheduler cannot be used"),
    ("keys", lambda: facts(project(accept_content=["json", "encrypted"])), "error setting accept_content cannot be used"),
    ("unread", lambda: facts(project(task_serializer="yaml")), "error setting task_serializer writes messages in yaml"),
    ("unread task", lambda: facts(with_task(serializer="yaml")), "error task odd writes messages in yaml"),
    ("unread result", lambda: facts(project(result_backend="rpc://", result_serializer="yaml")), "error setting result_ser"),
    ("early acks", lambda: facts(project(task_acks_late=False)), "info setting task_acks_late is off"),
    ("history", lambda: facts(project(task_history=True, history_url="sqlite:////no/x")), "warning setting history_url"),
    ("no schedule", lambda: facts(scheduled()), "error schedule s cannot be used"),
    ("arguments", lambda: facts(scheduled(schedule=5, args=(1,))), "error schedule s sends arguments that its task does"),
    ("pattern", lambda: facts(patterns()), "warning setting task_routes has 'shop.bill.*', which matches no task"),
    ("drops", lambda: facts(queue(queue_arguments={"x-max-length": 9, "x-overflow": "drop-head"})), "error queue work has a"),
    ("own ttl", lambda: facts(queue(message_ttl=60)), "warning queue work has x-message-ttl = 60000"),
    ("own expiry", lambda: facts(queue(expires=60)), "warning queue work has x-expires = 60000"),
    ("transient", lambda: facts(queue(durable=False)), "warning queue work is not durable"),
    ("auto-delete", lambda: facts(queue(auto_delete=True)), "warning queue work is deleted with its last consumer"),
    ("no dead letters", lambda: facts(project(task_dead_letter=False)), "info queue work has no dead-letter queue"),
    ("no limit", lambda: facts(queue(queue_arguments={"x-delivery-limit": -1})), "warning queue work has no delivery limit"),
    ("reserved", lambda: facts(project(task_queues=[Queue("amq.work")])), "error queue amq.work has a name that begins with"),
    ("exchange", lambda: facts(project(), missing_exchanges={"x": ["task bill"]}), "error exchange x is not there"),
    ("worker's clock", lambda: facts(project(), worker_clocks={"w1@h": 9.0}), "warning clocks that of w1@h is 9 s ahead"),
    ("queues", lambda: facts(project(), most_queues=1), "error virtual host may have 1 queue, and 2"),
    ("operator", lambda: facts(project(), policies=[*shadowed()["policies"], OPERATORS]), "error policy o sets expires"),
    ("misspelt option", lambda: redis_with(visibilty_timeout=9), "warning setting broker_transport_options has 'visibilty"),
    ("other keys", lambda: redis_with(priority_steps=[0, 5]), "warning setting broker_transport_options has priority_steps"),
    ("visibility", lambda: redis_with(visibility_timeout=30), "warning setting broker_transport_options has a visibility"),
    ("results vanish", lambda: facts(project(), **store("result_backend")), "warning setting result_backend names a Redis that"),
    ("locks vanish", lambda: facts(project(), **store("flow_store")), "warning setting flow_store names a Redis that evicts"),
    ("file", lambda: redis(aof_last_write_status="err"), "error Redis could not write its append-only file"),
    ("cluster", lambda: redis(cluster_enabled="1"), "error Redis is a node of a cluster"),
    ("clients", lambda: redis(connected_clients="99", maxclients="100"), "warning Redis has 99 of 100 clients"),
    ("eviction", lambda: redis(maxmemory_policy="allkeys-lru"), "error Redis evicts keys"),
    ("persistence", lambda: redis(aof_enabled="0"), "warning Redis writes no append-only file"),
    ("replica", lambda: redis(role="slave"), "error Redis is a replica"),
    ("snapshot", lambda: redis(rdb_last_bgsave_status="err"), "error Redis could not save"),
    ("memory", lambda: redis(maxmemory="100", used_memory="95"), "warning Redis uses 95%"),
    ("old Redis", lambda: replace(redis(), version=(5, 0, 1)), "error Redis is older"),
]  # fmt: skip


def redis_with(**options: Any) -> Facts:
    return facts(project("redis://localhost", broker_transport_options=options), product="Redis", version=(7, 0, 15))


def line(finding: Finding) -> str:
    return f"{finding.severity} {finding.subject} {finding.what}"


@pytest.mark.parametrize(("seed", "expected"), [pytest.param(*rest, id=name) for name, *rest in SEEDS])
def test_a_seeded_fault_is_found_and_nothing_else_that_matters(seed: Callable[[], Facts], expected: str) -> None:
    found = diagnose(seed())

    lines = [line(finding) for finding in found]
    assert any(text.startswith(expected) for text in lines), lines
    others = [
        finding
        for finding in found
        if not line(finding).startswith(expected) and finding.severity != "info" and finding.subject not in expected
    ]
    assert others == []
    assert all(finding.why and finding.do for finding in found)


CLEAN = {
    "rabbitmq": lambda: facts(project()),
    "long task": lambda: facts(with_task(time_limit=7200)),  # workers ask 4.3 for more themselves
    "routes of others' tasks": lambda: facts(others()),
    "redis": redis,
    "policies that do not hold": lambda: facts(project(), **shadowed()),
    "arguments of a schedule": lambda: facts(scheduled(schedule=5, args=[], kwargs=None)),
    "reject-publish": lambda: facts(queue(max_length=10)),
    "options of Redis": lambda: facts(
        project("redis://localhost", broker_transport_options={"lease": 60}), product="Redis", version=(7, 0, 15)
    ),
}


@pytest.mark.parametrize("clean", CLEAN.values(), ids=CLEAN)
def test_nothing_is_found_on_a_clean_one(clean: Callable[[], Facts]) -> None:
    assert diagnose(clean()) == []


def test_an_application_without_tasks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(current, "_shared", [])
    empty = AmqTask("empty", broker="amqp://a:b@localhost", set_as_current=False)

    assert [line(finding) for finding in diagnose(facts(empty))] == ["warning application has no tasks"]


def test_errors_come_first() -> None:
    found = diagnose(
        facts(project(accept_content=["pickle"], enable_utc=True), clock_ahead=90.0, **node(running=False))
    )

    assert [finding.severity for finding in found] == sorted(
        (finding.severity for finding in found), key=["error", "warning", "info"].index
    )


def test_a_broker_that_is_not_there_is_an_error_with_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json"], project("amqp://shop:secret@127.0.0.1:1//")) == 1

    shown = capsys.readouterr().out
    (broken,) = [found for found in json.loads(shown) if found["severity"] == "error"]
    assert broken["subject"] == "broker"
    assert "secret" not in shown


def test_a_store_that_the_broker_does_not_allow_is_no_store_that_is_away(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json"], project("redis://127.0.0.1:1", result_backend="rpc://")) == 1

    found = {finding["subject"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert "cannot reach it" in found["broker"]["why"]
    assert "'rpc://' needs RabbitMQ" in found["result store"]["what"]
    assert "do not take it" in found["result store"]["why"]


def test_localhost_in_a_container_is_told_to_be_the_container(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")

    assert run(["doctor"], project("amqp://shop:secret@localhost:1//")) == 1
    assert "do:  In a container that is the container itself" in capsys.readouterr().out


def test_without_a_broker_the_project_is_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"], project("memory://", task_always_eager=True)) == 1

    shown = capsys.readouterr().out
    assert "error    setting task_always_eager is on" in shown
    assert "         do:  Switch it off outside of tests." in shown
    assert shown.endswith("1 error, 0 warnings\n")
