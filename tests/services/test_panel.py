"""Remote control: Celery's commands in, Celery's replies out."""

from __future__ import annotations

import json
import queue
import signal
import threading
import time
from decimal import Decimal
from typing import Any

import pytest

from amqtask import Batch
from amqtask.events.dispatcher import LamportClock
from amqtask.exceptions import AccessRefused
from amqtask.ground.printable import masked_plain
from amqtask.protocol.control import Command, command_message
from amqtask.protocol.entities import Queue
from amqtask.protocol.message import Delivery, Properties
from amqtask.remote.commands import BUILTIN, control_command, inspect_command
from amqtask.services.autoscale import Autoscale
from amqtask.services.command_context import Control
from amqtask.services.commands import COMMANDS
from amqtask.services.elections import Elections
from amqtask.services.events import EventSender
from amqtask.services.panel import MOST_ASKING, Panel
from amqtask.transport.declare import QueueLocked
from tests.worker.bench import Bench
from tests.worker.fakes import HandPublisher, ToldConsumer

ACCEPT = frozenset({"application/json"})


class Remote:
    """A worker, its panel, and the caller's end."""

    def __init__(
        self, *, slots: int = 2, autoscale: bool = False, mingles: bool = False, accept: frozenset[str] = ACCEPT
    ) -> None:
        self.bench = Bench(slots=slots)
        self.publisher = HandPublisher()
        self.consumers: list[ToldConsumer] = []
        worker, operations = self.bench.worker, self.bench.operations
        self.told = HandPublisher()
        clock = LamportClock()
        self.called: queue.SimpleQueue[Any] = queue.SimpleQueue()
        # The queue, the consumer and its listener of each election.
        self.stood: list[tuple[str, ToldConsumer, Any]] = []
        self.elections = Elections(loop=self.bench.loop, make_consumer=self.make_candidate, call=self.called.put)
        self.control = control = Control(
            worker=worker,
            operations=operations,
            autoscale=Autoscale(worker, operations, max_slots=4, min_slots=1) if autoscale else None,
            settings=lambda with_defaults: {"broker_url": "amqp://u:secret@h//", "result_expires": 60},
            make_queue=lambda arguments: (Queue(str(arguments["queue"])), None),
            broker_info={"url": "amqp://h"},
            events=EventSender(
                worker,
                clock=clock,
                make_publisher=lambda: self.told,
                exchange="celeryev",
                serializer="json",
                task_events=False,
            ),
            lamport=clock,
            elections=self.elections,
        )
        self.panel = Panel(
            control,
            loop=self.bench.loop,
            make_consumer=self.make_consumer,
            make_publisher=lambda: self.publisher,
            accept=accept,
            mingles=mingles,
        )
        self.panel.start()

    def make_consumer(self, listener: Any) -> ToldConsumer:
        self.consumers.append(ToldConsumer())
        return self.consumers[-1]

    def make_candidate(self, listener: Any) -> ToldConsumer:
        stood = self.stood

        class Candidate(ToldConsumer):
            def add_queue(self, queue: Queue, **_: Any) -> None:
                stood.append((queue.name, self, listener))

        return Candidate()

    def tell(self, command: Command, body: bytes | None = None) -> list[Any]:
        """Deliver a command; the payloads of the replies to it."""
        before = len(self.publisher.sent)
        message = command_message(command)
        self.panel.on_delivery(
            Delivery(body or message.body, message.properties, message.exchange, "", False, "mailbox", 1, 1)
        )
        self.bench.loop.turn()
        replies = [json.loads(reply.body) for reply in self.publisher.sent[before:]]
        return [reply["w@h"] for reply in replies]

    def ask(self, method: str, **arguments: Any) -> Any:
        (payload,) = self.tell(Command(method, arguments, ticket="t", reply_key="caller"))
        return payload


def test_every_command_that_the_command_line_offers_is_known_here() -> None:
    names = {name for info in BUILTIN.values() for name in (info.name, info.alias) if name}

    assert set(COMMANDS) == names


def test_ping_is_answered_to_the_callers_own_queue() -> None:
    remote = Remote()

    assert remote.ask("ping") == {"ok": "pong"}
    (reply,) = remote.publisher.sent
    assert (reply.exchange, reply.routing_key) == ("reply.celery.pidbox", "caller")
    assert reply.properties.headers["ticket"] == "t"


@pytest.mark.parametrize(
    "command",
    [
        Command("ping"),
        Command("ping", ticket="t", destination=("other@h",)),
        Command("ping", ticket="t", pattern="other*"),
    ],
)
def test_no_reply_when_none_is_wanted_or_another_is_meant(command: Command) -> None:
    assert Remote().tell(command) == []


@pytest.mark.parametrize("destination", [("w@h",), ("other@h", "w@h")])
def test_a_command_for_this_node_is_answered(destination: tuple[str, ...]) -> None:
    assert Remote().tell(Command("ping", ticket="t", destination=destination)) == [{"ok": "pong"}]


def test_what_runs_and_what_waits_is_told() -> None:
    remote = Remote(slots=1)
    remote.bench.deliver("a", "b")

    (active,), (reserved,) = remote.ask("active"), remote.ask("reserved")

    assert (active["id"], active["name"], active["worker_pid"]) == ("a", "t", 4711)
    assert active["time_start"] is not None
    assert (reserved["id"], reserved["worker_pid"], reserved["time_start"]) == ("b", None, None)
    assert remote.ask("scheduled") == []
    found = remote.ask("query_task", ids=["a", "b", "c"])
    assert {task_id: state for task_id, (state, _) in found.items()} == {"a": "active", "b": "reserved"}


def test_stats_count_what_ran() -> None:
    remote = Remote()
    remote.bench.deliver("a", "b")
    remote.bench.end("a")

    stats = remote.ask("stats")

    assert stats["total"] == {"t": 1}
    assert stats["pool"]["max-concurrency"] == 2
    assert stats["prefetch_count"] == 2
    assert set(stats) >= {"total", "pid", "clock", "uptime", "pool", "broker", "prefetch_count", "rusage"}
    assert set(stats["pool"]) >= {
        "max-concurrency", "processes", "max-tasks-per-child", "put-guarded-by-semaphore", "timeouts", "writes"
    }  # fmt: skip


def test_registered_tasks_and_active_queues() -> None:
    remote = Remote()

    assert remote.ask("registered") == ["early", "t"]
    assert [queue["name"] for queue in remote.ask("active_queues")] == ["q"]


def test_the_configuration_is_told_without_its_passwords() -> None:
    assert Remote().ask("conf") == {"broker_url": "amqp://u:********@h//", "result_expires": 60}


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("redis_password", "x", "********"),
        ("security_key", "x", "********"),
        ("broker_url", ["amqp://u:p@a//", "amqp://b"], ["amqp://u:********@a//", "amqp://b"]),
        ("broker_transport_options", {"client_secret": "x", "n": 1}, {"client_secret": "********", "n": 1}),
        ("result_expires", 60, 60),
        ("result_backend", None, None),
    ],
)
def test_secrets_are_starred_out(name: str, value: Any, shown: Any) -> None:
    assert masked_plain(name, value) == shown


def test_revoke_flags_one_or_many_ids() -> None:
    remote = Remote()
    assert remote.ask("revoke", task_id="a") == {"ok": "tasks a flagged as revoked"}
    assert "error" in remote.ask("revoke", task_id=[])
    remote.ask("revoke", task_id=["b", "c"])

    assert remote.ask("revoked") == ["a", "b", "c"]
    remote.bench.deliver("a", "d")
    assert remote.bench.started == ["d"]


def test_delayed_messages_that_are_held_are_counted_and_dropped_by_their_address() -> None:
    remote = Remote()
    held = {("", "work"): 2, ("x", "k"): 1}
    remote.control.count_delayed = lambda address: held.get(address, 0)
    remote.control.drop_delayed = lambda address: held.pop(address, 0)
    addresses = [["", "work"], ["x", "k"], ["", "other"]]

    assert remote.ask("purge_delayed", addresses=addresses) == {"counts": [2, 1, 0]}
    assert remote.ask("purge_delayed", addresses=addresses[:1], delete=True) == {"counts": [2]}
    assert remote.ask("purge_delayed", addresses=addresses) == {"counts": [0, 1, 0]}
    assert "error" in remote.ask("purge_delayed", addresses=[1])


def test_delayed_messages_that_are_held_are_released_by_what_they_are() -> None:
    remote = Remote()
    asked: list[tuple[bool, bool]] = []
    delivery = Delivery(
        b"", Properties(headers={"task": "t", "id": "one"}), "", "work", False, "amqtask.delay.4s", 1, 1
    )

    def release(is_meant: Any, *, revoked: bool = False) -> int:
        asked.append((is_meant(delivery), revoked))
        return 1

    remote.control.release_delayed = release
    assert remote.ask("release_delayed", id="one", queue="work", revoked=True) == {"released": 1}
    remote.ask("release_delayed", task="other")
    remote.ask("release_delayed", queue="x/work")
    assert asked == [(True, True), (False, False), (False, False)]


def test_hello_exchanges_revoked_ids() -> None:
    remote = Remote()
    remote.ask("revoke", task_id="a")

    answer = remote.ask("hello", from_node="other@h", revoked={"b": 5.0})

    assert answer["revoked"] == ["a"]
    assert remote.ask("revoked") == ["a", "b"]


@pytest.mark.parametrize("known", [["b", "c"], {"b": 12.5, "c": 13.0}])
def test_ids_that_a_celery_worker_knows_are_taken_with_the_time_of_here(known: Any) -> None:
    remote = Remote()

    remote.ask("hello", from_node="other@h", revoked=known)

    assert remote.ask("revoked") == ["b", "c"]


def test_hello_tells_only_what_the_other_does_not_know() -> None:
    remote = Remote()
    remote.ask("revoke", task_id=["a", "b"])
    remote.ask("revoke_by_stamped_headers", headers={"customer": "x"})

    def told(**arguments: Any) -> tuple[int, int]:
        answer = remote.ask("hello", from_node="other@h", **arguments)
        return len(answer["revoked"]), len(answer["revoked_stamps"])

    assert told(revoked=["b"]) == (1, 1)
    assert told(revoked=[], revoked_after=time.time() - 60) == (2, 1)
    assert told(revoked=[], revoked_after=time.time() + 60) == (0, 0)


def test_hello_tells_the_time_and_the_stamps_too() -> None:
    remote, other = Remote(), Remote()
    remote.ask("revoke", task_id="a")
    remote.ask("revoke_by_stamped_headers", headers={"customer": ["x", 5]})

    told = remote.ask("hello", from_node="other@h", revoked=[])
    other.ask("hello", from_node="w2@h", **{key: told[key] for key in ("revoked", "revoked_at", "revoked_stamps")})

    assert other.bench.worker.revoked.ids == remote.bench.worker.revoked.ids
    other.bench.deliver("b", stamped_headers=["customer"], stamps={"customer": 5})
    other.bench.deliver("c", stamped_headers=["customer"], stamps={"customer": "y"})
    assert other.bench.started == ["c"]


def test_a_revoked_task_that_waits_here_does_not_run_and_is_answered() -> None:
    remote = Remote(slots=1)
    remote.bench.deliver("a", "b")

    assert remote.ask("terminate", task_id="b", signal="KILL") == {"ok": "terminate: b"}
    remote.bench.end("a")

    assert remote.bench.started == ["a"]
    assert ("ack", 2, True) in remote.bench.frames


def test_a_revoked_task_that_waits_for_its_rate_limit_does_not_run() -> None:
    remote = Remote()
    remote.ask("rate_limit", task_name="t", rate_limit="2/s")
    remote.bench.deliver("a", "b")

    remote.ask("revoke", task_id="b")
    remote.bench.pass_time(1.0)

    assert remote.bench.started == ["a"]


@pytest.mark.parametrize(
    ("given", "number"), [("SIGKILL", 9), ("kill", 9), ("9", 9), (15, 15), ("SIGUSR1", signal.SIGUSR1), (None, None)]
)
def test_what_runs_is_ended_by_the_signal_that_was_asked_for(given: Any, number: int | None) -> None:
    remote = Remote()
    remote.bench.pool.can_terminate = True
    remote.bench.deliver("a", "b")

    assert remote.ask("revoke", task_id=["a"], terminate=True, signal=given) == {"ok": "terminate: a"}
    assert remote.bench.pool.signals == [number]
    assert remote.ask("terminate", task_id="nobody") == {"ok": "terminate: tasks unknown"}


def test_terminate_says_when_there_is_no_such_signal_or_the_pool_cannot_end_tasks() -> None:
    remote = Remote()
    remote.bench.deliver("a")

    assert "no signal 'SIGNIFICANT'" in remote.ask("terminate", task_id="a", signal="SIGNIFICANT")["error"]
    assert remote.ask("revoked") == []
    assert "the hand pool cannot end what runs: a" in remote.ask("terminate", task_id="a")["error"]


def test_tasks_are_revoked_by_their_stamps() -> None:
    remote = Remote(slots=3)
    remote.bench.pool.can_terminate = True
    remote.bench.deliver("runs", stamped_headers=["customer"], stamps={"customer": ["x", "y"]})
    remote.bench.deliver("other", stamped_headers=["customer"], stamps={"customer": "z"})

    flagged = remote.ask("revoke_by_stamped_headers", headers={"customer": "x"})
    assert flagged == {"ok": "headers {'customer': 'x'} flagged as revoked, but not terminated"}
    remote.ask("revoke", task_id="other")
    ended = remote.ask("revoke_by_stamped_headers", headers=["customer=x"], terminate=True)

    assert ended == {"ok": "terminate: runs"}
    remote.bench.deliver("late", stamped_headers=["customer"], stamps={"customer": "x"})
    remote.bench.deliver("unstamped", stamps={"customer": "x"})
    assert remote.bench.started == ["runs", "other", "unstamped"]
    assert "error" in remote.ask("revoke_by_stamped_headers", headers={})


def test_stamps_that_no_task_here_has_are_told_as_celery_does() -> None:
    remote = Remote()
    remote.bench.pool.can_terminate = True
    remote.bench.deliver("runs", stamped_headers=["customer"], stamps={"customer": "x"})

    flagged = remote.ask("revoke_by_stamped_headers", headers={"myheader": ["myvalue"]})
    ended = remote.ask("revoke_by_stamped_headers", headers=["myheader=a", "myheader=b"], terminate=True)

    assert flagged == {"ok": "headers {'myheader': ['myvalue']} flagged as revoked, but not terminated"}
    assert ended == {"ok": "headers {'myheader': ['a', 'b']} were not terminated"}
    assert remote.bench.pool.signals == []


ARGUMENTS = b'[[1, [2, 3]], {"key": "secret"}, {}]'


@pytest.mark.parametrize(
    ("headers", "safe", "shown"),
    [
        ({}, False, ([1, [2, 3]], {"key": "secret"})),
        ({"argsrepr": "(1, (2, 3))", "kwargsrepr": "{'key': 'secret'}"}, False, ([1, [2, 3]], {"key": "secret"})),
        ({"argsrepr": "(1, (2, 3))", "kwargsrepr": "{'key': 'secret'}"}, True, ("(1, (2, 3))", "{'key': 'secret'}")),
        ({"argsrepr": "(1, (2, 3))", "kwargsrepr": "{'key': '***'}"}, False, ("(1, (2, 3))", "{'key': '***'}")),
    ],
)
def test_arguments_are_shown_unless_their_sender_hides_them(headers: Any, safe: bool, shown: Any) -> None:
    remote = Remote()
    remote.bench.deliver("a", body=ARGUMENTS, **headers)

    (active,) = remote.ask("active", safe=safe)

    assert (active["args"], active["kwargs"]) == shown


def test_large_arguments_are_not_decoded_for_a_question() -> None:
    remote = Remote()
    remote.bench.deliver("a", body=b'[["' + b"x" * 70_000 + b'"], {}, {}]', argsrepr="('xxx...',)", kwargsrepr="{}")

    (active,) = remote.ask("active")

    assert (active["args"], active["kwargs"]) == ("('xxx...',)", "{}")


def test_memory_is_sampled_and_dumped() -> None:
    remote = Remote()
    samples = [remote.ask("memsample") for _ in range(4)]

    dumped = remote.ask("memdump", samples=2)

    assert all(sample.endswith(("KB", "MB", "GB")) for sample in samples)
    assert dumped.count("    > ") == 2
    assert "- rss (end):" in dumped
    assert "sample" not in remote.ask("memdump")


def test_a_question_that_needs_a_missing_library_says_so() -> None:
    assert "pip install objgraph" in Remote().ask("objgraph", num=1)["error"]


class TestElections:
    def hold(self, remote: Remote, election_id: str = "e1", topic: str = "task", action: Any = None) -> Any:
        return remote.ask("election", id=election_id, topic=topic, action=action or {"task": "t", "args": [1]})

    def test_who_gets_the_queue_calls_the_action_once(self) -> None:
        remote = Remote()
        assert self.hold(remote) == {"ok": "standing for election e1"}
        self.hold(remote)
        ((queue, consumer, listener),) = remote.stood

        listener.on_consuming(1)
        listener.on_connection_lost(OSError("gone"))
        listener.on_consuming(2)

        assert queue == "e1.celery.election"
        assert remote.called.get(timeout=30) == {"task": "t", "args": [1]}
        assert remote.called.empty()
        assert "stop" not in consumer.words  # it keeps the queue, for those that hear of the election later

    def test_who_does_not_get_it_calls_nothing_and_leaves(self) -> None:
        remote = Remote()
        self.hold(remote)
        ((_, consumer, listener),) = remote.stood

        listener.on_fatal(OSError("locked"))

        assert consumer.words == ["start", "stop"]
        assert remote.called.empty()

    def test_a_worker_stands_in_so_many_at_once(self) -> None:
        remote = Remote()
        answers = [self.hold(remote, f"e{number}") for number in range(150)]

        assert len(remote.stood) == sum("ok" in answer for answer in answers) == 100
        assert "100 elections already" in answers[-1]["error"]
        remote.bench.loop.advance(61)
        assert "ok" in self.hold(remote, "later")

    def test_an_election_is_forgotten_after_a_minute(self) -> None:
        remote = Remote()
        self.hold(remote)
        remote.stood[0][2].on_consuming(1)
        remote.bench.loop.advance(61)
        self.hold(remote)

        assert [consumer.words for _, consumer, _ in remote.stood] == [["start", "stop"], ["start"]]

    def test_the_end_of_the_worker_gives_the_queue_up(self) -> None:
        remote = Remote()
        self.hold(remote)
        remote.elections.stop()

        assert remote.stood[0][1].words == ["start", "stop"]

    @pytest.mark.parametrize(
        ("wrong", "words"),
        [
            ({"topic": "cake"}, "topic 'task', not 'cake'"),
            ({"action": "sample.add"}, "a task's signature, not 'sample.add'"),
            ({"election_id": ""}, "1 to 200 bytes"),
            ({"election_id": "x" * 300}, "1 to 200 bytes"),
        ],
    )
    def test_what_cannot_be_elected_is_refused(self, wrong: dict[str, Any], words: str) -> None:
        remote = Remote()

        assert words in self.hold(remote, **wrong)["error"]
        assert remote.stood == []


@pytest.fixture
def no_custom_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amqtask.remote.commands._custom", {})


@pytest.mark.usefixtures("no_custom_commands")
def test_custom_commands_are_run_with_the_state_that_celery_s_have() -> None:
    @control_command(args=[("n", int)], signature="[N=1]", alias="more")
    def increase_prefetch_count(state: Any, n: int = 1) -> Any:
        state.consumer.qos.increment_eventually(n)
        return {"ok": "prefetch count incremented"}

    @inspect_command
    def current_prefetch_count(state: Any) -> Any:
        return {"prefetch_count": state.consumer.qos.value, "of": state.hostname}

    remote = Remote()

    assert remote.ask("increase_prefetch_count", n=3) == {"ok": "prefetch count incremented"}
    assert remote.ask("current_prefetch_count") == {"prefetch_count": 5, "of": "w@h"}
    remote.ask("more")
    assert remote.bench.consumer.windows == {"q": 6}


@pytest.mark.usefixtures("no_custom_commands")
def test_what_a_custom_command_raises_or_cannot_say_is_an_error() -> None:
    @inspect_command
    def divide(state: Any, by: int) -> Any:
        return 1 / by

    @inspect_command(name="unsayable")
    def other(state: Any) -> Any:
        return {"a", "set"}

    remote = Remote()

    assert remote.ask("divide", by=0) == {"error": "ZeroDivisionError('division by zero')"}
    assert "unexpected keyword argument" in remote.ask("divide", to=0)["error"]
    assert "cannot be sent" in remote.ask("unsayable")["error"]


def test_rate_limits_and_time_limits_are_set_or_refused() -> None:
    remote = Remote()

    assert "ok" in remote.ask("rate_limit", task_name="t", rate_limit="1/m")
    assert remote.ask("rate_limit", task_name="nobody", rate_limit="1/m") == {"error": "unknown task"}
    assert "Invalid rate limit string" in remote.ask("rate_limit", task_name="t", rate_limit="often")["error"]
    assert "Invalid rate limit string" in remote.ask("rate_limit", task_name="t", rate_limit=[1])["error"]
    assert remote.ask("time_limit", task_name="nobody", soft=1) == {"error": "unknown task"}
    assert "above 0" in remote.ask("time_limit", task_name="t", soft=-1)["error"]
    assert "no hard time limits" in remote.ask("time_limit", task_name="t", hard=5.0)["error"]


@pytest.mark.parametrize("none", [0, 0.0, "0", None])
def test_a_time_limit_of_0_takes_it_away_as_it_does_for_tasks(none: Any) -> None:
    remote = Remote()
    strategy: Any = remote.bench.worker.strategies["t"]
    strategy.soft_limit = strategy.hard_limit = 5.0

    assert "ok" in remote.ask("time_limit", task_name="t", soft=none, hard=none)
    assert (strategy.soft_limit, strategy.hard_limit) == (None, None)


def test_a_batch_task_has_no_rate_limit_and_says_so() -> None:
    remote = Remote()
    remote.bench.worker.strategies["t"].batch = Batch()

    assert remote.ask("rate_limit", task_name="t", rate_limit="1/m") == {
        "error": "task t runs in batches, which have no rate limit"
    }


@pytest.mark.parametrize("limit", ["nan", "inf", float("inf"), 1e300, -5, "soon", [1], 10**400])
def test_a_time_limit_that_is_no_time_is_refused(limit: Any) -> None:
    remote = Remote()

    assert "time limit" in remote.ask("time_limit", task_name="t", soft=limit)["error"]


def test_ids_and_stamps_that_no_task_can_have_are_not_remembered() -> None:
    remote = Remote()

    remote.ask("revoke", task_id=["x" * 100_000, "short"])
    remote.ask("revoke_by_stamped_headers", headers={"s": ["y" * 100_000, "z"], "n" * 100_000: 1})
    remote.ask("hello", from_node="other@h", revoked=["v" * 100_000, "w"])

    assert list(remote.bench.worker.revoked.ids) == ["short", "w"]
    assert list(remote.bench.worker.revoked.stamps) == [("s", "z")]


def test_the_pool_grows_and_shrinks_but_keeps_one_slot() -> None:
    remote = Remote(slots=2)
    assert remote.ask("pool_grow", n=3) == {"ok": "pool will grow"}
    assert remote.bench.pool.slots == 5

    remote.ask("pool_shrink", n=99)

    assert remote.bench.pool.slots == 1


NO_NUMBERS = [10**9, -1, 1.5, float("inf"), True, "many", "9" * 5000, [1], Decimal("1e999999999")]


@pytest.mark.parametrize("number", NO_NUMBERS, ids=range(len(NO_NUMBERS)))
def test_a_number_of_slots_that_is_none_is_refused_and_changes_nothing(number: Any) -> None:
    remote, scaled = Remote(slots=2), Remote(autoscale=True)

    for order, arguments in (
        ("pool_grow", {"n": number}),
        ("pool_shrink", {"n": number}),
        ("memdump", {"samples": number}),
    ):
        assert "is a whole number" in remote.ask(order, **arguments)["error"]
    for name in ("max", "min"):
        assert f"{name} is a whole number" in scaled.ask("autoscale", **{name: number})["error"]
    assert remote.bench.pool.slots == 2
    assert scaled.ask("stats")["autoscaler"] == {"max": 4, "min": 1, "current": 2}


def test_autoscale_bounds_are_changed_where_it_is_on() -> None:
    assert "error" in Remote().ask("autoscale", max=9)
    scaled = Remote(autoscale=True)
    assert scaled.ask("autoscale", max=9, min=2) == {"ok": "autoscale now max=9 min=2"}
    assert "not supported with autoscale" in scaled.ask("pool_grow")["error"]


def test_queues_are_added_and_cancelled() -> None:
    remote = Remote()
    assert remote.ask("add_consumer", queue="more") == {"ok": "add consumer more"}
    assert remote.bench.consumer.windows["more"] == 2
    assert [queue["name"] for queue in remote.ask("active_queues")] == ["q", "more"]

    assert remote.ask("cancel_consumer", queue="more") == {"ok": "no longer consuming from more"}

    assert [queue["name"] for queue in remote.ask("active_queues")] == ["q"]
    assert "was not consuming" in remote.ask("cancel_consumer", queue="never")["ok"]
    remote.ask("add_consumer", queue="more")
    assert [queue["name"] for queue in remote.ask("active_queues")] == ["q", "more"]


def test_shutdown_is_warm_and_says_nothing() -> None:
    remote = Remote()

    assert remote.tell(Command("shutdown", ticket="t")) == []
    assert remote.bench.loop.stopped
    assert remote.bench.worker.lifecycle.shutdown.exit_code == 0


def test_task_events_are_switched_on_and_off() -> None:
    remote = Remote()

    assert remote.ask("enable_events") == {"ok": "task events enabled"}
    assert remote.ask("enable_events") == {"ok": "task events already enabled"}
    remote.bench.deliver("a")
    remote.bench.loop.advance(1.0)
    assert [event["type"] for event in json.loads(remote.told.sent[0].body)] == ["task-received", "task-started"]
    assert remote.ask("disable_events") == {"ok": "task events disabled"}
    assert remote.ask("disable_events") == {"ok": "task events already disabled"}
    remote.bench.deliver("b")
    remote.bench.loop.advance(1.0)
    assert len(remote.told.sent) == 1


def test_a_heartbeat_comes_when_asked_for_and_nothing_is_replied() -> None:
    remote = Remote()

    assert remote.tell(Command("heartbeat", ticket="t")) == []
    (beat,) = (json.loads(message.body) for message in remote.told.sent)
    assert (beat["type"], beat["hostname"], beat["freq"]) == ("worker-heartbeat", "w@h", 5)


def test_commands_and_events_share_one_clock() -> None:
    remote = Remote()
    message = command_message(Command("heartbeat"), clock=41)

    remote.panel.on_delivery(Delivery(message.body, message.properties, "", "", False, "mailbox", 1, 1))

    (beat,) = (json.loads(message.body) for message in remote.told.sent)
    assert beat["clock"] == 43
    assert remote.ask("clock")["clock"] > 43


@pytest.mark.parametrize(
    "fields", [{"pattern": 5}, {"destination": 5}, {"arguments": 5}, {"reply_to": 5}, {"method": 5}]
)
def test_a_malformed_command_does_no_harm(fields: dict[str, Any]) -> None:
    remote = Remote()

    remote.tell(Command("ping"), json.dumps({"method": "ping", "ticket": "t", **fields}).encode())

    assert remote.ask("ping") == {"ok": "pong"}


def test_an_unknown_command_or_bad_arguments_get_an_error_and_do_no_harm() -> None:
    remote = Remote()

    assert "no such command" in remote.ask("make_coffee")["error"]
    assert "error" in remote.ask("pool_grow", n="many")
    assert remote.tell(Command("ping"), body=b"\xff") == []
    assert remote.ask("ping") == {"ok": "pong"}


def test_a_user_without_rights_on_the_mailbox_is_told_so(caplog: pytest.LogCaptureFixture) -> None:
    remote = Remote()

    remote.panel.on_fatal(AccessRefused("access to queue 'w@h.celery.pidbox' refused"))

    assert "another worker" not in caplog.text
    assert "the broker's user may not have the mailbox of worker w@h" in caplog.text
    remote.panel.stop()


def test_a_second_worker_of_the_same_name_is_warned_once_and_tries_again(caplog: pytest.LogCaptureFixture) -> None:
    remote = Remote()
    remote.panel.on_fatal(QueueLocked("RESOURCE_LOCKED"))
    remote.bench.loop.advance(31.0)
    remote.panel.on_fatal(QueueLocked("RESOURCE_LOCKED"))
    remote.bench.loop.advance(31.0)

    assert caplog.text.count("another worker named w@h is running") == 1
    assert len(remote.consumers) == 3
    remote.panel.stop()
    remote.bench.loop.advance(100.0)
    assert len(remote.consumers) == 3


def test_other_commands_are_answered_while_one_waits_for_a_server() -> None:
    remote = Remote()
    may_find = threading.Event()

    def find(limit: int) -> list[tuple[float, Delivery]]:
        may_find.wait(60)
        return [
            (1000.0, Delivery(b"[[], {}, {}]", Properties(headers={"task": "t", "id": "x"}), "", "q", False, "q", 0, 0))
        ]

    remote.control.delayed, remote.control.delayed_blocks = find, True
    assert remote.tell(Command("scheduled", {}, ticket="t", reply_key="caller")) == []
    assert remote.ask("ping") == {"ok": "pong"}
    may_find.set()
    sent = remote.publisher.sent
    deadline = time.monotonic() + 60
    while len(sent) < 2:
        assert time.monotonic() < deadline
        remote.bench.loop.turn()

    ((task,),) = json.loads(sent[-1].body).values()
    assert task["request"]["id"] == "x"


def test_a_pool_grows_no_further_than_autoscale_may() -> None:
    remote = Remote()
    answers = [remote.ask("pool_grow", n=1_000) for _ in range(10)]

    assert answers[:-1] == [{"ok": "pool will grow"}] * 9
    assert "10000 at most" in answers[-1]["error"]


def test_questions_that_wait_for_a_server_are_bounded() -> None:
    remote = Remote()
    may_find = threading.Event()

    def find(limit: int) -> list[tuple[float, Delivery]]:
        may_find.wait(60)
        return []

    remote.control.delayed, remote.control.delayed_blocks = find, True
    answers = [remote.tell(Command("scheduled", {}, ticket="t", reply_key="caller")) for _ in range(MOST_ASKING + 2)]
    assert answers[:MOST_ASKING] == [[]] * MOST_ASKING
    assert [list(answer[0]) for answer in answers[MOST_ASKING:]] == [["error"]] * 2
    may_find.set()
    deadline = time.monotonic() + 60
    while len(remote.publisher.sent) < MOST_ASKING + 2:
        assert time.monotonic() < deadline
        remote.bench.loop.turn()
    assert "error" not in str(remote.tell(Command("scheduled", {}, ticket="t", reply_key="caller")))


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("registered", {"taskinfoitems": ["name"] * 10_000}),
        ("purge_delayed", {"addresses": [["", str(n)] for n in range(10_000)]}),
    ],
)
def test_a_question_that_asks_too_much_is_refused(method: str, arguments: dict[str, Any]) -> None:
    """Each of them was asked of each task, or of each message that is held, on the worker's loop."""
    assert "at most" in Remote().ask(method, **arguments)["error"]


def test_the_loop_does_not_stand_still_for_many_stamps() -> None:
    """The time grew with the square of their number: a megabyte took minutes."""
    started = time.process_time()
    answer = Remote().ask("revoke_by_stamped_headers", headers=[f"n{n}=v" for n in range(30_000)])

    assert "flagged as revoked" in answer["ok"]
    assert time.process_time() - started < 10


def test_a_large_command_in_yaml_is_not_read() -> None:
    """PyYAML takes a second for some tens of kilobytes, on the worker's loop."""
    remote = Remote(accept=frozenset({"application/x-yaml"}))
    for name, answered in ("a" * 10, True), ("a" * 100_000, False):
        body = f"{{method: ping, ticket: t, reply_to: {{routing_key: k}}, destination: [w@h, {name}]}}".encode()
        remote.panel.on_delivery(
            Delivery(body, Properties("application/x-yaml", "utf-8", {}), "celery.pidbox", "", False, "mailbox", 1, 1)
        )
        remote.bench.loop.turn()
        assert bool(remote.publisher.sent) is answered
        remote.publisher.sent.clear()


def test_a_queue_is_consumed_with_slots_of_its_own() -> None:
    remote = Remote(slots=4)

    assert remote.ask("add_consumer", queue="web", slots="1-2") == {"ok": "add consumer web"}
    assert remote.ask("stats")["slots"] == {"web": {"slots": "1-2", "running": 0}}
    assert "2 (at most 2 slots)" in remote.ask("add_consumer", queue="web", slots="all")["error"]
