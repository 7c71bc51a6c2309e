"""Whatever arrives on a task queue, only that message is affected: good tasks around it run, and it ends in one place."""

from __future__ import annotations

import bz2
import json
import struct
import uuid
from collections.abc import Iterator
from typing import Any

import pika
import pytest

from amqtask import AmqTask
from integration.conftest import Broker
from integration.waiting import PATIENT
from integration.workers import WorkerProcess, eventually

SAMPLE = "integration.apps.bounded"
JSON = "application/json"


class Raw(pika.BasicProperties):  # type: ignore[misc]  # pika is untyped here
    """Properties whose headers, and whose correlation id, are what the test writes, byte by byte."""

    def __init__(self, fields: bytes, **more: Any) -> None:
        super().__init__(content_type=JSON, content_encoding="utf-8", delivery_mode=2, headers={}, **more)
        self._fields = fields

    def encode(self) -> list[bytes]:
        pieces: list[bytes] = super().encode()
        at = next(index for index, piece in enumerate(pieces) if piece == b"\x00\x00\x00\x00")
        pieces[at] = struct.pack(">I", len(self._fields)) + self._fields
        return pieces


def text(name: str, value: bytes) -> bytes:
    raw = name.encode()
    return bytes([len(raw)]) + raw + b"S" + struct.pack(">I", len(value)) + value


def deep(kind: bytes, levels: int) -> bytes:
    inner = b""
    for _ in range(levels):
        name = b"\x01n" if kind == b"F" else b""
        inner = name + kind + struct.pack(">I", len(inner)) + inner
    return inner if kind == b"F" else b"\x01n" + inner


ADD = text("task", b"sample.add")
BODY = b"[[1, 1], {}, {}]"


def raw_messages() -> dict[str, tuple[bytes, pika.BasicProperties]]:
    """Messages that end in the dead-letter queue."""
    named = ADD + text("id", b"i")
    return {
        "headers of a whole frame": (BODY, Raw(text("task", b"no.such") + text("id", b"i") + text("big", b"x" * 130_000))),
        "a time beyond the calendar": (BODY, Raw(named + b"\x01wT" + b"\x7f" + b"\xff" * 7)),
        "tables 500 deep": (BODY, Raw(named + deep(b"F", 500))),
        "lists 500 deep": (BODY, Raw(named + deep(b"A", 500))),
        "a header name that is not utf-8": (BODY, Raw(named + b"\x02\xff\xfeV")),
        "a task name that is not utf-8": (BODY, Raw(text("task", b"\xff\xfe") + text("id", b"i"))),
        "an id with a line's end": (BODY, Raw(ADD + text("id", b"a\n[2026] forged\x1b[2J"))),
        "an id of a table": (BODY, Raw(ADD + b"\x02idF\x00\x00\x00\x03\x01nV")),
        "a long unknown name": (BODY, Raw(text("task", b"t" * 60_000) + text("id", b"i"))),
        "a long time": (BODY, Raw(named + text("eta", b"9" * 50_000))),
        "a number of retries that is a text": (BODY, Raw(named + text("retries", b"many"))),
        "a group that is a list": (BODY, Raw(named + b"\x05groupA\x00\x00\x00\x00")),
        "stamps that are a text": (BODY, Raw(named + text("stamped_headers", b"s"))),
        "an unknown compression": (BODY, Raw(named + b"\x0bcompressionA\x00\x00\x00\x01V")),
        "a bomb": (
            bz2.compress(bytes(50_000_000)),
            Raw(named + text("compression", b"application/x-bz2")),
        ),
        "a bomb for nobody": (
            bz2.compress(bytes(50_000_000)),
            Raw(text("task", b"no.such") + text("id", b"i") + text("compression", b"application/x-bz2")),
        ),
        "a v1 message with a long name": (
            json.dumps({"task": "t" * 200_000, "id": "i", "args": [], "kwargs": {}}).encode(), Raw(b"")
        ),
        "a v1 message with a long time": (
            json.dumps({"task": "sample.add", "id": "i", "eta": "e" * 200_000}).encode(), Raw(b"")
        ),
        "no headers at all": (b"[1]", pika.BasicProperties(delivery_mode=2, content_type=JSON)),
    }  # fmt: skip


def harmless() -> dict[str, tuple[bytes, pika.BasicProperties]]:
    """Messages that run, odd as they are."""
    named = ADD + text("id", b"i")
    limits = b"\x09timelimitA" + struct.pack(">I", 18)
    return {
        "negative limits": (BODY, Raw(named + limits + struct.pack(">cdcd", b"d", -5, b"d", -5))),
        "endless limits": (BODY, Raw(named + limits + struct.pack(">cdcd", b"d", 1e300, b"d", 1e300))),
        "a decimal, bytes and a date": (
            BODY,
            Raw(named + b"\x01dD\xff\x00\x00\x00\x01\x01bx\x00\x00\x00\x01\xff\x01wT" + struct.pack(">Q", 2**33)),
        ),
        "nan in a v1 message": (
            b'{"task": "sample.add", "id": "i", "args": [1, 1], "timelimit": [NaN, NaN]}', Raw(b"")
        ),
        "an odd priority and type": (BODY, Raw(named, priority=255, type="\x1b[2J", timestamp=2**63)),
    }  # fmt: skip


@pytest.fixture
def client(rabbit: Broker) -> Iterator[AmqTask]:
    """A producer with results."""
    app = AmqTask("client", broker=rabbit.url, backend="rpc://", **PATIENT)
    yield app
    app.close()


@pytest.mark.parametrize("pool", ["prefork", "solo", "asyncio", "gevent"])
def test_a_message_that_cannot_be_taken_harms_nothing_else(rabbit: Broker, client: AmqTask, pool: str) -> None:
    queue = rabbit.queue()
    with WorkerProcess(SAMPLE, "-Q", queue, "-c", "2", "-P", pool) as worker:
        hostile, odd = raw_messages(), harmless()
        results = []
        for body, properties in [*hostile.values(), *odd.values()]:
            results.append(client.send_task("sample.add", (2, 3), queue=queue))
            rabbit.publish(queue, body, properties)
        results.append(client.send_task("sample.add", (2, 3), queue=queue))

        assert [result.get(timeout=90) for result in results] == [5] * len(results)
        eventually(
            lambda: rabbit.count(f"{queue}.dead") >= len(hostile),
            what=lambda: f"{rabbit.count(f'{queue}.dead')} of {len(hostile)} are dead letters: {worker.log}",
        )
        dead = []
        while (taken := rabbit.take(f"{queue}.dead")) is not None:
            dead.append(taken)
        assert worker.stop() == 0
        log = worker.log

    assert sorted(body for _, body in dead) == sorted(body for body, _ in hostile.values())
    assert all(properties.headers["x-amqtask-reason"] for properties, _ in dead)
    # A queue whose tasks become long gives back what waits, which older brokers count.
    assert all(properties.headers["x-amqtask-attempts"] <= 2 for properties, _ in dead)
    assert max(map(len, log.splitlines())) < 8000
    assert not [line for line in log.splitlines() if line.startswith("[2026] forged")]
    assert "\x1b[2J" not in log
    assert "re-establish" not in log
    assert "Traceback" not in log


def test_a_property_that_is_no_utf_8_is_answered_under_a_readable_one(rabbit: Broker, client: AmqTask) -> None:
    queue = rabbit.queue()
    with WorkerProcess(SAMPLE, "-Q", queue, "-c", "1") as worker:
        odd = pika.BasicProperties(
            content_type=JSON,
            content_encoding="utf-8",
            delivery_mode=2,
            correlation_id=b"\xff" * 200,
            reply_to=b"\xfe" * 200,
            message_id=b"\xfd",
            headers={"task": "sample.add", "id": str(uuid.uuid4())},
        )
        rabbit.publish(queue, BODY, odd)

        assert client.send_task("sample.add", (2, 3), queue=queue).get(timeout=90) == 5
        eventually(lambda: rabbit.count(queue) == 0)
        assert worker.stop() == 0
        assert "re-establish" not in worker.log
