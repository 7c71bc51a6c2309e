"""QueueAdmin and the inventory on the in-memory broker: what the command line does with queues."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pika.exceptions import ChannelClosedByBroker

from amqtask.exceptions import BrokerUnreachable, OperationalError, QueueNotFound
from amqtask.protocol.entities import Binding, Declaration, Exchange, Queue, arguments
from amqtask.protocol.message import Delivery, Message, Properties
from amqtask.transport import inventory
from amqtask.transport.admin import QueueAdmin, refusal_error
from amqtask.transport.memory.broker import MemoryBroker
from amqtask.transport.memory.local import MemoryAddress
from amqtask.transport.publisher import PikaPublisher


class Office:
    """A broker with the queues `work` and `other`, and an open QueueAdmin."""

    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self.addresses = [MemoryAddress(broker=self.broker)]
        self.publisher = PikaPublisher(self.addresses, timeout=60.0)
        self.publisher.declare([Queue("work"), Queue("other")])
        self.admin = QueueAdmin(self.addresses).__enter__()

    def put(self, *bodies: bytes) -> None:
        for body in bodies:
            self.publisher.publish(Message(body, Properties(headers={"id": body.decode()}), "", "work"))

    def bodies(self, queue: str = "work") -> list[bytes]:
        return [body for _, body in self.broker.messages(queue)]

    def close(self) -> None:
        self.admin.__exit__()
        self.publisher.close()


@pytest.fixture
def office() -> Iterator[Office]:
    made = Office()
    yield made
    made.close()


def elsewhere(delivery: Delivery) -> Message | None:
    """What moves to `other`: all but `keep`."""
    return None if delivery.body == b"keep" else Message(delivery.body, Properties(), "", "other")


def test_a_queue_is_counted_looked_at_emptied_and_deleted(office: Office) -> None:
    office.put(b"1", b"2", b"3")

    assert office.admin.state("work") == (3, 0)
    assert [delivery.body for delivery in office.admin.browse("work", 2)] == [b"1", b"2"]
    assert office.bodies() == [b"1", b"2", b"3"]
    first = office.admin.take("work")
    assert first is not None
    assert first.properties.headers["id"] == "1"
    assert office.admin.purge("work") == 2
    assert office.admin.take("work") is None
    office.admin.delete("work")
    assert office.broker.queue_names() == ["other"]


def test_many_queues_are_asked_about_at_once_whichever_of_them_are_there(office: Office) -> None:
    office.put(b"1", b"2")
    names = ["no-1", "work", *["other", "no-2", "work"] * 150, "no-3"]

    assert office.admin.states(names) == {"work": (2, 0), "other": (0, 0)}
    assert office.admin.states([]) == {}
    assert office.admin.states(["no-1"]) == {}
    assert office.admin.state("work") == (2, 0)


def test_after_a_refusal_the_connection_is_used_on(office: Office) -> None:
    with pytest.raises(QueueNotFound, match="'nothing'"):
        office.admin.state("nothing")
    office.admin.wait(0.0)

    assert not office.admin.has_exchange("nothing")
    assert office.admin.has_exchange("amq.topic")
    assert office.admin.count("work") == 0


def test_a_queue_whose_node_is_down_is_not_said_to_be_missing() -> None:
    reason = "NOT_FOUND - home node 'rabbit@b' of durable queue 'jobs' in vhost '/' is down or inaccessible"

    error = refusal_error(ChannelClosedByBroker(404, reason), "jobs")

    assert str(error) == f"queue 'jobs' cannot be reached: {reason}"
    assert isinstance(error, QueueNotFound)  # as a listing of queues expects


def test_messages_move_but_for_those_that_are_to_stay_or_cannot_be_published(office: Office) -> None:
    office.put(*(b"%d" % number for number in range(60)), b"keep")

    moved = office.admin.move("work", office.publisher, elsewhere)

    assert (moved.moved, moved.kept, moved.failed) == (60, 1, 0)
    assert office.bodies() == [b"keep"]
    assert office.bodies("other") == [b"%d" % number for number in range(60)]

    office.broker.delete_queue("other")
    office.put(b"nowhere")
    moved = office.admin.move("work", office.publisher, elsewhere)

    assert (moved.moved, moved.kept, moved.failed) == (0, 1, 1)
    assert office.bodies() == [b"keep", b"nowhere"]


def test_messages_that_are_meant_are_found_among_all_and_deleted(office: Office) -> None:
    office.put(*(b"%d" % number for number in range(60)))

    def is_even(delivery: Delivery) -> bool:
        return int(delivery.body) % 2 == 0

    assert office.admin.sift("work", is_even, delete=False) == 30
    assert office.broker.count("work") == 60
    assert office.admin.sift("work", is_even, delete=True) == 30
    assert office.bodies() == [b"%d" % number for number in range(1, 60, 2)]


def test_a_broker_that_goes_away_is_told_in_our_words(office: Office) -> None:
    office.broker.stop()

    with pytest.raises(OperationalError, match="broke"):
        office.admin.count("work")
    with pytest.raises(BrokerUnreachable, match="memory://"), QueueAdmin(office.addresses):
        pytest.fail("nobody answers")


def test_a_topology_is_checked_and_declared(office: Office) -> None:
    news = Exchange("news", "topic")
    plan: list[Declaration] = [
        news,
        Queue("work", arguments=arguments({"x-max-priority": 3})),
        Queue("new"),
        Binding(news, "new", "#"),
    ]

    before = [finding.status for finding in inventory.check(office.admin, plan)]
    declared = [finding.status for finding in inventory.declare(office.admin, plan)]
    after = [finding.status for finding in inventory.check(office.admin, plan)]

    assert before == ["missing", "differs", "missing", "unknown"]
    assert declared == ["created", "differs", "created", "ok"]
    assert after == ["ok", "differs", "ok", "unknown"]


def test_a_binding_to_nothing_is_refused_with_the_reason(office: Office) -> None:
    (finding,) = inventory.declare(office.admin, [Binding(Exchange("nothing"), "work")])

    assert finding.status == "refused"
    assert "no exchange 'nothing'" in finding.detail


@pytest.mark.parametrize(("name", "said"), [("w" * 256, "has 256 bytes"), ("wo\nrk", "has a line end")])
def test_a_name_that_no_queue_can_have_is_one_of_no_queue(office: Office, name: str, said: str) -> None:
    """RabbitMQ takes line ends out: it would count, or purge, another queue."""
    office.put(b"1")
    for job in (office.admin.state, office.admin.count, office.admin.purge, office.admin.delete, office.admin.take):
        with pytest.raises(QueueNotFound, match=said):
            job(name)

    assert not office.admin.has_exchange(name)
    assert list(office.admin.states(["work", name, "other"])) == ["work", "other"]
    assert office.bodies() == [b"1"]
