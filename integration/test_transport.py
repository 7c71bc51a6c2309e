"""pika's transport keeps the contract on a real broker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from amqtask.testing.suites.transport import TransportSuite
from amqtask.transport.connection import LoopConnection
from amqtask.transport.consumer import PikaConsumer
from amqtask.transport.contract import Consumer, ConsumerListener, LoopPublisher, Publisher
from amqtask.transport.loop import PikaLoop
from amqtask.transport.loop_publisher import PikaLoopPublisher
from amqtask.transport.publisher import PikaPublisher
from amqtask.transport.url import parse_broker_urls
from integration.conftest import Broker
from integration.faults import Forwarder


class TestPika(TransportSuite):
    @pytest.fixture(autouse=True)
    def parts(self, rabbit: Broker) -> Iterator[None]:
        self.rabbit = rabbit
        with Forwarder(rabbit.url) as self.forwarder:
            self.addresses = parse_broker_urls(self.forwarder.url)
            yield from self.with_parts()

    def make_publisher(self, on_warning: Callable[[str], None]) -> Publisher:
        return PikaPublisher(self.addresses, on_warning=on_warning)

    def make_loop(self) -> PikaLoop:
        return PikaLoop()

    def make_consumer(self, loop: Any, listener: ConsumerListener) -> Consumer:
        return PikaConsumer(LoopConnection(self.addresses, loop), listener)

    def make_loop_publisher(self, loop: Any, on_warning: Callable[[str], None]) -> LoopPublisher:
        return PikaLoopPublisher(LoopConnection(self.addresses, loop), on_warning=on_warning)

    def cut(self) -> None:
        self.forwarder.cut()

    def delete_queue(self, name: str) -> None:
        self.rabbit.channel().queue_delete(name)

    def delete_exchange(self, name: str) -> None:
        self.rabbit.channel().exchange_delete(name)
