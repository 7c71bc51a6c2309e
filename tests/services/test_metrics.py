"""What Prometheus reads after tasks came, waited, ran, failed and died."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families as plain_text

from amqtask import states
from amqtask.client.flow_store import LimitState
from amqtask.exceptions import ConfigurationError, PublishRefused, Unroutable
from amqtask.execution.request import Answer
from amqtask.flow.contract import KeyUse
from amqtask.protocol.entities import Queue
from amqtask.services.metrics import CountedPublisher, Metrics
from tests.worker.bench import Bench, result
from tests.worker.fakes import HandPublisher, TwoHandPools

# 2023-11-14T22:13:20Z: an eta before it has passed for the worker too, whose clock is the real one.
NOW = 1_700_000_000.0


class Counted:
    """A worker whose metrics are read as Prometheus does."""

    def __init__(self, **bench: Any) -> None:
        self.bench = Bench(**bench)
        self.publisher = CountedPublisher(self.bench.publisher)
        self.metrics = Metrics(self.bench.worker, self.publisher, wall_clock=lambda: NOW)
        self.metrics.start()

    def page(self, accept: str = "") -> str:
        return self.metrics.page({"accept": accept}).body.decode()

    def value(self, name: str, **labels: str) -> float | None:
        """Of one sample; None when it is not there."""
        for family in plain_text(self.page()):
            for sample in family.samples:
                if sample.name == name and sample.labels == labels:
                    return sample.value
        return None

    def ended(self, task: str, state: str) -> float | None:
        return self.value("amqtask_tasks_total", task=task, queue="q", state=state)


def test_tasks_are_counted_by_name_queue_and_state() -> None:
    counted = Counted()
    counted.bench.deliver("a", "b")
    counted.bench.end("a")
    counted.bench.end("b", state=states.FAILURE)
    counted.bench.deliver("c")
    counted.bench.end("c")

    assert counted.ended("t", "SUCCESS") == 2
    assert counted.ended("t", "FAILURE") == 1
    assert counted.value("amqtask_tasks_received_total", task="t", queue="q") == 3


def test_how_far_limits_are_used_is_told_without_their_keys() -> None:
    counted = Counted()
    used = LimitState("sync", "rate by tenant", "5/s", "5/s", 3, 7, (KeyUse("acme", 3, 7),))
    metrics = Metrics(counted.bench.worker, counted.publisher, limits=lambda: [used])

    lines = metrics.page({}).body.decode().splitlines()

    assert 'amqtask_limit_running{limit="rate by tenant",task="sync"} 3.0' in lines
    assert 'amqtask_limit_waiting{limit="rate by tenant",task="sync"} 7.0' in lines
    assert not any("acme" in line for line in lines)


@pytest.mark.parametrize("kind", ["text/plain", "application/openmetrics-text"])
@pytest.mark.parametrize("version", ["", "x", "1.", "1.0.x", "-1", "1\n2", "9" * 5000, "1.0.0\nX: y", "１"])
def test_a_malformed_accept_header_gets_the_plain_page(kind: str, version: str) -> None:
    counted = Counted()

    reply = counted.metrics.page({"accept": f"{kind}; version={version}; q=0.5, */*"})

    assert reply.status == 200
    assert "\n" not in reply.content_type
    assert "amqtask_build_info" in reply.body.decode()


def test_run_times_make_a_histogram() -> None:
    counted = Counted(slots=3)
    counted.bench.deliver("a", "b", "c")
    for task_id, runtime in (("a", 0.004), ("b", 0.25), ("c", 5000.0)):
        counted.bench.end(task_id, runtime=runtime)

    def up_to(bound: str) -> float | None:
        return counted.value("amqtask_task_runtime_seconds_bucket", task="t", queue="q", le=bound)

    assert [up_to("0.005"), up_to("0.1"), up_to("0.25"), up_to("3600.0"), up_to("+Inf")] == [1, 1, 2, 2, 3]
    assert counted.value("amqtask_task_runtime_seconds_sum", task="t", queue="q") == pytest.approx(5000.254)
    assert counted.value("amqtask_task_runtime_seconds_count", task="t", queue="q") == 3


def waited(counted: Counted) -> tuple[float | None, float | None]:
    """How many, and how long together."""
    labels = {"task": "t", "queue": "q"}
    return (
        counted.value("amqtask_task_queue_wait_seconds_count", **labels),
        counted.value("amqtask_task_queue_wait_seconds_sum", **labels),
    )


def test_the_wait_is_from_publish_to_start() -> None:
    counted = Counted()
    counted.bench.deliver("a", timestamp_in_ms=int(NOW * 1000) - 1500)

    assert waited(counted) == (1, 1.5)


def test_a_delayed_task_waits_from_its_eta_on() -> None:
    counted = Counted()
    counted.bench.deliver("a", timestamp_in_ms=int(NOW * 1000) - 3_600_000, eta="2023-11-14T22:13:18+00:00")

    assert waited(counted) == (1, 2.0)


def test_a_producer_whose_clock_is_ahead_gives_no_negative_wait() -> None:
    counted = Counted()
    counted.bench.deliver("a", timestamp_in_ms=int(NOW * 1000) + 5000)

    assert waited(counted) == (1, 0.0)


@pytest.mark.parametrize("published", [None, "yesterday", 1.5])
def test_the_wait_of_messages_that_do_not_say_is_not_known(published: object) -> None:
    counted = Counted()
    counted.bench.deliver("a", timestamp_in_ms=published)

    assert waited(counted) == (None, None)


def test_a_redelivery_is_counted_and_is_no_wait() -> None:
    counted = Counted()
    counted.bench.deliver("a", redelivered=True, timestamp_in_ms=int(NOW * 1000) - 60_000)

    assert counted.value("amqtask_redeliveries_total", queue="q") == 1
    assert waited(counted) == (None, None)


def test_names_that_nobody_knows_share_one_label() -> None:
    counted = Counted()
    for number in range(100):
        counted.bench.deliver(f"id{number}", task=f"attack.{number}")

    assert counted.ended("unknown", "FAILURE") == 100
    assert "attack" not in counted.page()


def test_a_dead_letter_is_counted_once_the_broker_has_it() -> None:
    counted = Counted()
    counted.bench.deliver("a")
    counted.bench.end("a", state=states.REJECTED, answer=Answer.DEAD_LETTER, reason="no")
    assert counted.value("amqtask_dead_letters_total", task="t", queue="q") is None

    counted.bench.publisher.confirm()

    assert counted.value("amqtask_dead_letters_total", task="t", queue="q") == 1


def test_a_dead_letter_that_cannot_be_moved_is_none() -> None:
    counted = Counted()
    counted.bench.deliver("a")
    counted.bench.end("a", state=states.REJECTED, answer=Answer.DEAD_LETTER, reason="no")
    counted.bench.publisher.confirm(PublishRefused("full"))

    assert counted.value("amqtask_dead_letters_total", task="t", queue="q") is None


def test_slots_of_each_of_several_pools_are_told() -> None:
    counted = Counted(pool=TwoHandPools(1, 3))
    counted.bench.operations.consume(Queue("web"), None)
    counted.bench.deliver("a", "b")
    counted.bench.deliver("w", "x", queue="web")

    told = {
        (pool, state): counted.value("amqtask_pool_slots", state=state, pool=pool)
        for pool in ("hand", "other")
        for state in ("busy", "idle")
    }
    assert told == {("hand", "busy"): 1, ("hand", "idle"): 0, ("other", "busy"): 2, ("other", "idle"): 1}
    assert counted.value("amqtask_tasks_waiting") == 1


def test_slots_and_what_waits_are_told() -> None:
    counted = Counted(slots=3)
    counted.bench.deliver("a", "b")
    assert counted.value("amqtask_pool_slots", state="busy") == 2
    assert counted.value("amqtask_pool_slots", state="idle") == 1

    counted.bench.deliver("c", "d", "e")

    assert counted.value("amqtask_pool_slots", state="idle") == 0
    assert counted.value("amqtask_tasks_waiting") == 2


def test_the_prefetch_window_is_told_by_queue() -> None:
    assert Counted(slots=3).value("amqtask_prefetch_window", queue="q") == 3


def test_a_reconnect_is_counted_when_consuming_begins_again() -> None:
    counted = Counted()
    counted.bench.worker.on_consuming(1)
    counted.bench.worker.on_consuming(1)
    assert counted.value("amqtask_reconnects_total") == 0

    counted.bench.lose_connection()

    assert counted.value("amqtask_reconnects_total") == 1


def test_publishes_are_counted_by_how_they_end() -> None:
    hand = HandPublisher()
    counted = Counted()
    publisher = CountedPublisher(hand)
    counted.metrics = Metrics(counted.bench.worker, publisher)
    told: list[Any] = []
    errors = [None, None, Unroutable("x"), PublishRefused("y"), ConnectionError("z")]
    for _ in errors:
        publisher.publish(result(), told.append)
    for error in errors:
        hand.confirm(error)  # type: ignore[arg-type] # any other error

    assert told == errors
    ends = {
        end: counted.value("amqtask_publish_confirms_total", outcome=end)
        for end in ("confirmed", "returned", "refused", "failed")
    }
    assert ends == {"confirmed": 2, "returned": 1, "refused": 1, "failed": 1}


def test_openmetrics_is_spoken_to_who_asks_for_it() -> None:
    counted = Counted()
    counted.bench.deliver("a")
    counted.bench.end("a", runtime=0.5)

    lines = counted.page("application/openmetrics-text; version=1.0.0").splitlines()

    assert "# TYPE amqtask_tasks counter" in lines
    assert 'amqtask_tasks_total{queue="q",state="SUCCESS",task="t"} 1.0' in lines
    assert lines[-1] == "# EOF"


def test_a_stopped_worker_counts_nothing_more() -> None:
    counted = Counted()
    counted.metrics.stop()
    counted.bench.deliver("a")
    counted.bench.end("a")

    assert counted.ended("t", "SUCCESS") is None


def test_without_prometheus_client_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client.exposition", None)

    with pytest.raises(ConfigurationError, match=r"amqtask\[metrics\]"):
        Metrics(Bench().worker, CountedPublisher(HandPublisher()))


def test_the_states_of_breakers_are_told() -> None:
    counted = Counted()
    counted.metrics = Metrics(
        counted.bench.worker, counted.publisher, breakers=lambda: {"pay": "open", "send": "closed", "call": "half-open"}
    )

    states = [counted.value("amqtask_breaker_state", task=task) for task in ("send", "call", "pay")]
    assert states == [0, 1, 2]
