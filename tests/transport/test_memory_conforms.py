"""The in-process broker keeps the transport's contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from amqtask.testing.suites.transport import TransportSuite
from amqtask.transport.contract import Consumer, ConsumerListener, LoopPublisher, Publisher
from amqtask.transport.memory.broker import MemoryBroker
from amqtask.transport.memory.consumer import MemoryConsumer
from amqtask.transport.memory.loop import MemoryLoop
from amqtask.transport.memory.publisher import MemoryLoopPublisher, MemoryPublisher


class TestMemory(TransportSuite):
    @pytest.fixture(autouse=True)
    def parts(self) -> Iterator[None]:
        self.broker = MemoryBroker()
        yield from self.with_parts()

    def make_publisher(self, on_warning: Callable[[str], None]) -> Publisher:
        return MemoryPublisher(self.broker, on_warning=on_warning)

    def make_loop(self) -> MemoryLoop:
        return MemoryLoop()

    def make_consumer(self, loop: Any, listener: ConsumerListener) -> Consumer:
        return MemoryConsumer(self.broker, loop, listener)

    def make_loop_publisher(self, loop: Any, on_warning: Callable[[str], None]) -> LoopPublisher:
        return MemoryLoopPublisher(self.broker, loop, on_warning=on_warning)

    def cut(self) -> None:
        self.broker.cut()

    def delete_queue(self, name: str) -> None:
        self.broker.delete_queue(name)
