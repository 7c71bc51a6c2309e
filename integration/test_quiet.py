"""What pika logs of our connections is not told; what it logs of others is."""

from __future__ import annotations

import pika
import pytest

from amqtask.exceptions import BrokerUnreachable
from amqtask.transport.admin import QueueAdmin
from amqtask.transport.url import parse_broker_urls
from integration.looped import Looped
from integration.nodes import free_port


def test_a_users_own_connection_is_logged_and_ours_is_not(caplog: pytest.LogCaptureFixture) -> None:
    url = f"amqp://guest:guest@127.0.0.1:{free_port()}/"
    with pytest.raises(BrokerUnreachable), QueueAdmin(parse_broker_urls(url)):
        pass
    assert caplog.records == []

    with pytest.raises(pika.exceptions.AMQPConnectionError):
        pika.BlockingConnection(pika.URLParameters(url))

    assert {record.name.partition(".")[0] for record in caplog.records} == {"pika"}


def test_a_workers_connections_leave_the_telling_to_the_worker(caplog: pytest.LogCaptureFixture) -> None:
    looped = Looped(f"amqp://guest:guest@127.0.0.1:{free_port()}/")
    listener, _ = looped.consumer()

    looped.until(lambda: listener.warnings)
    looped.close()

    assert [record for record in caplog.records if record.name.startswith("pika")] == []
