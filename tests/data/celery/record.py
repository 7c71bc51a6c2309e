"""Records what a real Celery writes, for the protocol tests; see README.md beside this file.

Needs (in an environment of its own): celery==5.7.0 redis msgpack PyYAML backports.zstd pika.

    AMQTASK_BROKER_URL=amqp://guest:guest@127.0.0.1:5672/recording REDIS_URL=redis://127.0.0.1:6379/11 python record.py

The virtual host and the Redis database must be empty and nobody else's.
"""

# mypy: ignore-errors
# (Runs in an environment of its own, with a Celery that has no type information.)

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
import uuid
from datetime import date, datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import celery
import kombu
import pika
import redis
from celery import Celery, chain, group, signature

HERE = Path(__file__).parent
BROKER = os.environ["AMQTASK_BROKER_URL"]
REDIS = os.environ["REDIS_URL"]
QUEUE = "recorded"

app = Celery("recorded", broker=BROKER, backend="rpc://")
app.conf.update(
    task_default_queue=QUEUE,
    accept_content=["json", "pickle", "yaml", "msgpack"],
    result_accept_content=["json", "pickle", "yaml", "msgpack"],
    broker_connection_retry_on_startup=True,
    broker_transport_options={"confirm_publish": True},
    worker_hijack_root_logger=False,
)


# How the worker that is recorded stores results; it is a child of this script and imports it.
KINDS: dict[str, dict[str, Any]] = {
    "rpc": {},
    "redis": {"result_backend": REDIS},
    "extended": {"result_backend": REDIS, "result_extended": True},
    "pickle": {"result_serializer": "pickle"},
}
app.conf.update(KINDS[os.environ.get("RECORD_KIND", "rpc")])


class Odd(Exception):
    def __init__(self, code: int, why: str) -> None:
        super().__init__(code, why)


@app.task(name="recorded.add")
def add(x: Any, y: Any = 2) -> Any:
    return x + y


@app.task(name="recorded.echo")
def echo(*args: Any, **kwargs: Any) -> Any:
    return args[0] if len(args) == 1 and not kwargs else [list(args), kwargs]


@app.task(name="recorded.fail")
def fail(kind: str = "value") -> None:
    if kind == "odd":
        raise Odd(7, "odd")
    if kind == "object":
        raise KeyError(object, {"a": {1}})
    raise ValueError("wrong", 3)


@app.task(name="recorded.spawn")
def spawn() -> str:
    add.delay(1, 1)
    return "spawned"


@app.task(name="recorded.again", bind=True, max_retries=3)
def again(self: Any) -> None:
    raise self.retry(countdown=3600, exc=ValueError("not yet"))


@app.task(name="recorded.odd_value")
def odd_value() -> Any:
    return VALUES


VALUES = {
    "datetime": datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=timezone.utc),
    "naive": datetime(2026, 1, 2, 3, 4, 5),
    "date": date(2026, 1, 2),
    "time": datetime(2026, 1, 2, 3, 4, 5).time(),
    "decimal": Decimal("1.10"),
    "uuid": uuid.UUID(int=7),
    "text": b"bytes",
    "binary": b"\xff\x00",
    "nested": [{"deep": (1, "ü")}],
}
PLAIN = {"n": 1, "f": 1.5, "s": "ü", "l": [1, None, True]}
ETA = datetime(2030, 1, 1, tzinfo=timezone.utc)


def sig(*args: Any, **options: Any) -> Any:
    return add.s(*args).set(**options)


# name → how the call is made. All ids are fixed, so that recordings can be compared.
TASKS: dict[str, Any] = {
    "plain": lambda: add.apply_async((2, 2), task_id="id-1"),
    "no_args": lambda: echo.apply_async(task_id="id-1"),
    "kwargs": lambda: add.apply_async((2,), {"y": 3}, task_id="id-1"),
    "values": lambda: echo.apply_async((VALUES,), {"when": VALUES["datetime"]}, task_id="id-1"),
    "long_args": lambda: echo.apply_async(("x" * 5000, list(range(2000))), task_id="id-1"),
    "nested_args": lambda: echo.apply_async(([[[[[1]]]], {"a": {"b": {"c": {"d": 1}}}}],), task_id="id-1"),
    "countdown": lambda: add.apply_async((2, 2), countdown=3600, task_id="id-1"),
    "eta": lambda: add.apply_async((2, 2), eta=ETA, task_id="id-1"),
    "expires_seconds": lambda: add.apply_async((2, 2), expires=600.5, task_id="id-1"),
    "expires_at": lambda: add.apply_async((2, 2), expires=ETA, task_id="id-1"),
    "limits": lambda: add.apply_async((2, 2), time_limit=30, soft_time_limit=20, task_id="id-1"),
    "shadow": lambda: add.apply_async((2, 2), shadow="other name", task_id="id-1"),
    "priority": lambda: add.apply_async((2, 2), priority=7, task_id="id-1"),
    "ignore_result": lambda: add.apply_async((2, 2), ignore_result=True, task_id="id-1"),
    "headers": lambda: add.apply_async((2, 2), headers={"tenant": "x", "n": 5}, task_id="id-1"),
    "transient": lambda: add.apply_async((2, 2), delivery_mode=1, task_id="id-1"),
    "link": lambda: add.apply_async((2, 2), link=sig(10, task_id="id-2"), task_id="id-1"),
    "links": lambda: add.apply_async((2, 2), link=[sig(10, task_id="id-2"), add.si(1, 1)], task_id="id-1"),
    "link_error": lambda: add.apply_async((2, 2), link_error=echo.s().set(task_id="id-3"), task_id="id-1"),
    "parents": lambda: add.apply_async((2, 2), task_id="id-1", root_id="root", parent_id="parent"),
    "group_member": lambda: add.apply_async((2, 2), task_id="id-1", group_id="g-1", group_index=1),
    "chain": lambda: chain(add.s(1, 1), add.s(10), add.s(100)).apply_async(),
    "group": lambda: group(add.s(1, 1), add.s(2, 2)).apply_async(),
    "stamped": lambda: add.apply_async(
        (2, 2), task_id="id-1", stamped_headers=["tenant"], tenant="x", headers={"stamps": {"tenant": ["x"]}}
    ),
    **{
        f"serializer_{name}": lambda name=name: echo.apply_async((PLAIN,), serializer=name, task_id="id-1")
        for name in ("json", "yaml", "msgpack", "pickle")
    },
    **{
        f"compression_{name}": lambda name=name: add.apply_async((2, 2), compression=name, task_id="id-1")
        for name in ("gzip", "zlib", "bzip2", "lzma", "zstd")
    },
    "pickle_values": lambda: echo.apply_async((VALUES,), serializer="pickle", task_id="id-1"),
    "send_task": lambda: app.send_task("elsewhere.task", (1,), {"k": "v"}, task_id="id-1"),
    "signature": lambda: signature("elsewhere.task", args=(1,), immutable=True).apply_async(task_id="id-1"),
}


def properties_of(method: Any, properties: pika.BasicProperties, body: bytes) -> dict[str, Any]:
    known = {name: value for name, value in vars(properties).items() if value is not None and name != "headers"}
    return {
        "exchange": method.exchange,
        "routing_key": method.routing_key,
        "properties": known,
        "headers": properties.headers,
        "body": base64.b64encode(body).decode("ascii"),
    }


def drain(channel: Any, queue: str) -> list[dict[str, Any]]:
    found = []
    while True:
        method, properties, body = channel.basic_get(queue, auto_ack=True)
        if method is None:
            return found
        found.append(properties_of(method, properties, body))


def write(name: str, content: Any) -> None:
    about = {"celery": celery.__version__, "kombu": kombu.__version__, **content}
    text = json.dumps(about, indent=1, ensure_ascii=False, default=str)
    (HERE / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def record_tasks(channel: Any) -> None:
    for name, call in TASKS.items():
        call()
        write(f"task_{name}", {"messages": drain(channel, QUEUE)})


def record_v1(channel: Any) -> None:
    for name, options in {"v1": {}, "v1_eta": {"eta": ETA, "expires": ETA, "time_limit": 9}}.items():
        message = app.amqp.as_task_v1("id-1", "recorded.add", (2, 2), {}, **options)
        with app.producer_or_acquire() as producer:
            producer.publish(
                message.body, routing_key=QUEUE, serializer="json", headers=message.headers, **message.properties
            )
        write(f"task_{name}", {"messages": drain(channel, QUEUE)})


RESULTS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "success": ("recorded.add", (2, 2), {}),
    "values": ("recorded.odd_value", (), {}),
    "none": ("recorded.echo", (None,), {}),
    "failure": ("recorded.fail", (), {}),
    "failure_odd": ("recorded.fail", ("odd",), {}),
    "failure_object": ("recorded.fail", ("object",), {}),
    "children": ("recorded.spawn", (), {}),
    "retry": ("recorded.again", (), {}),
    "unregistered": ("recorded.nowhere", (), {}),
    "group": ("recorded.add", (2, 2), {"group_id": "g-1", "parent_id": "p-1", "root_id": "r-1"}),
}


def record_results(channel: Any, kind: str, store: Any) -> None:
    """A worker in a process of its own; the reply queue (rpc) is ours, the keys (redis) are read as they are."""
    reply_to = f"replies.{kind}"
    channel.queue_declare(reply_to, exclusive=True)
    command = [sys.executable, "-m", "celery", "-A", "record", "worker", "-P", "solo", "-l", "ERROR", "-n", "rec@host"]
    environment = {**os.environ, "RECORD_KIND": kind, "C_FORCE_ROOT": "1"}
    with subprocess.Popen([*command, "--without-gossip", "--without-mingle"], cwd=HERE, env=environment) as worker:
        try:
            for name, (task, args, options) in RESULTS.items():
                task_id = f"{kind}-{name}"
                app.send_task(task, args, task_id=task_id, reply_to=reply_to, **options)
                write(f"result_{kind}_{name}", store(reply_to, task_id))
        finally:
            worker.terminate()


def from_rpc(channel: Any) -> Any:
    def read(reply_to: str, _task_id: str) -> dict[str, Any]:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            found = drain(channel, reply_to)
            if found:
                return {"messages": found}
            time.sleep(0.02)
        raise TimeoutError(_task_id)

    return read


def from_redis() -> Any:
    client = redis.Redis.from_url(REDIS)

    def read(_reply_to: str, task_id: str) -> dict[str, Any]:
        key = f"celery-task-meta-{task_id}"
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            value = client.get(key)
            if value is not None:
                return {"key": key, "ttl": client.ttl(key), "body": base64.b64encode(value).decode("ascii")}
            time.sleep(0.02)
        raise TimeoutError(task_id)

    return read


def main() -> None:
    connection = pika.BlockingConnection(pika.URLParameters(BROKER))
    channel = connection.channel()
    channel.queue_declare(QUEUE, durable=True)
    record_tasks(channel)
    record_v1(channel)
    for kind in KINDS:
        record_results(channel, kind, from_redis() if kind in ("redis", "extended") else from_rpc(channel))
    connection.close()


if __name__ == "__main__":
    main()
