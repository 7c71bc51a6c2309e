"""Results that no queue takes: whoever reads them has gone, or the node of their queue is away."""

from __future__ import annotations

from amqtask.exceptions import PublishError, PublishRefused, Unroutable
from amqtask.protocol.entities import Queue
from tests.worker.bench import Bench, result

RETURNED = Unroutable("no queue takes it")
NO_QUEUE = PublishError("404 no queue")
AWAY = PublishRefused("404 home node is down or inaccessible")


def test_a_queue_that_is_gone_is_looked_for_once() -> None:
    bench = Bench(slots=3)
    bench.deliver("a", "b", "c")
    bench.end("a", result=result())
    bench.end("b", result=result())
    bench.publisher.confirm(RETURNED)
    bench.publisher.confirm(RETURNED)
    (looking,) = bench.publisher.sent[2:]
    assert looking.declare == (Queue("reply-queue", passive=True),)
    assert bench.frames == []

    bench.publisher.confirm(NO_QUEUE)
    assert bench.frames == [("ack", 2, True)]

    bench.end("c", result=result())
    bench.publisher.confirm(RETURNED)

    assert bench.frames[1:] == [("ack", 3, False)]
    assert len(bench.publisher.sent) == 4


def test_results_wait_for_a_queue_whose_node_is_away() -> None:
    bench = Bench()
    bench.deliver("a", "b")
    bench.end("a", result=result())
    bench.end("b", result=result())
    bench.publisher.confirm(RETURNED)
    bench.publisher.confirm(RETURNED)
    for _ in range(5):
        bench.publisher.confirm(AWAY)
        bench.loop.advance(5.0)
    assert bench.frames == []

    bench.publisher.confirm()
    bench.publisher.confirm()

    assert {message.routing_key for message in bench.publisher.sent} == {"reply-queue"}
    assert bench.publisher.sent[-1].declare == ()
    assert [frame[0] for frame in bench.frames] == ["ack"] * len(bench.frames)
    assert bench.started == ["a", "b"]
    assert bench.publisher.outstanding == 0


def test_a_node_that_stays_away_holds_up_no_task_for_more_than_a_minute() -> None:
    bench = Bench()
    bench.deliver("a")
    bench.end("a", result=result())
    bench.publisher.confirm(RETURNED)
    for _ in range(20):
        if bench.publisher.outstanding:
            bench.publisher.confirm(AWAY)
        bench.loop.advance(5.0)

    assert bench.frames == [("ack", 1, False)]
    assert bench.publisher.outstanding == 0


def test_a_queue_whose_node_stayed_away_is_looked_for_again() -> None:
    bench = Bench()
    bench.deliver("a")
    bench.end("a", result=result())
    bench.publisher.confirm(RETURNED)
    for _ in range(20):
        if bench.publisher.outstanding:
            bench.publisher.confirm(AWAY)
        bench.loop.advance(5.0)
    bench.deliver("b")
    bench.end("b", result=result())
    bench.publisher.confirm(RETURNED)

    assert bench.publisher.sent[-1].declare == (Queue("reply-queue", passive=True),)
    assert bench.publisher.outstanding == 1
