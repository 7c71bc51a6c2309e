"""The stores on real servers keep the backends' contract, across forks, restarts and bad input too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from amqtask.backends.contract import BackendOptions, ResultBackend
from amqtask.backends.redis import RedisBackend
from amqtask.backends.rpc import RpcBackend
from amqtask.message import Message
from amqtask.testing.suites.backend import BackendSuite
from amqtask.transport.publisher import PikaPublisher
from amqtask.transport.url import parse_broker_urls


class TestRpc(BackendSuite):
    @pytest.fixture(autouse=True)
    def broker(self, broker_url: str) -> Iterator[None]:
        self.addresses = parse_broker_urls(broker_url)
        self.publisher = PikaPublisher(self.addresses)
        yield
        self.publisher.close()

    def make(self) -> ResultBackend:
        return RpcBackend(BackendOptions(url="rpc://", brokers=self.addresses, expires=60.0))

    def publish(self, message: Message) -> None:
        self.publisher.publish(message)


class TestRedis(BackendSuite):
    @pytest.fixture(autouse=True)
    def server(self, redis_url: str) -> None:
        self.url = redis_url

    def make(self) -> ResultBackend:
        return RedisBackend(BackendOptions(url=self.url, expires=60.0))
