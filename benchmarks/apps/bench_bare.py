"""Bare pika: the floor that everything is compared with."""

import os
import sys
import time
from typing import Any

import pika
from pika.adapters.select_connection import SelectConnection

from benchmarks.apps import clients

URL = os.environ["AMQTASK_BROKER_URL"]
PREFETCH = 200
QUEUE = os.environ.get("BENCH_QUEUE", "bench_bare")
ECHO_QUEUE = {
    "queue": "bench_echo",
    "durable": True,
    "arguments": {"x-queue-type": os.environ.get("BENCH_QUEUE_TYPE", "classic")},
}


class Drain:
    """Consumes `count` messages on one SelectConnection and acknowledges each (or every 50th, multiple)."""

    def __init__(self, count: int, every: int) -> None:
        self._left = count
        self._every = every
        self._since = 0
        self.first = 0.0
        self.last = 0.0
        self._connection = SelectConnection(pika.URLParameters(URL), on_open_callback=self._opened)

    def run(self) -> None:
        """Until everything is acknowledged."""
        self._connection.ioloop.start()

    def _opened(self, connection: Any) -> None:
        connection.channel(on_open_callback=self._ready)

    def _ready(self, channel: Any) -> None:
        channel.basic_qos(prefetch_count=PREFETCH)
        channel.basic_consume(QUEUE, self._message)

    def _message(self, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        if not self.first:
            self.first = time.perf_counter()
        self._left -= 1
        self._since += 1
        if self._every == 1:
            channel.basic_ack(method.delivery_tag)
        elif self._since >= self._every or not self._left:
            channel.basic_ack(method.delivery_tag, multiple=True)
            self._since = 0
        if not self._left:
            self.last = time.perf_counter()
            self._connection.close()
            self._connection.ioloop.stop()


def drain(count: int, every: int) -> dict[str, float]:
    """Messages per second and CPU microseconds per message."""
    run = Drain(count, every)
    cpu = time.process_time()
    run.run()
    cpu = time.process_time() - cpu
    return {"per_second": count / (run.last - run.first), "cpu_us": cpu / count * 1e6}


def echo() -> None:
    """The other end of the bare round trip: answer every message, then acknowledge it."""
    connection = SelectConnection(
        pika.URLParameters(URL), on_open_callback=lambda c: c.channel(on_open_callback=_echo_channel)
    )
    connection.ioloop.start()


def _echo_channel(channel: Any) -> None:
    def answer(channel: Any, method: Any, properties: Any, body: bytes) -> None:
        channel.basic_publish("", properties.reply_to, body, pika.BasicProperties(delivery_mode=1))
        channel.basic_ack(method.delivery_tag)

    channel.basic_qos(prefetch_count=PREFETCH)
    channel.queue_declare(**ECHO_QUEUE, callback=lambda _: channel.basic_consume("bench_echo", answer))


class Caller:
    """The calling end: one SelectConnection that publishes when the previous answer has come."""

    def __init__(self, count: int) -> None:
        self._left = count
        self.times: list[float] = []
        self._sent = 0.0
        self._connection = SelectConnection(pika.URLParameters(URL), on_open_callback=self._opened)

    def run(self) -> None:
        """Until every answer has come."""
        self._connection.ioloop.start()

    def _opened(self, connection: Any) -> None:
        connection.channel(on_open_callback=self._ready)

    def _ready(self, channel: Any) -> None:
        self._channel = channel
        channel.queue_declare("", exclusive=True, callback=self._declared)

    def _declared(self, frame: Any) -> None:
        self._reply_to = frame.method.queue
        self._channel.basic_consume(self._reply_to, self._answer, auto_ack=True, callback=lambda _: self._send())

    def _send(self) -> None:
        self._sent = time.perf_counter()
        self._channel.basic_publish(
            "", "bench_echo", b"x" * 60, pika.BasicProperties(reply_to=self._reply_to, delivery_mode=2)
        )

    def _answer(self, *_: Any) -> None:
        self.times.append((time.perf_counter() - self._sent) * 1000)
        self._left -= 1
        if self._left:
            self._send()
        else:
            self._connection.close()
            self._connection.ioloop.stop()


def roundtrip(count: int) -> dict[str, float]:
    """Milliseconds."""
    caller = Caller(count + 20)
    caller.run()
    times = sorted(caller.times[20:])
    return {"p50": times[len(times) // 2], "p99": times[int(len(times) * 0.99) - 1]}


if __name__ == "__main__":
    if sys.argv[1] == "echo":
        echo()
    else:
        clients.main(
            {
                "drain": lambda n: drain(n, 1),
                "drain_multiple": lambda n: drain(n, 50),
                "roundtrip": roundtrip,
            }
        )
