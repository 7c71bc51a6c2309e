"""Header values on a real broker: a fraction of a second stays one, whoever wrote it."""

from __future__ import annotations

import asyncio
import uuid

import aio_pika
import pika

from amqtask.transport import content

HEADERS = {"timelimit": [30.5, None], "nested": {"ratio": 0.25, "n": -1}, "big": 2**40, "text": "ü", "yes": True}


def test_headers_with_fractions_survive_the_broker(broker_url: str) -> None:
    content.install()
    connection = pika.BlockingConnection(pika.URLParameters(broker_url))
    channel = connection.channel()
    queue = channel.queue_declare("", exclusive=True).method.queue

    channel.basic_publish("", queue, b"", pika.BasicProperties(headers=HEADERS))
    _, properties, _ = channel.basic_get(queue, auto_ack=True)
    connection.close()

    assert properties.headers == HEADERS


async def _publish_with_another_client(url: str, queue: str) -> None:
    connection = await aio_pika.connect(url)
    async with connection:
        channel = await connection.channel()
        message = aio_pika.Message(b"", headers={"timelimit": [30.5, None], "ratio": 0.25})
        await channel.default_exchange.publish(message, queue)


def test_fractions_from_another_client_are_read(broker_url: str) -> None:
    content.install()
    connection = pika.BlockingConnection(pika.URLParameters(broker_url))
    channel = connection.channel()
    queue = f"t-{uuid.uuid4().hex[:12]}"
    channel.queue_declare(queue, durable=True)
    try:
        asyncio.run(_publish_with_another_client(broker_url, queue))
        _, properties, _ = channel.basic_get(queue, auto_ack=True)
    finally:
        channel.queue_delete(queue)
        connection.close()

    assert properties.headers == {"timelimit": [30.5, None], "ratio": 0.25}
