"""The in-process broker keeps the transport's contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from amqtask.testing.loop import PlainLoop
from amqtask.testing.suites.transport import TransportSuite
from amqtask.transport.connection import LoopConnection
from amqtask.transport.consumer import PikaConsumer
from amqtask.transport.contract import Consumer, ConsumerListener, LoopPublisher, Publisher
from amqtask.transport.loop_publisher import PikaLoopPublisher
from amqtask.transport.memory.broker import MemoryBroker
from amqtask.transport.memory.local import MemoryAddress
from amqtask.transport.publisher import PikaPublisher


class TestMemory(TransportSuite):
    @pytest.fixture(autouse=True)
    def parts(self) -> Iterator[None]:
        self.broker = MemoryBroker()
        self.addresses = [MemoryAddress(broker=self.broker)]
        yield from self.with_parts()

    def make_publisher(self, on_warning: Callable[[str], None]) -> Publisher:
        return PikaPublisher(self.addresses, timeout=2.0, on_warning=on_warning)

    def make_loop(self) -> PlainLoop:
        return PlainLoop()

    def make_consumer(self, loop: Any, listener: ConsumerListener) -> Consumer:
        return PikaConsumer(LoopConnection(self.addresses, loop), listener)

    def make_loop_publisher(self, loop: Any, on_warning: Callable[[str], None]) -> LoopPublisher:
        return PikaLoopPublisher(LoopConnection(self.addresses, loop), on_warning=on_warning, nack_patience=0.5)

    def cut(self) -> None:
        self.broker.cut()

    def delete_queue(self, name: str) -> None:
        self.broker.delete_queue(name)

    def delete_exchange(self, name: str) -> None:
        self.broker.delete_exchange(name)
