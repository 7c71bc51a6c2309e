"""Redis as a broker keeps the contract of every transport, on a real Redis, and what it says beyond that."""

from __future__ import annotations

import asyncio
import gc
import json
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
import redis

from amqtask.backends.contract import BackendOptions
from amqtask.backends.redis import RedisBackend
from amqtask.exceptions import (
    AccessRefused,
    BrokerUnreachable,
    ConnectionBlocked,
    PublishError,
    PublishRefused,
    QueueNotFound,
    Unroutable,
)
from amqtask.protocol.entities import Binding, Exchange, Queue, arguments
from amqtask.protocol.message import Delivery, Message, Properties
from amqtask.protocol.result import ResultMessage
from amqtask.testing.suites import transport
from amqtask.testing.suites.transport import CLASSIC, PATIENCE, Listener, TransportSuite
from amqtask.topology.delays import DelayPlan
from amqtask.transport.broker import Broker, open_broker
from amqtask.transport.contract import BrokerOptions, Consumer, ConsumerListener, LoopPublisher, Publisher
from amqtask.transport.loop import PikaLoop
from amqtask.transport.redis.scripts import SWEEP
from integration.faults import Forwarder
from integration.machine import free_port
from integration.servers import RedisServer, Sentinel, redis_nodes
from integration.waiting import eventually


class RedisSuite(TransportSuite):
    """The parts of TransportSuite on Redis."""

    lacks: ClassVar[frozenset[str]] = frozenset(
        {
            transport.HEADERS_EXCHANGES,
            transport.EXCHANGE_BINDINGS,
            transport.STORED_FANOUTS,
            transport.RISING_PRIORITIES,
            transport.TIME_TO_LIVE,
            transport.DELIVERIES_OF_ONE_CONNECTION,
        }
    )

    # What all keys begin with.
    prefix = ""
    client: redis.Redis
    broker: Broker

    def with_server(self, url: str) -> Iterator[None]:
        """The parts on that server."""
        self.client = self.make_client(url)
        self.broker = open_broker(BrokerOptions(url), {})
        yield from self.with_parts()
        self.client.close()

    def make_client(self, url: str) -> redis.Redis:
        """To look at the keys."""
        return redis.Redis.from_url(url)

    def make_publisher(self, on_warning: Callable[[str], None]) -> Publisher:
        return self.broker.publisher(name="test", on_warning=on_warning)

    def make_loop(self) -> PikaLoop:
        return PikaLoop()

    def make_consumer(self, loop: Any, listener: ConsumerListener) -> Consumer:
        return self.broker.consumer(loop, listener, name="test", heartbeat=None)

    def make_loop_publisher(self, loop: Any, on_warning: Callable[[str], None]) -> LoopPublisher:
        return self.broker.loop_publisher(loop, name="test", heartbeat=None, on_warning=on_warning)

    def cut(self) -> None:
        self.client.client_kill_filter(_type="normal", skipme=True)

    def delete_queue(self, name: str) -> None:
        with self.broker.queue_jobs() as jobs:
            jobs.delete(name)

    def held(self, queue: Queue) -> list[Any]:
        """The tags under which messages of a queue are held."""
        name = json.dumps(queue.name).encode()
        entries: Any = self.client.hgetall(f"{self.prefix}unacked")
        return [tag for tag, entry in entries.items() if entry.endswith(name + b"]")]

    def end_leases(self, queue: Queue) -> None:
        """As if those who hold messages of the queue had been silent for too long."""
        self.client.zadd(f"{self.prefix}amqtask.lease", dict.fromkeys(self.held(queue), 1.0))
        self.client.eval(SWEEP.source, 1, self.prefix, 100)

    def test_what_is_published_in_the_loops_last_turn_leaves(self) -> None:
        queue, _ = self.work_queue()
        self.publisher.declare([queue])
        publisher = self.loop_publisher()
        ends: list[PublishError | None] = []
        publisher.publish(Message(b"first", Properties(), "", queue.name), ends.append)
        self.until(lambda: ends)

        publisher.publish(Message(b"last", Properties(), "", queue.name), ends.append)
        publisher.stop()  # as where a worker's loop ends in this turn

        eventually(lambda: self.client.llen(f"{self.prefix}{queue.name}") == 2)
        self.settle()

    # -- what is held

    def test_what_is_held_stays_held_over_a_lost_connection(self) -> None:
        queue, _ = self.work_queue()
        listener, consumer = self.consume(queue)
        self.publish(queue, b"1", b"2")
        self.until(lambda: len(listener.deliveries) == 2)

        self.cut()
        consumer.ack(1)
        self.until(lambda: any("was lost" in text for text in listener.warnings))
        self.publish(queue, b"3")
        self.until(lambda: len(listener.deliveries) == 3)
        consumer.ack(3)
        self.stop(consumer)
        second, _ = self.consume(queue)
        self.until(lambda: second.deliveries)
        self.settle()

        assert listener.bodies == [b"1", b"2", b"3"]
        assert not listener.lost
        assert (second.bodies, second.deliveries[0].redelivered) == ([b"2"], True)

    def test_what_is_held_stays_held_though_redis_was_away_for_longer_than_a_lease(self) -> None:
        queue, _ = self.work_queue()
        listener, consumer = self.consume(queue)
        self.publish(queue, b"1")
        self.until(lambda: listener.deliveries)
        self.client.zadd(f"{self.prefix}amqtask.lease", dict.fromkeys(self.held(queue), 1.0))
        self.cut()
        self.until(lambda: any("was lost" in text for text in listener.warnings))
        self.publish(queue, b"2")
        self.until(lambda: len(listener.deliveries) > 1)
        self.settle()

        assert listener.bodies == [b"1", b"2"]
        for delivery in listener.deliveries:
            consumer.ack(delivery.tag)
        self.settle()
        assert not self.held(queue)

    def test_a_lease_that_nobody_renews_gives_the_message_to_another_consumer(self) -> None:
        queue, _ = self.work_queue()
        listener, consumer = self.consume(queue)
        self.publish(queue, b"1")
        self.until(lambda: listener.deliveries)
        other, _ = self.consume(queue)

        self.end_leases(queue)
        self.until(lambda: other.deliveries or len(listener.deliveries) > 1)
        consumer.ack(1)  # too late
        self.settle()

        (again,) = [*other.deliveries, *listener.deliveries[1:]]
        assert (again.body, again.redelivered) == (b"1", True)
        assert again.properties.headers["x-delivery-count"] == 1
        assert len(self.held(queue)) == 1

    def test_a_message_that_nobody_survives_is_dead_lettered(self) -> None:
        queue, dead = self.work_queue(**{"x-delivery-limit": 1})
        letters, _ = self.consume(dead, acks=True)
        listener, _ = self.consume(queue)
        self.publish(queue, b"1")

        for number in (1, 2):
            self.until(lambda number=number: len(listener.deliveries) == number)  # type: ignore[misc]
            self.end_leases(queue)
        self.until(lambda: letters.deliveries)

        (death,) = letters.deliveries[0].properties.headers["x-death"]
        assert (death["reason"], death["queue"]) == ("delivery_limit", queue.name)

    def test_what_was_taken_and_never_arrived_comes_over_the_next_connection(self) -> None:
        queue, _ = self.work_queue()
        listener, consumer = self.consume(queue, prefetch=1)
        self.publish(queue, *[b"%d" % number for number in range(50)])
        seen = 0
        while seen < 50:
            self.until(lambda seen=seen: len(listener.deliveries) > seen)  # type: ignore[misc]
            if seen % 10 == 5:
                consumer.ack(listener.deliveries[-1].tag)
                self.loop.run_once(0.0)
                self.cut()  # the next one may be on its way
            else:
                consumer.ack(listener.deliveries[-1].tag)
            seen += 1
        self.settle()

        assert listener.bodies == [b"%d" % number for number in range(50)]
        assert not self.held(queue)

    # -- answers with follow-ups

    def follow_up(self, queue: Queue, body: bytes = b"next", **headers: Any) -> Message:
        """To that queue."""
        return Message(body, Properties(headers=headers), "", queue.name, (queue,))

    def replaced(self, consumer: Consumer, delivery: Delivery, *messages: Message) -> list[bool]:
        """What became of it, once that is said."""
        said: list[bool] = []
        assert consumer.replace(delivery, messages, said.append)
        self.until(lambda: said)
        return said

    def test_an_answer_and_its_follow_ups_are_one_step(self) -> None:
        queue, _ = self.work_queue()
        listener, consumer = self.consume(queue, prefetch=1)
        self.publish(queue, b"1")
        self.until(lambda: listener.deliveries)
        later = DelayPlan().delayed(self.follow_up(queue, b"later", id="x"), 1)

        assert self.replaced(consumer, listener.deliveries[0], self.follow_up(queue), later) == [True]

        self.until(lambda: len(listener.deliveries) == 2)
        consumer.ack(listener.deliveries[0].tag)  # its worker says so, too
        consumer.ack(listener.deliveries[1].tag)
        self.until(lambda: len(listener.deliveries) == 3)
        consumer.ack(listener.deliveries[2].tag)
        self.settle()
        assert listener.bodies == [b"1", b"next", b"later"]
        assert not self.held(queue)

    @pytest.mark.parametrize("knows", [False, True])
    def test_who_has_lost_a_message_publishes_none_of_its_follow_ups(self, knows: bool) -> None:
        queue, _ = self.work_queue()
        listener, consumer = self.consume(queue)
        self.publish(queue, b"1")
        self.until(lambda: listener.deliveries)
        other, _ = self.consume(queue)
        self.end_leases(queue)
        self.until(lambda: other.deliveries or len(listener.deliveries) > 1)
        if knows:
            self.cut()  # over the next connection it asks for what it holds
            self.until(lambda: any("went to other workers" in text for text in listener.warnings))

        assert self.replaced(consumer, listener.deliveries[0], self.follow_up(queue)) == [True]

        self.settle()
        assert {*listener.bodies, *other.bodies} == {b"1"}
        assert len(self.held(queue)) == 1

    def test_where_a_follow_up_has_no_place_nothing_is_done(self) -> None:
        queue, _ = self.work_queue()
        full = Queue(self.name(), arguments=arguments({"x-max-length": 1, "x-overflow": "reject-publish"}))
        self.publish(full, b"it")
        listener, consumer = self.consume(queue)
        self.publish(queue, b"1")
        self.until(lambda: listener.deliveries)
        (delivery,) = listener.deliveries
        homeless = Message(b"", Properties(), "", self.name("nobody"))

        for bad in (homeless, self.follow_up(full)):
            assert self.replaced(consumer, delivery, self.follow_up(queue), bad) == [False]

        self.settle()
        assert listener.bodies == [b"1"]
        consumer.ack(delivery.tag)
        self.settle()
        assert not self.held(queue)

    def test_follow_ups_leave_once_however_often_the_connection_is_cut(self) -> None:
        queue, _ = self.work_queue()
        done = Queue(self.name(), arguments=CLASSIC)
        listener, consumer = self.consume(queue, prefetch=10)
        self.publish(queue, *[b"%d" % number for number in range(50)])
        said: list[bool] = []
        for number in range(50):
            self.until(lambda number=number: len(listener.deliveries) > number)  # type: ignore[misc]
            delivery = listener.deliveries[number]
            assert consumer.replace(delivery, [self.follow_up(done, delivery.body)], said.append)
            if number % 5 == 3:
                self.loop.run_once(0.0)
                self.cut()
        self.until(lambda: len(said) == 50)
        last, _ = self.consume(done)
        self.until(lambda: len(last.deliveries) == 50)
        self.settle()

        assert sorted(last.bodies, key=int) == [b"%d" % number for number in range(50)]
        assert not self.held(queue)
        assert not [text for text in listener.warnings if "to other workers" in text]

    def test_what_came_off_a_channel_is_not_replaced(self) -> None:
        exchange, queue = Exchange(self.name("x"), "fanout"), Queue(self.name(), arguments=CLASSIC)
        listener, consumer = self.consume(Queue(self.name(), exchange=exchange, exclusive=True))
        self.settle()
        self.publisher.publish(Message(b"to all", Properties(), exchange.name, "", (exchange,)))
        self.until(lambda: listener.deliveries)

        assert not consumer.replace(listener.deliveries[0], [self.follow_up(queue)], lambda is_done: None)

    # -- keys that are no lists

    def test_a_key_that_is_no_list_keeps_no_other_queue_waiting(self) -> None:
        odd, queue = Queue(self.name(), arguments=CLASSIC), Queue(self.name(), arguments=CLASSIC)
        self.client.set(self.prefix + odd.name, "not a list")
        listener, _ = self.consume(odd, queue, acks=True)
        self.publish(queue, b"1", b"2")
        self.until(lambda: len(listener.deliveries) == 2)
        self.until(lambda: any("not a list" in text for text in listener.warnings))
        with pytest.raises(PublishRefused, match="WRONGTYPE"):
            self.publish(odd, b"3")
        self.client.delete(self.prefix + odd.name)
        self.publish(odd, b"4")
        self.until(lambda: len(listener.deliveries) == 3)

        assert listener.bodies == [b"1", b"2", b"4"]

    def test_what_cannot_go_back_to_its_queue_stays_held(self) -> None:
        queue, _ = self.work_queue()
        listener, consumer = self.consume(queue)
        self.publish(queue, b"1")
        self.until(lambda: listener.deliveries)
        self.client.set(self.prefix + queue.name, "not a list")

        consumer.nack(listener.deliveries[0].tag)
        self.settle()
        assert len(self.held(queue)) == 1
        self.client.delete(self.prefix + queue.name)
        self.end_leases(queue)

        self.until(lambda: len(listener.deliveries) == 2)
        assert listener.bodies == [b"1", b"1"]

    def test_what_is_due_waits_where_its_queue_is_no_list(self) -> None:
        queue = Queue(self.name(), arguments=CLASSIC)
        self.client.set(self.prefix + queue.name, "not a list")
        listener, _ = self.consume(Queue(self.name(), arguments=CLASSIC), acks=True)
        self.publisher.publish(DelayPlan().delayed(self.follow_up(queue, b"late"), 0.2))
        self.until(lambda: any("no queues" in text for text in listener.warnings))

        self.client.delete(self.prefix + queue.name)
        again, _ = self.consume(queue)
        self.until(lambda: again.deliveries)

        assert again.bodies == [b"late"]

    def test_an_answer_stays_where_delayed_messages_have_no_place_and_that_is_told(self) -> None:
        queue, _ = self.work_queue()
        listener, consumer = self.consume(queue)
        self.publish(queue, b"1")
        self.until(lambda: listener.deliveries)
        self.client.set(f"{self.prefix}amqtask.delay", "not a set")

        later = DelayPlan().delayed(self.follow_up(queue, b"later"), 1)
        assert self.replaced(consumer, listener.deliveries[0], self.follow_up(queue), later) == [False]

        self.until(lambda: any("delayed messages cannot be looked at" in text for text in listener.warnings))
        assert len(self.held(queue)) == 1
        self.client.delete(f"{self.prefix}amqtask.delay")
        assert self.replaced(consumer, listener.deliveries[0], later) == [True]

    # -- queues of a consumer's own

    def test_a_queue_goes_with_the_last_of_its_consumers(self) -> None:
        exchange = Exchange(self.name("x"))
        queue = Queue(self.name(), exchange=exchange, routing_key="k", auto_delete=True, arguments=CLASSIC)
        _, first = self.consume(queue)
        _, second = self.consume(queue)

        self.stop(first)
        self.publish(queue, b"1")
        assert self.client.hexists(f"{self.prefix}amqtask.queues", queue.name)
        self.stop(second)

        assert not self.client.hexists(f"{self.prefix}amqtask.queues", queue.name)
        assert not self.client.exists(self.prefix + queue.name, f"{self.prefix}_kombu.binding.{exchange.name}")

    def test_what_dead_owners_leave_expires(self) -> None:
        exchange = Exchange(self.name("x"))
        mine = Queue(self.name(), exchange=exchange, routing_key="k", auto_delete=True, arguments=CLASSIC)
        reader = self.broker.queue_reader(mine, lambda delivery: None, name="test")
        reader.ensure(PATIENCE)
        other = Queue(self.name(), exclusive=True, arguments=CLASSIC)
        self.consume(other)
        owned: Any = self.client.zrange(f"{self.prefix}amqtask.owned", 0, -1)
        self.client.zadd(f"{self.prefix}amqtask.owned", {name: 1.0 for name in owned if mine.name.encode() in name})

        self.client.eval(SWEEP.source, 1, self.prefix, 100)

        assert not self.client.hexists(f"{self.prefix}amqtask.queues", mine.name)
        assert not self.client.exists(f"{self.prefix}_kombu.binding.{exchange.name}")
        assert self.client.hexists(f"{self.prefix}amqtask.queues", other.name)
        reader.close()

    # -- Celery's layout

    def test_a_message_is_where_celery_looks_for_it(self) -> None:
        queue = Queue(self.name(), arguments=CLASSIC)
        self.publish(queue, b"[]", priority=7, headers={"id": "the-id"}, content_type="application/json")

        (text,) = self.client.lrange(f"{self.prefix}{queue.name}\x06\x166", 0, -1)
        document = json.loads(text)

        assert document["body"] == "W10="
        assert document["headers"] == {"id": "the-id"}
        assert document["content-type"] == "application/json"
        properties = document["properties"]
        assert properties["delivery_info"] == {"exchange": "", "routing_key": queue.name}
        assert (properties["priority"], properties["body_encoding"], properties["delivery_mode"]) == (7, "base64", 2)

    def test_lower_priorities_come_first_as_with_celery(self) -> None:
        queue = Queue(self.name(), arguments=CLASSIC)
        for body, priority in ((b"9", 9), (b"4", 4), (b"none", None), (b"3", 3)):
            self.publish(queue, body, priority=priority)

        listener, _ = self.consume(queue)
        self.until(lambda: len(listener.deliveries) == 4)

        assert listener.bodies == [b"none", b"4", b"3", b"9"]

    def test_what_is_no_message_is_delivered_with_that_reason(self) -> None:
        queue = Queue(self.name(), arguments=CLASSIC)
        listener, _ = self.consume(queue)

        self.client.lpush(f"{self.prefix}{queue.name}", b"{not json")
        self.until(lambda: listener.deliveries)

        assert listener.bodies == [b"{not json"]
        assert "envelope" in listener.deliveries[0].properties.headers.problem  # type: ignore[attr-defined]

    def test_every_consumer_of_a_fanout_has_each_message(self) -> None:
        exchange = Exchange(self.name("x"), "fanout")
        queues = [Queue(self.name(), exchange=exchange, exclusive=True) for _ in range(2)]
        listeners = [self.consume(queue, acks=True)[0] for queue in queues]
        self.settle()

        self.publisher.publish(Message(b"to all", Properties(), exchange.name, "", (exchange,)))
        self.until(lambda: all(listener.deliveries for listener in listeners))

        assert [listener.bodies for listener in listeners] == [[b"to all"], [b"to all"]]

    def test_a_consumer_answers_what_came_off_lists_and_off_channels(self) -> None:
        exchange, queue = Exchange(self.name("x"), "fanout"), Queue(self.name(), arguments=CLASSIC)
        listener, consumer = self.consume(queue, Queue(self.name(), exchange=exchange, exclusive=True))

        for number in range(20):
            self.publish(queue, b"list %d" % number)
            self.publisher.publish(Message(b"channel %d" % number, Properties(), exchange.name, "", (exchange,)))
        self.until(lambda: len(listener.deliveries) == 40)
        for delivery in listener.deliveries:
            consumer.ack(delivery.tag)
        self.settle()

        assert not self.held(queue)
        assert len({delivery.tag for delivery in listener.deliveries}) == 40

    def test_a_delayed_message_for_all_comes_to_all(self) -> None:
        exchange = Exchange(self.name("x"), "fanout")
        queues = [Queue(self.name(), exchange=exchange, exclusive=True) for _ in range(2)]
        listeners = [self.consume(queue, acks=True)[0] for queue in queues]
        self.settle()

        message = Message(b"to all", Properties(), exchange.name, "", (exchange,))
        self.publisher.publish(DelayPlan().delayed(message, 0.2))
        self.until(lambda: all(listener.deliveries for listener in listeners))

        assert [listener.bodies for listener in listeners] == [[b"to all"], [b"to all"]]

    def test_a_pattern_with_many_wildcards_keeps_redis_from_nobody(self) -> None:
        exchange, queue = Exchange(self.name("x"), "topic"), Queue(self.name(), arguments=CLASSIC)
        declared = (exchange, queue, Binding(exchange, queue.name, "#.a." * 10 + "b"))
        self.publisher.declare(declared)

        with pytest.raises(Unroutable):
            self.publisher.publish(Message(b"", Properties(), exchange.name, "a." * 60 + "c"), timeout=10.0)
        self.publisher.publish(Message(b"", Properties(), exchange.name, "a." * 60 + "b"))

    # -- what others have deleted, or what Redis has, to make room

    def test_a_message_goes_back_and_is_followed_though_the_note_of_its_queue_is_gone(self) -> None:
        queue, _ = self.work_queue()
        urgent = Properties(priority=6)
        self.publisher.publish(Message(b"1", urgent, "", queue.name, (queue,)))
        self.publisher.publish(Message(b"2", urgent, "", queue.name, (queue,)))
        listener, consumer = self.consume(queue)
        self.until(lambda: len(listener.deliveries) == 2)
        self.client.delete(f"{self.prefix}amqtask.held")

        assert self.replaced(consumer, listener.deliveries[0], self.follow_up(queue)) == [True]
        consumer.nack(listener.deliveries[1].tag)

        self.until(lambda: len(listener.deliveries) == 4)
        assert sorted(listener.bodies) == [b"1", b"2", b"2", b"next"]

    def test_leases_that_are_gone_are_made_again(self) -> None:
        queue, _ = self.work_queue()
        listener, _ = self.consume(queue)
        self.publish(queue, b"1")
        self.until(lambda: listener.deliveries)
        self.client.delete(f"{self.prefix}amqtask.lease", f"{self.prefix}unacked_index")
        self.cut()

        (tag,) = self.held(queue)
        self.until(lambda: self.client.zscore(f"{self.prefix}amqtask.lease", tag) is not None)
        assert self.client.zscore(f"{self.prefix}unacked_index", tag) is not None

    def test_when_nobody_has_looked_for_long_the_living_keep_what_they_hold(self) -> None:
        """Redis was away for longer than a lease, or its clock has jumped: the first one who is back must not rob the others."""
        queue, _ = self.work_queue()
        listener, _ = self.consume(queue)
        self.publish(queue, b"1")
        self.until(lambda: listener.deliveries)
        self.settle()
        self.client.hset(f"{self.prefix}amqtask.swept", "looked", 1.0)
        self.client.zadd(f"{self.prefix}amqtask.lease", dict.fromkeys(self.held(queue), 1.0))

        other, _ = self.consume(queue)
        self.settle()
        self.settle()

        assert not other.deliveries
        assert listener.bodies == [b"1"]

    # -- what Redis does not have

    def test_what_redis_lacks_is_refused_with_the_alternative(self) -> None:
        headers, direct = Exchange(self.name("x"), "headers"), Exchange(self.name("x"), "direct")
        for entity, alternative in (
            (headers, "topic exchange"),
            (Binding(direct, headers.name, to_exchange=True), "bind the queues"),
        ):
            with pytest.raises(PublishError, match=alternative):
                self.publisher.declare([entity])


class TestRedis(RedisSuite):
    @pytest.fixture(autouse=True)
    def parts(self, redis_url: str) -> Iterator[None]:
        yield from self.with_server(redis_url)


class TestValkey(RedisSuite):
    @pytest.fixture(autouse=True)
    def parts(self, valkey_url: str) -> Iterator[None]:
        yield from self.with_server(valkey_url)

    def make_client(self, url: str) -> redis.Redis:
        return redis.Redis.from_url(url.replace("valkey:", "redis:"))


class TestRedisCluster(RedisSuite):
    prefix = "{amqtask}"

    @pytest.fixture(autouse=True)
    def parts(self, redis_cluster_url: str) -> Iterator[None]:
        yield from self.with_server(redis_cluster_url.replace("redis:", "redis+cluster:").rpartition("/")[0])

    def make_client(self, url: str) -> redis.Redis:
        cluster = redis.RedisCluster.from_url(url.replace("+cluster", ""))
        return cluster.get_redis_connection(cluster.get_node_from_key(self.prefix))  # type: ignore[no-untyped-call]

    def test_messages_go_with_their_slot_to_another_master(self, redis_cluster_url: str) -> None:
        queue, _ = self.work_queue()
        listener, consumer = self.consume(queue, prefetch=5)
        self.publish(queue, *[b"%d" % number for number in range(20)])
        self.until(lambda: len(listener.deliveries) == 5)

        move_slot(redis.RedisCluster.from_url(redis_cluster_url), self.prefix)
        asyncio.run(self.publish_from_an_event_loop(queue, b"20"))
        self.publish(queue, b"21")
        for number in range(22):
            self.until(lambda number=number: len(listener.deliveries) > number)  # type: ignore[misc]
            consumer.ack(listener.deliveries[number].tag)
        self.client = self.make_client(redis_cluster_url)
        self.until(lambda: not self.held(queue))

        assert listener.bodies == [b"%d" % number for number in range(22)]
        with self.broker.admin() as admin:
            assert admin.count(queue.name) == 0

    def test_a_wrong_password_is_told_of(self, redis_cluster_url: str) -> None:
        url = redis_cluster_url.replace("redis://", "redis+cluster://nobody:wrong@").rpartition("/")[0]
        with pytest.raises(AccessRefused, match="broker_url"):
            _publisher(url, timeout=60.0).publish(_message("q"))

    async def publish_from_an_event_loop(self, queue: Queue, body: bytes) -> None:
        publisher = self.broker.async_publisher(name="test", on_warning=self.warnings.append)
        await publisher.publish(Message(body, Properties(), "", queue.name))
        await publisher.close()


def move_slot(cluster: Any, key: str) -> None:
    """What `redis-cli --cluster reshard` does with the slot of a key."""
    slot, source = cluster.keyslot(key), cluster.get_node_from_key(key)
    target = next(node for node in cluster.get_primaries() if node != source)
    nodes = {node: cluster.get_redis_connection(node) for node in cluster.get_primaries()}
    ids = {node: client.execute_command("CLUSTER MYID").decode() for node, client in nodes.items()}
    nodes[target].execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[source])
    nodes[source].execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[target])
    while keys := nodes[source].execute_command("CLUSTER GETKEYSINSLOT", slot, 100):
        nodes[source].migrate(target.host, target.port, keys, 0, 5000)
    for client in nodes.values():
        client.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[target])


@pytest.fixture
def node(redis_url: str) -> Iterator[RedisServer]:
    """A Redis that a test may hurt."""
    made = RedisServer()
    try:
        yield made.start()
    finally:
        made.remove()


def _message(queue: str, body: bytes = b"x") -> Message:
    return Message(body, Properties(), "", queue, (Queue(queue, arguments=arguments({"x-queue-type": "classic"})),))


def _publisher(url: str, timeout: float = 2.0) -> Publisher:
    options = BrokerOptions(url, publish_timeout=timeout, connect_timeout=timeout)
    return open_broker(options, {}).publisher(name="test", on_warning=lambda text: None)


def test_a_full_memory_blocks_until_the_deadline(node: RedisServer) -> None:
    publisher = _publisher(node.url)
    publisher.publish(_message("q"))
    with redis.Redis.from_url(node.url) as client:
        client.config_set("maxmemory", "1")
        with pytest.raises(ConnectionBlocked, match="memory is full"):
            publisher.publish(_message("q"))
        client.config_set("maxmemory", "0")
        publisher.publish(_message("q"))
        assert client.llen("q") == 2


def test_a_replica_a_wrong_password_and_nobody_are_errors_of_their_own(node: RedisServer) -> None:
    with redis.Redis.from_url(node.url) as client:
        client.replicaof("127.0.0.1", free_port())
        with pytest.raises(BrokerUnreachable, match="replica"):
            _publisher(node.url).publish(_message("q"))
        client.replicaof("NO", "ONE")
        client.config_set("requirepass", "secret")
        began = time.monotonic()
        with pytest.raises(AccessRefused, match="broker_url"):
            _publisher(node.url, timeout=60.0).publish(_message("q"))
        assert time.monotonic() - began < 30.0  # it does not wait for what waiting does not mend
    with pytest.raises(BrokerUnreachable, match="no Redis answers"):
        _publisher(f"redis://127.0.0.1:{free_port()}").publish(_message("q"))


def test_a_master_that_becomes_a_replica_is_left_for_the_one_that_its_name_leads_to(node: RedisServer) -> None:
    """As a provider's failover does it: a name has another address, and the old connections stay open."""
    other = RedisServer()
    try:
        other.start()
        with Forwarder(node.url) as name, redis.Redis.from_url(node.url) as client:
            broker, loop, listener = open_broker(BrokerOptions(name.url), {}), PikaLoop(), Listener(acks=True)
            consumer = listener.consumer = broker.consumer(loop, listener, name="test", heartbeat=None)
            consumer.add_queue(Queue("q"), prefetch=10)
            consumer.start()
            publisher, store = _publisher(name.url, 60.0), RedisBackend(BackendOptions(name.url))
            publisher.publish(_message("q"))
            store.store(ResultMessage("first", "SUCCESS", 1))
            store.set_chord_size("a-group", 1)  # over redis-py's own connection
            _turn(loop, lambda: listener.deliveries)

            def fail_over() -> None:
                _turn(loop, lambda: len(listener.deliveries) == 2)
                name.point_to(other.url)
                client.replicaof("127.0.0.1", other.port)

            asyncio.run(_publish_twice(broker, fail_over))
            publisher.publish(_message("q"))
            store.store(ResultMessage("second", "SUCCESS", 2))
            store.set_chord_size("a-group", 2)
            _turn(loop, lambda: len(listener.deliveries) == 4)

            store.close()
            publisher.close()
            _stop(loop, consumer)
    finally:
        other.remove()


async def _publish_twice(broker: Broker, between: Callable[[], None]) -> None:
    publisher = broker.async_publisher(name="test", on_warning=lambda text: None)
    await publisher.publish(_message("q"))
    between()
    await publisher.publish(_message("q"))
    await publisher.close()


def test_a_publisher_that_nobody_closes_leaves_no_socket_open(node: RedisServer) -> None:
    publisher = _publisher(node.url)
    publisher.publish(_message("q"))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del publisher
        gc.collect()

    assert not [str(each.message) for each in caught if each.category is ResourceWarning]


def test_a_socket_of_this_machine_is_a_way_to_queues_and_results(tmp_path: Path) -> None:
    path = tmp_path / "s"
    server = RedisServer("--unixsocket", str(path), "--requirepass", "secret")
    try:
        server.start()
        url = f"redis+socket://:secret@{path}?virtual_host=3"
        broker, loop, listener = open_broker(BrokerOptions(url), {}), PikaLoop(), Listener(acks=True)
        consumer = listener.consumer = broker.consumer(loop, listener, name="test", heartbeat=None)
        consumer.add_queue(Queue("q"), prefetch=10)
        consumer.start()
        publisher = broker.publisher(name="test", on_warning=lambda text: None)
        publisher.publish(_message("q"))
        publisher.publish(_message("q"))  # over a line
        _turn(loop, lambda: len(listener.deliveries) == 2)
        publisher.close()
        _stop(loop, consumer)
        store = RedisBackend(BackendOptions(url))
        store.store(ResultMessage("an-id", "SUCCESS", 1))
        assert store.wait("an-id", timeout=PATIENCE).result == 1
        store.close()
        with redis.Redis(unix_socket_path=str(path), password="secret", db=3) as client:
            assert client.exists("celery-task-meta-an-id", "amqtask.queues") == 2
    finally:
        server.remove()


def test_acknowledgements_leave_together_while_redis_has_not_answered(node: RedisServer) -> None:
    """A worker that runs one short task in a turn of its loop had a script run for each."""
    publisher, loop, listener = _publisher(node.url), PikaLoop(), Listener()
    publisher.publish_many([_message("q")] * 100)
    consumer = open_broker(BrokerOptions(node.url), {}).consumer(loop, listener, name="test", heartbeat=None)
    consumer.add_queue(Queue("q"), prefetch=100)
    consumer.start()
    _turn(loop, lambda: len(listener.deliveries) == 100)

    def scripts() -> int:
        return int(client.info("commandstats")["cmdstat_evalsha"]["calls"])

    with redis.Redis.from_url(node.url) as client:
        before = scripts()
        client.client_pause(60_000, all=False)
        for delivery in listener.deliveries:
            consumer.ack(delivery.tag)
            loop.run_once(0.0)
        client.client_unpause()
        _turn(loop, lambda: not client.exists("unacked"))
        assert scripts() - before < 20
    _stop(loop, consumer)


def _store(url: str) -> RedisBackend:
    return RedisBackend(BackendOptions(url, transport_options=(("retry_for", 0),)))


@pytest.mark.parametrize(
    ("make", "use"),
    [
        (_store, lambda store: store.store(ResultMessage("an-id", "SUCCESS", 1))),
        (_publisher, lambda publisher: publisher.publish(_message("q"))),
    ],
    ids=["store", "publisher"],
)
def test_what_is_closed_by_one_thread_goes_on_in_another(
    node: RedisServer, make: Callable[[str], Any], use: Callable[[Any], None]
) -> None:
    """redis-py's own `close` takes the sockets away that others read from: ValueError, I/O operation on closed file."""
    shared = make(node.url)
    with redis.Redis.from_url(node.url) as client, ThreadPoolExecutor() as threads:
        client.client_pause(60_000, all=False)
        used = threads.submit(use, shared)
        eventually(lambda: [each for each in client.client_list() if each["flags"] == "b"])
        shared.close()
        client.client_unpause()
        used.result(PATIENCE)
    use(shared)  # it opens again
    shared.close()


def test_a_redis_that_evicts_queues_is_told_of(node: RedisServer) -> None:
    with redis.Redis.from_url(node.url) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
    loop, listener = PikaLoop(), Listener()
    consumer = open_broker(BrokerOptions(node.url), {}).consumer(loop, listener, name="test", heartbeat=None)
    consumer.start()
    _turn(loop, lambda: listener.warnings)
    _stop(loop, consumer)

    assert "Set noeviction" in listener.warnings[0]


def test_a_user_needs_the_rights_that_the_documentation_lists(node: RedisServer) -> None:
    with redis.Redis.from_url(node.url) as client:
        client.acl_setuser(
            "app", enabled=True, passwords=["+secret"], keys=["*"], channels=["*"], categories=["+@all", "-@dangerous"],
            commands=["+info"],
        )  # fmt: skip
    url = node.url.replace("://", "://app:secret@")
    loop, listener = PikaLoop(), Listener(acks=True)
    broker = open_broker(BrokerOptions(url), {})
    consumer = listener.consumer = broker.consumer(loop, listener, name="test", heartbeat=None)
    consumer.add_queue(Queue("q"), prefetch=10)
    consumer.start()
    publisher = broker.publisher(name="test", on_warning=lambda text: None)
    publisher.publish(_message("q"))
    _turn(loop, lambda: listener.deliveries)
    publisher.close()
    _stop(loop, consumer)

    assert not listener.warnings


def _user(node: RedisServer, *commands: str, channels: Sequence[str] = ("*",)) -> str:
    """The URL of a user who may do what is documented, and these commands."""
    with redis.Redis.from_url(node.url) as client:
        client.acl_setuser(
            "app", enabled=True, reset=True, passwords=["+secret"], keys=["*"], channels=channels,
            categories=["+@all", "-@dangerous"], commands=["+info", *commands],
        )  # fmt: skip
    return node.url.replace("://", "://app:secret@")


@pytest.mark.parametrize("missing", ["ping", "rpop", "evalsha"])
def test_a_consumer_says_which_right_it_lacks_and_goes_on_when_it_has_it(node: RedisServer, missing: str) -> None:
    loop, listener = PikaLoop(), Listener(acks=True)
    broker = open_broker(BrokerOptions(_user(node, f"-{missing}")), {})
    consumer = listener.consumer = broker.consumer(loop, listener, name="test", heartbeat=None)
    consumer.add_queue(Queue("q"), prefetch=10)
    consumer.start()
    _turn(loop, lambda: listener.warnings)
    _user(node)
    _publisher(node.url).publish(_message("q"))
    _turn(loop, lambda: listener.deliveries)
    _stop(loop, consumer)

    assert {"refused the login or the command" in warning for warning in listener.warnings} == {True}
    assert len(listener.warnings) < 3  # of messages, and of delayed ones


def test_an_exclusive_queue_that_may_not_be_claimed_is_not_said_to_be_anothers(node: RedisServer) -> None:
    loop, listener = PikaLoop(), Listener()
    consumer = open_broker(BrokerOptions(_user(node, "-set")), {}).consumer(loop, listener, name="test", heartbeat=None)
    consumer.add_queue(Queue("mine", exclusive=True), prefetch=10)
    consumer.start()
    _turn(loop, lambda: listener.fatal)
    loop.close()

    assert isinstance(listener.fatal[0], AccessRefused)


def test_an_exclusive_queue_is_claimed_when_a_full_memory_has_room_again(node: RedisServer) -> None:
    loop, listener = PikaLoop(), Listener()
    consumer = open_broker(BrokerOptions(node.url), {}).consumer(loop, listener, name="test", heartbeat=None)
    with redis.Redis.from_url(node.url) as client:
        client.config_set("maxmemory", "1")
        consumer.add_queue(Queue("mine", exclusive=True), prefetch=10)
        consumer.start()
        _turn(loop, lambda: listener.warnings)
        client.config_set("maxmemory", "0")
        _turn(loop, lambda: client.exists("amqtask.active.mine"))
    _stop(loop, consumer)

    assert listener.fatal == []


def test_an_answer_whose_follow_up_a_channel_does_not_take_stays(node: RedisServer) -> None:
    loop, listener = PikaLoop(), Listener()
    _publisher(node.url).publish(_message("q"))
    consumer = open_broker(BrokerOptions(_user(node, channels=())), {}).consumer(
        loop, listener, name="test", heartbeat=None
    )
    consumer.add_queue(Queue("q"), prefetch=10)
    consumer.start()
    _turn(loop, lambda: listener.deliveries)
    said: list[bool] = []
    to_all = Message(b"", Properties(), "all", "", (Exchange("all", "fanout"),))

    assert consumer.replace(listener.deliveries[0], [_message("next"), to_all], said.append)
    _turn(loop, lambda: said)

    with redis.Redis.from_url(node.url) as client:
        assert (said, client.llen("next"), client.hlen("amqtask.held")) == ([False], 0, 1)
    _stop(loop, consumer)


def test_results_are_kept_though_their_user_may_not_publish_them(
    node: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    store = _store(_user(node, channels=()))
    for state in ("STARTED", "FAILURE"):
        store.store(ResultMessage("an-id", state, {"exc_type": "ValueError", "exc_message": ["x"]}))
    store.close()

    found = store.find("an-id")
    assert found is not None
    assert found.status == "FAILURE"
    assert [record.getMessage().count("may not PUBLISH") for record in caplog.records] == [1]


def test_a_result_waits_for_a_memory_that_is_full(node: RedisServer) -> None:
    store = RedisBackend(BackendOptions(node.url, transport_options=(("retry_for", PATIENCE),)))
    with redis.Redis.from_url(node.url) as client, ThreadPoolExecutor() as threads:
        client.config_set("maxmemory", "1")
        stored = threads.submit(store.store, ResultMessage("an-id", "SUCCESS", 1))
        eventually(lambda: client.info("errorstats").get("errorstat_OOM"))
        client.config_set("maxmemory", "0")
        stored.result(PATIENCE)
    store.close()


def test_a_failover_of_sentinels_is_followed(sentinel: Sentinel) -> None:
    options = BrokerOptions(
        sentinel.url, publish_timeout=60.0, transport_options={"master_name": sentinel.master_name}, connect_timeout=1.0
    )
    broker = open_broker(options, {})
    publisher = broker.publisher(name="test", on_warning=lambda text: None)
    loop, listener = PikaLoop(), Listener(acks=True)
    consumer = listener.consumer = broker.consumer(loop, listener, name="test", heartbeat=None)
    consumer.add_queue(Queue("q"), prefetch=10)
    consumer.start()
    publisher.publish(_message("q", b"before"))
    _turn(loop, lambda: listener.bodies == [b"before"])

    sentinel.master.kill()
    publisher.publish(_message("q", b"after"))
    _turn(loop, lambda: b"after" in listener.bodies)
    _stop(loop, consumer)
    publisher.close()


@pytest.mark.timeout(300)
def test_a_failover_of_a_cluster_is_followed(redis_url: str) -> None:
    with redis_nodes(3, 1) as nodes:
        # One that may be the one that dies; the others are found.
        client: Any = redis.RedisCluster.from_url(nodes[0].url)
        owner = next(node for node in nodes if node.port == client.get_node_from_key("{mine}").port)
        url = ";".join(node.url.rpartition("/")[0] for node in (owner, nodes[0])).replace("redis:", "redis+cluster:")
        options = BrokerOptions(
            url, publish_timeout=60.0, transport_options={"global_keyprefix": "mine"}, connect_timeout=1.0
        )
        broker = open_broker(options, {})
        publisher = broker.publisher(name="test", on_warning=lambda text: None)
        loop, listener = PikaLoop(), Listener(acks=True)
        consumer = listener.consumer = broker.consumer(loop, listener, name="test", heartbeat=None)
        consumer.add_queue(Queue("q"), prefetch=10)
        consumer.start()
        publisher.publish(_message("q", b"before"))
        _turn(loop, lambda: listener.bodies == [b"before"])
        client.wait(1, 5000, target_nodes=client.get_node_from_key("{mine}"))

        owner.kill()
        publisher.publish(_message("q", b"after"))
        _turn(loop, lambda: b"after" in listener.bodies)
        _stop(loop, consumer)
        publisher.close()


def test_an_event_loop_publishes_and_tells_what_went_wrong(redis_url: str) -> None:
    broker = open_broker(BrokerOptions(redis_url), {})
    name = f"q-{uuid.uuid4().hex[:10]}"

    async def publish() -> list[PublishError | None]:
        publisher = broker.async_publisher(name="test", on_warning=lambda text: None)
        await publisher.connect()
        await publisher.publish(_message(name))
        errors = await publisher.publish_many([_message(name), Message(b"", Properties(), "", f"{name}-nobody")])
        await publisher.close()
        return errors

    errors = asyncio.run(publish())
    with broker.queue_jobs() as jobs:
        assert jobs.state(name).ready == 2
        jobs.delete(name)
    assert errors[0] is None
    assert isinstance(errors[1], Unroutable)


def test_messages_go_where_is_written_and_come_from_where_is_read(node: RedisServer) -> None:
    written = node.url.rpartition("/")[0] + "/1"
    broker = open_broker(BrokerOptions(node.url, write_urls=written), {})
    publisher = broker.publisher(name="test", on_warning=lambda text: None)
    publisher.publish(_message("q"))
    publisher.close()

    with broker.queue_jobs() as jobs, pytest.raises(QueueNotFound):
        jobs.state("q")
    with open_broker(BrokerOptions(written), {}).queue_jobs() as jobs:
        assert jobs.state("q").ready == 1


def _turn(loop: PikaLoop, condition: Callable[[], object]) -> None:
    eventually(condition, sleep=loop.run_once)


def _stop(loop: PikaLoop, consumer: Consumer) -> None:
    stopped: list[bool] = []
    consumer.stop(on_stopped=lambda: stopped.append(True))
    _turn(loop, lambda: stopped)
    loop.close()
