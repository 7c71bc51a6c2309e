"""Limits over all workers: of what runs at once and of what begins in a time, of a task or of each key."""

from __future__ import annotations

import json
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from amqtask import AmqTask, Concurrency, Rate, group, signals
from amqtask.cli.main import run
from amqtask.exceptions import FlowStoreUnreachable, SoftTimeLimitExceeded, WrongValue
from amqtask.flow.contract import Entry, Verdict
from amqtask.flow.memory import MemoryStore
from amqtask.protocol.message import Message, Properties
from amqtask.testing.apps import in_memory
from amqtask.testing.worker import start_worker
from integration.waiting import eventually


@pytest.fixture
def app() -> AmqTask:
    return AmqTask("limits", broker="memory://", backend="cache+memory://")


class Running:
    """How many run at once, and the most that did, by key."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.now: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.order: list[Any] = []

    def __call__(self, key: str, number: int) -> None:
        with self._lock:
            self.now[key] += 1
            self.now["all"] += 1
            self.order.append(number)
            for name in (key, "all"):
                self.most[name] = max(self.most[name], self.now[name])
        threading.Event().wait(0.01)  # the task's work
        with self._lock:
            self.now[key] -= 1
            self.now["all"] -= 1


def two_workers(app: AmqTask, pool: str = "threads") -> ExitStack:
    stack = ExitStack()
    for name in ("one@here", "two@here"):
        stack.enter_context(start_worker(app, pool=pool, concurrency=4, hostname=name))
    return stack


def test_no_more_run_at_once_than_all_limits_allow(app: AmqTask) -> None:
    running = Running()

    @app.task(name="work", bind=True, limits=[Concurrency(3), Concurrency(1, by="tenant")])
    def work(self: Any, number: int, tenant: str) -> tuple[int, int]:
        running(tenant, number)
        return number, self.request.retries

    with two_workers(app):
        results = group(work.s(number, "abcd"[number % 4]) for number in range(60)).apply_async().get(timeout=60)

    assert results == [[number, 0] for number in range(60)]
    assert running.most["all"] == 3
    assert [running.most[key] for key in "abcd"] == [1] * 4


@pytest.mark.parametrize("pool", ["solo", "asyncio"])
def test_they_hold_on_each_pool(app: AmqTask, pool: str) -> None:
    running = Running()

    @app.task(name="work", limits=Concurrency(1))
    async def work(number: int) -> int:
        running("", number)
        return number

    @app.task(name="plain", limits=Concurrency(1))
    def plain(number: int) -> int:
        running("plain", number)
        return number

    with two_workers(app, pool):
        calls = [task.delay(number) for number in range(10) for task in (work, plain)]
        assert [result.get(timeout=60) for result in calls] == [n for number in range(10) for n in (number, number)]
    assert running.most[""] == running.most["plain"] == 1


def test_a_rate_spreads_what_begins(app: AmqTask) -> None:
    begun: list[float] = []

    @app.task(name="sends", limits=Rate("20/s", by="to", burst=2))
    def sends(to: str) -> None:
        begun.append(time.monotonic())

    with two_workers(app):
        group(sends.s("a") for _ in range(8)).apply_async().get(timeout=60)

    begun.sort()
    assert all(later - earlier >= 0.05 * 0.98 * 4 for earlier, later in zip(begun, begun[5:], strict=False))
    assert begun[-1] - begun[0] >= 0.05 * 0.98 * 6


def test_what_waits_is_in_the_broker_and_holds_no_slot(app: AmqTask) -> None:
    runs, may_end = threading.Event(), threading.Event()

    @app.task(name="one", limits=Concurrency(1))
    def one() -> str:
        runs.set()
        may_end.wait(60)
        return "one"

    free = app.task(name="free")(lambda: "free")

    with start_worker(app, pool="threads", concurrency=2):
        first = one.delay()
        assert runs.wait(60)
        waiting = [one.delay() for _ in range(20)]
        assert [free.delay().get(timeout=60) for _ in range(3)] == ["free"] * 3
        may_end.set()
        assert [result.get(timeout=60) for result in (first, *waiting)] == ["one"] * 21


def test_what_waits_goes_to_its_queue_alone_and_is_sent_by_the_worker(
    app: AmqTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sender's other routes are followed once, with his own rights; and another user's name is refused by the broker."""
    monkeypatch.setattr("amqtask.worker.lines.LONGEST_SECONDS", 0.0)
    runs, may_end = threading.Event(), threading.Event()
    seen: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}

    @app.task(name="one", bind=True, limits=Concurrency(1))
    def one(self: Any) -> None:
        seen[self.request.id] = self.request.headers, self.request.properties
        runs.set()
        may_end.wait(60)

    queue = app.queues[app.conf.task_default_queue]
    with start_worker(app, pool="threads", concurrency=2):
        one.delay()
        assert runs.wait(60)
        headers = {"task": "one", "id": "waits", "CC": ["w@h.celery.pidbox"], "BCC": ["other"], "mine": 1}
        properties = Properties("application/json", "utf-8", headers, user_id="ann", app_id="shop")
        app.publisher.publish(Message(b"[[], {}, {}]", properties, "", queue.name, app.queues.declarations(queue)))
        eventually(lambda: [use.waiting for limit in app.limits.read() for use in limit.keys] == [1])
        may_end.set()
        eventually(lambda: "waits" in seen)
    callers, sent = seen["waits"]
    assert callers == {"mine": 1}
    assert (sent.get("user_id"), sent["app_id"]) == (None, "shop")


def test_those_who_are_next_do_not_go_through_the_broker(app: AmqTask) -> None:
    received: Counter[str] = Counter()

    def count(request: Any, **_: object) -> None:
        received[request.task] += 1

    @app.task(name="one", limits=Concurrency(2))
    def one() -> None:
        threading.Event().wait(0.02)  # the task's work

    signals.task_received.connect(count)
    try:
        with start_worker(app, pool="threads", concurrency=20):
            group(one.s() for _ in range(20)).apply_async().get(timeout=60)
    finally:
        signals.task_received.disconnect(count)

    assert received["one"] < 40


def test_a_place_is_free_after_a_failure_and_for_a_retry(app: AmqTask) -> None:
    @app.task(name="fails", bind=True, limits=[Concurrency(1)])
    def fails(self: Any) -> int:
        if self.request.retries < 2:
            raise self.retry(countdown=0)
        raise ValueError(self.request.retries)

    with start_worker(app):
        for _ in range(2):
            with pytest.raises(ValueError, match="2"):
                fails.delay().get(timeout=60)


def test_a_retry_waits_behind_those_who_wait(app: AmqTask) -> None:
    runs, may_end = threading.Event(), threading.Event()
    tickets: list[object] = []

    @app.task(name="one", limits=Concurrency(1), bind=True)
    def one(self: Any, *, again: bool = False) -> None:
        runs.set()
        may_end.wait(60)
        if again:
            tickets.append(self.request.request.headers.get("amqtask-tickets"))
            if not self.request.retries:
                raise self.retry(countdown=0)

    with start_worker(app, pool="threads", concurrency=2):
        first = one.delay()
        assert runs.wait(60)
        waits = one.delay(again=True)
        eventually(lambda: waiting_for(app) == 1)
        may_end.set()
        first.get(timeout=60)
        waits.get(timeout=60)
    # What its ticket was for was the first attempt.
    assert tickets == [{"concurrency": 1}, None]


def waiting_for(app: AmqTask) -> int:
    (limit,) = app.limits.read()
    return limit.waiting


class Away(MemoryStore):
    """A store that does not answer until it is told to."""

    is_away = True

    def enter(self, entry: Entry, lease: float, most: int = 1) -> Verdict:
        if self.is_away:
            raise FlowStoreUnreachable("the store is away")
        return super().enter(entry, lease, most)


@pytest.mark.parametrize("policy", ["wait", "run"])
def test_what_becomes_of_tasks_while_the_store_is_away(
    app: AmqTask, policy: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("amqtask.flow.gate.AWAY_SECONDS", 0.05)
    app.conf.flow_on_error = policy
    store = Away()
    limited = app.task(name="limited", limits=Concurrency(1))(lambda: "ran")
    app.runtime._kept.flow_store = store

    result = limited.delay()
    with start_worker(app):
        if policy == "wait":
            eventually(lambda: "its tasks wait" in caplog.text)
            assert not result.ready()
            store.is_away = False
        assert result.get(timeout=60) == "ran"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Concurrency(0), "wants a whole number from 1 to 10000, not 0"),
        (lambda: Concurrency(True), "wants a whole number"),
        (lambda: Rate("fast"), "wants text like '10/s'"),
        (lambda: Rate("0/s"), "wants text like"),
        (lambda: Rate("9" * 400 + "/s"), "wants text like"),
        (lambda: Rate("0.0001/d"), "wants text like"),
        (lambda: Rate("5/s", burst=0), "burst wants a whole number"),
        (lambda: Rate("5/s", burst=10**400), "burst wants a whole number"),
    ],
)
def test_what_is_wrong_is_said_when_it_is_written(make: Callable[[], object], words: str) -> None:
    with pytest.raises(WrongValue, match=words):
        make()


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ([Concurrency(1), Concurrency(2)], "limits has Concurrency twice with the same key"),
        (
            [Concurrency(1, by=lambda tenant: tenant), Concurrency(5, by=lambda tenant: tenant[:1])],
            r"twice with the same key \(<lambda>\)",
        ),
        ([5], "limits wants a Concurrency or a Rate, or a list of them"),
        (Concurrency(1, by="tenat"), "Did you mean 'tenant'"),
    ],
)
def test_limits_that_cannot_be_are_told_with_the_task(app: AmqTask, limits: object, words: str) -> None:
    def define() -> None:
        app.task(name="wrong", limits=limits)(lambda tenant: None)
        app.finalize()

    with pytest.raises(WrongValue, match=words):
        define()


def test_a_missing_key_is_a_key_of_its_own(app: AmqTask) -> None:
    task = app.task(name="optional", limits=Concurrency(1, by="tenant"))(lambda tenant=None: None)
    app.finalize()

    assert task.flow_plan is not None
    keys = [task.flow_plan.bounds(args, {})[0].key for args in ((), (None,), ("None",), ("a",))]

    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_an_argument_makes_the_same_key_however_it_is_given(app: AmqTask) -> None:
    task = app.task(name="sync", limits=Concurrency(1, by="tenant"))(lambda number, *, tenant="a": None)
    other = app.task(name="other", limits=[Rate("1/s"), Rate("1/s", by=("tenant", "user"))])(
        lambda tenant, **more: None
    )
    app.finalize()

    def key(task: Any, *args: object, **kwargs: object) -> str:
        return str(task.flow_plan.bounds(args, kwargs)[-1].key)

    assert key(task, 1) == key(task, 2, tenant="a") == key(task, number=3) != key(task, 1, tenant="b")
    assert key(other, "a", user=1) == key(other, tenant="a", user=1)
    assert len({key(other, "a", user=user) for user in (1, 1.0, True, "1", None, [1])}) == 6


def test_limits_are_looked_at_and_set_while_tasks_run(app: AmqTask, capsys: pytest.CaptureFixture[str]) -> None:
    begun, may_end = threading.Semaphore(0), threading.Event()

    @app.task(name="sync", limits=[Concurrency(1, by="tenant"), Rate("1000/s")])
    def sync(tenant: str) -> str:
        begun.release()
        may_end.wait(60)
        return tenant

    with start_worker(app, pool="threads", concurrency=4):
        calls = [sync.delay("acme") for _ in range(3)]
        assert begun.acquire(timeout=60)
        eventually(lambda: [use[1:] for use in app.limits.read()[0].keys] == [(1, 2)])
        assert run(["limits", "set", "sync", "concurrency by tenant", "3", "--by", "ann"], app) == 0
        assert begun.acquire(timeout=60)
        assert begun.acquire(timeout=60)
        assert run(["limits", "--json"], app) == 0
        shown = capsys.readouterr().out
        may_end.set()
        assert [call.get(timeout=60) for call in calls] == ["acme"] * 3
    of_tenants, _ = json.loads(shown[shown.index("[") :])
    assert (of_tenants["value"], of_tenants["in_code"], of_tenants["by"]) == ("3", "1", "ann")
    assert of_tenants["keys"] == [{"key": "acme", "running": 3, "waiting": 0}]
    assert run(["limits"], app) == 0
    assert "3 (code: 1)" in capsys.readouterr().out
    assert run(["limits", "reset", "sync", "concurrency by tenant"], app) == 0
    assert app.limits.read()[0].value == "1"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("nobody", "rate", "1/s"), "no task 'nobody' with limits; there are sync"),
        (("sync", "concurrency", "1"), "has no limit 'concurrency'; it has rate by tenant"),
        (("sync", "rate by tenant", "fast"), "wants text like '10/s'"),
        (("sync", "rate by tenant", "1/s", "--burst", "0"), "--burst"),
    ],
)
def test_a_limit_that_cannot_be_set_says_why(
    app: AmqTask, capsys: pytest.CaptureFixture[str], asked: tuple[str, ...], words: str
) -> None:
    app.task(name="sync", limits=Rate("10/s", by="tenant"))(lambda tenant: None)

    assert run(["limits", "set", *asked], app) != 0
    assert words in capsys.readouterr().err


def test_keys_of_encrypted_tasks_are_not_told(app: AmqTask) -> None:
    limits = Concurrency(1, by="tenant")
    plain = app.task(name="plain", limits=limits)(lambda tenant: None)
    private = app.task(name="private", limits=limits, serializer="encrypted")(lambda tenant: None)
    app.finalize()

    texts = [task.flow_plan.bounds(("acme",), {})[0].text for task in (plain, private) if task.flow_plan]
    assert texts[0] == "acme"
    assert "acme" not in texts[1]


def test_tests_on_the_broker_in_memory_ask_no_server() -> None:
    app = AmqTask("shop", broker="amqp://nowhere.invalid//", flow_store="redis://nowhere.invalid")
    one = app.task(name="one", limits=Concurrency(1), unique=True)(lambda: 1)

    with in_memory(app, {}), start_worker(app):
        assert one.delay().get(timeout=60) == 1
    assert app.conf.flow_store == "redis://nowhere.invalid"


class Slow(MemoryStore):
    """A store whose first answer takes a second."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def enter(self, entry: Entry, lease: float, most: int = 1) -> Verdict:
        self.asked += 1
        if self.asked == 1:
            time.sleep(1)
        return super().enter(entry, lease, most)


def test_a_limit_that_strikes_while_the_store_is_asked_loses_no_task(
    app: AmqTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amqtask.execution.executor.INTERRUPTED_SECONDS", 0.05)

    @app.task(name="limited", limits=Concurrency(1), soft_time_limit=0.2)
    async def limited() -> str:
        return "ran"

    app.runtime._kept.flow_store = Slow()
    with start_worker(app, pool="asyncio"):
        assert limited.delay().get(timeout=30) == "ran"


class Struck(MemoryStore):
    """A store whose answer to what ends is cut off by a limit that came late."""

    def leave(self, entry: Entry, seconds: float, lock: str, ended: str = "", runs: int = 1) -> str:
        super().leave(entry, seconds, lock, ended, runs)
        raise SoftTimeLimitExceeded(1.0)


@pytest.mark.parametrize("pool", ["solo", "threads", "asyncio"])
def test_a_limit_that_strikes_when_a_place_is_given_back_loses_no_outcome(app: AmqTask, pool: str) -> None:
    @app.task(name="limited", limits=Concurrency(1), unique=True)
    async def limited(number: int) -> int:
        return number

    app.runtime._kept.flow_store = Struck()
    with start_worker(app, pool=pool):
        assert [limited.delay(number).get(timeout=30) for number in range(3)] == [0, 1, 2]


def test_long_keys_are_not_remembered(app: AmqTask) -> None:
    task = app.task(name="by document", limits=Concurrency(1, by="text"))(lambda text: None)
    app.finalize()
    assert task.flow_plan is not None

    tracemalloc.start()
    try:
        for number in range(30):
            task.flow_plan.bounds((f"{number}{'x' * 200_000}",), {})
        remembered, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert remembered < 1_000_000
