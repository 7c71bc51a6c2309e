"""Remote control between a real Celery 5.7 and us, both ways: its command line and ours, its workers and ours."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pika
import pytest

from amqtask import AmqTask
from amqtask.console.web import console
from amqtask.exceptions import DuplicateNodenameWarning, TaskRevokedError
from integration import celery_peer
from integration.celery_peer import CeleryWorker
from integration.conftest import Broker
from integration.waiting import PATIENT
from integration.workers import WorkerProcess, eventually, run_cli
from tests.console.test_console import Client

OURS = "integration.apps.sample"


@pytest.fixture
def queue(rabbit: Broker) -> str:
    """A classic queue, as Celery declares it."""
    name = rabbit.queue("celery")
    channel = rabbit.channel()
    channel.queue_declare(name, durable=True)
    channel.close()
    return name


@pytest.fixture
def peer(rabbit: Broker, redis_url: str, queue: str) -> dict[str, str]:
    """How the real Celery is configured."""
    return celery_peer.environment(rabbit.url, redis_url, queue)


@pytest.fixture
def app(rabbit: Broker, redis_url: str, queue: str) -> Iterator[AmqTask]:
    """Our application on the same broker and result store."""
    with AmqTask("client", broker=rabbit.url, backend=redis_url, **PATIENT) as made:
        made.conf.task_default_queue = queue
        yield made


@pytest.fixture
def node() -> str:
    """A name that no other worker on this broker has."""
    return f"w{uuid.uuid4().hex[:8]}@here"


@pytest.fixture
def ours(node: str, queue: str, redis_url: str) -> Iterator[WorkerProcess]:
    """Our worker."""
    environment = {"SAMPLE_BACKEND": redis_url, "SAMPLE_QUEUE": queue}
    with WorkerProcess(OURS, "-Q", queue, "-c", "2", "-n", node, environment=environment) as worker:
        yield worker


@pytest.fixture
def theirs(node: str, queue: str, peer: dict[str, str]) -> Iterator[CeleryWorker]:
    """Celery's worker."""
    with CeleryWorker(peer, queue, "-n", node) as worker:
        yield worker


def celery_says(peer: dict[str, str], node: str, *words: str) -> Any:
    """What `celery inspect|control … -d NODE --json` says of this node."""
    return _answer(node, *celery_peer.cli(peer, *words, "-d", node, "--json", "-t", "60"))


def we_say(node: str, *words: str) -> Any:
    """What `amqtask inspect|control … -d NODE --json` says of this node."""
    return _answer(node, *run_cli("-A", OURS, *words, "-d", node, "--json", "-t", "60"))


def _answer(node: str, code: int, text: str) -> Any:
    assert code == 0, text
    replies = json.loads(text)
    (reply,) = replies if isinstance(replies, list) else [replies]
    return reply[node]


# -- the real celery asks our worker


@pytest.mark.usefixtures("ours")
def test_celery_s_command_line_asks_our_worker(peer: dict[str, str], node: str, queue: str) -> None:
    assert celery_says(peer, node, "inspect", "ping") == {"ok": "pong"}
    assert celery_says(peer, node, "inspect", "active") == []
    assert celery_says(peer, node, "inspect", "reserved") == []
    assert celery_says(peer, node, "inspect", "scheduled") == []
    assert celery_says(peer, node, "inspect", "revoked") == []
    assert "sample.add" in celery_says(peer, node, "inspect", "registered")
    (consumed,) = celery_says(peer, node, "inspect", "active_queues")
    assert (consumed["name"], consumed["exchange"]["type"]) == (queue, "direct")
    stats = celery_says(peer, node, "inspect", "stats")
    assert stats["pool"]["max-concurrency"] == 2
    assert len(stats["pool"]["processes"]) == 2
    assert stats["broker"]["transport"] == "amqp"
    assert set(celery_says(peer, node, "inspect", "clock")) == {"clock"}
    assert celery_says(peer, node, "inspect", "conf")["task_default_queue"] == queue
    assert "software -> amqtask" in celery_says(peer, node, "inspect", "report")["ok"]
    assert celery_says(peer, node, "inspect", "memsample").endswith("B")
    assert "rss (end)" in celery_says(peer, node, "inspect", "memdump")
    assert celery_says(peer, node, "inspect", "query_task", "nobody") == {}


@pytest.mark.usefixtures("ours")
def test_celery_s_command_line_changes_our_worker(
    rabbit: Broker, peer: dict[str, str], app: AmqTask, node: str, queue: str
) -> None:
    other = rabbit.queue("other")
    assert celery_says(peer, node, "control", "pool_grow", "1") == {"ok": "pool will grow"}
    assert celery_says(peer, node, "inspect", "stats")["pool"]["max-concurrency"] == 3
    assert "ok" in celery_says(peer, node, "control", "pool_shrink", "2")
    assert "ok" in celery_says(peer, node, "control", "rate_limit", "sample.add", "100/s")
    assert celery_says(peer, node, "control", "rate_limit", "nobody", "1/s") == {"error": "unknown task"}
    assert "ok" in celery_says(peer, node, "control", "time_limit", "sample.add", "10", "20")
    assert celery_says(peer, node, "control", "add_consumer", other) == {"ok": f"add consumer {other}"}
    assert app.send_task("sample.add", (2, 3), queue=other).get(timeout=90) == 5
    assert {each["name"] for each in celery_says(peer, node, "inspect", "active_queues")} == {queue, other}
    assert "ok" in celery_says(peer, node, "control", "cancel_consumer", other)
    task_id = str(uuid.uuid4())
    assert "flagged as revoked" in celery_says(peer, node, "control", "revoke", task_id)["ok"]
    assert celery_says(peer, node, "inspect", "revoked") == [task_id]
    with pytest.raises(TaskRevokedError):
        app.send_task("sample.add", (2, 3), task_id=task_id).get(timeout=90)


def test_celery_terminates_a_task_in_our_worker(
    ours: WorkerProcess, peer: dict[str, str], app: AmqTask, node: str, tmp_path: Path
) -> None:
    started = tmp_path / "started"
    result = app.send_task("sample.wait_for", (str(started), str(tmp_path / "never")))
    eventually(started.exists)
    (active,) = celery_says(peer, node, "inspect", "active")
    assert (active["id"], active["name"], active["hostname"]) == (result.id, "sample.wait_for", node)
    assert active["args"] == [str(started), str(tmp_path / "never")]
    assert active["worker_pid"] in ours.children
    assert active["time_start"] is not None
    found = celery_says(peer, node, "inspect", "query_task", result.id)
    assert found[result.id][0] == "active"

    celery_peer.call(f"app.control.revoke({result.id!r}, terminate=True, signal='SIGKILL')", peer)

    with pytest.raises(TaskRevokedError):
        result.get(timeout=90)
    assert celery_peer.call(f"print(app.AsyncResult({result.id!r}).state)", peer) == "REVOKED"
    assert app.send_task("sample.add", (2, 3)).get(timeout=90) == 5


@pytest.mark.usefixtures("ours")
def test_celery_revokes_our_worker_s_tasks_by_their_stamps(peer: dict[str, str], node: str) -> None:
    celery_peer.call(
        f"app.control.revoke_by_stamped_headers({{'customer': ['x']}}, destination=[{node!r}], reply=True, timeout=60)",
        peer,
    )
    told = celery_peer.call(
        "from celery.exceptions import TaskRevokedError\n"
        "class Stamps(__import__('celery.canvas', fromlist=['x']).StampingVisitor):\n"
        "    def on_signature(self, sig, **headers): return {'customer': sig.args[0]}\n"
        "def run(customer):\n"
        "    sig = add.s(customer, 'y'); sig.stamp(Stamps())\n"
        "    try: return sig.apply_async().get(timeout=90)\n"
        "    except TaskRevokedError: return 'revoked'\n"
        "print(run('x'), run('z'))",
        peer,
    )
    assert told == "revoked zy"


def test_celery_restarts_our_worker_s_pool(
    peer: dict[str, str], app: AmqTask, node: str, queue: str, redis_url: str
) -> None:
    environment = {"SAMPLE_BACKEND": redis_url, "SAMPLE_QUEUE": queue, "SAMPLE_POOL_RESTARTS": "1"}
    with WorkerProcess(OURS, "-Q", queue, "-c", "2", "-n", node, environment=environment) as worker:
        before = set(worker.children)
        told = celery_peer.call(
            f"print(app.control.pool_restart(destination=[{node!r}], reply=True, timeout=60))", peer
        )
        assert told == str([{node: {"ok": "reload started"}}])
        eventually(lambda: len(worker.children) == 2 and not before & set(worker.children))
        assert app.send_task("sample.add", (2, 3)).get(timeout=90) == 5


# -- we ask a real Celery's worker


@pytest.mark.usefixtures("theirs")
def test_our_command_line_asks_celery_s_worker(node: str, queue: str) -> None:
    assert we_say(node, "inspect", "ping") == {"ok": "pong"}
    assert we_say(node, "status") == {"ok": "pong"}
    assert we_say(node, "inspect", "active") == []
    assert "sample.add" in we_say(node, "inspect", "registered")
    assert [each["name"] for each in we_say(node, "inspect", "active_queues")] == [queue]
    assert we_say(node, "inspect", "stats")["pool"]["max-concurrency"] == 2
    assert "software -> celery" in we_say(node, "inspect", "report")["ok"]
    assert we_say(node, "inspect", "query_task", "nobody") == {}
    by_pattern = ("-A", OURS, "inspect", "ping", "--pattern", f"{node[:5]}*", "-j", "-t", "2")
    answers: list[Any] = []

    def is_answered() -> bool:
        answers.append(run_cli(*by_pattern))
        return bool(answers[-1][0] == 0)

    eventually(is_answered, what="it never answered within two seconds")
    assert json.loads(answers[-1][1]) == {node: {"ok": "pong"}}
    code, text = run_cli("-A", OURS, "inspect", "ping", "-d", node, "-t", "60")
    assert code == 0
    assert text == f"->  {node}: OK\n        pong\n\n1 node online.\n"


@pytest.mark.usefixtures("theirs")
def test_our_command_line_changes_celery_s_worker(rabbit: Broker, app: AmqTask, node: str) -> None:
    other = rabbit.queue("other")
    rabbit.channel().queue_declare(other, durable=True)
    assert we_say(node, "control", "pool_grow", "1") == {"ok": "pool will grow"}
    eventually(lambda: len(we_say(node, "inspect", "stats")["pool"]["processes"]) == 3)
    assert "ok" in we_say(node, "control", "rate_limit", "sample.add", "100/s")
    assert we_say(node, "control", "add_consumer", other) == {"ok": f"add consumer {other}"}
    assert app.send_task("sample.add", (2, 3), queue=other).get(timeout=90) == 5
    assert "ok" in we_say(node, "control", "cancel_consumer", other)
    task_id = str(uuid.uuid4())
    assert "ok" in we_say(node, "control", "revoke", task_id)
    with pytest.raises(TaskRevokedError):
        app.send_task("sample.add", (2, 3), task_id=task_id).get(timeout=90)


@pytest.mark.usefixtures("theirs")
def test_we_terminate_a_task_in_celery_s_worker(app: AmqTask, node: str, tmp_path: Path) -> None:
    started = tmp_path / "started"
    result = app.send_task("sample.wait_for", (str(started), str(tmp_path / "never")))
    eventually(started.exists)
    active = app.control.inspect([node], timeout=90).active()
    assert active is not None
    assert [task["id"] for task in active[node]] == [result.id]

    def is_gone() -> bool:
        result.revoke(terminate=True)  # Celery's worker takes no notice of what came more than a second ago
        return result.ready()

    eventually(is_gone, every=1.0)
    with pytest.raises(TaskRevokedError):
        result.get(timeout=90)


@pytest.mark.usefixtures("theirs")
def test_patterns_limits_and_callbacks_reach_celery_s_worker(app: AmqTask, node: str) -> None:
    name = node.partition("@")[0]
    seen: list[dict[str, Any]] = []

    def ping(**options: Any) -> Any:
        return app.control.broadcast("ping", reply=True, timeout=90, limit=1, callback=seen.append, **options)

    assert ping(pattern=f"{name}@*") == [{node: {"ok": "pong"}}]
    assert ping(pattern=f"{name}@h.+", matcher="pcre") == [{node: {"ok": "pong"}}]
    assert seen == [{node: {"ok": "pong"}}] * 2
    assert app.control.inspect(pattern="nobody@*", timeout=0.5).ping() is None


# -- nobody there


def test_the_exit_code_says_that_a_node_does_not_answer(rabbit: Broker) -> None:
    code, text = run_cli("-A", OURS, "inspect", "ping", "-d", "nobody@nowhere", "-t", "0.3")
    assert code == 69
    assert "No nodes replied within time constraint" in text

    code, text = run_cli("-A", OURS, "-b", "amqp://127.0.0.1:1//", "status")
    assert code == 69
    assert "Could not ask over the broker" in text


def test_two_answers_under_one_name_are_warned_of(rabbit: Broker, app: AmqTask) -> None:
    channel = rabbit.channel()
    box = channel.queue_declare("", exclusive=True).method.queue
    channel.exchange_declare("celery.pidbox", "fanout", durable=False)
    channel.queue_bind(box, "celery.pidbox")
    answered: list[Any] = []

    def ask() -> None:
        with pytest.warns(DuplicateNodenameWarning, match="twin@here"):
            answered.append(app.control.inspect(timeout=90, limit=2).ping())

    asker = threading.Thread(target=ask)
    asker.start()
    command: dict[str, Any] = {}
    while command.get("method") != "ping":
        _, _, body = channel.basic_get(box, auto_ack=True)
        command = json.loads(body) if body else {}
    headers = {"ticket": command["ticket"], "clock": 1}
    properties = pika.BasicProperties("application/json", "utf-8", headers)
    for _ in range(2):
        channel.basic_publish(
            command["reply_to"]["exchange"],
            command["reply_to"]["routing_key"],
            b'{"twin@here": {"ok": "pong"}}',
            properties,
        )
    asker.join(90)

    assert answered == [{"twin@here": {"ok": "pong"}}]
    channel.close()


# -- our console and a worker of Celery's


def test_our_console_orders_celery_s_worker(
    rabbit: Broker, peer: dict[str, str], app: AmqTask, node: str, queue: str, tmp_path: Path
) -> None:
    app.conf.history_url = f"sqlite:///{tmp_path}/index.sqlite3"
    client = Client(console(app, indexes=False, watches=False))
    other, ours = rabbit.queue("other"), rabbit.queue("ours")
    channel = rabbit.channel()
    channel.queue_declare(other, durable=True)
    channel.queue_declare(ours, durable=True, arguments={"x-queue-type": "quorum"})

    def order(action: str, **fields: str) -> str:
        answer = client.post(f"/api/do/{action}", json={"worker": node, **fields}).json()
        return str(answer.get("done") or answer)

    def row() -> dict[str, Any]:
        rows = client.get("/api/workers").json()["workers"]
        return next((one for one in rows if one["worker"] == node), {})

    with CeleryWorker({**peer, "PEER_POOL_RESTARTS": "1"}, queue, "-n", node) as theirs:
        eventually(lambda: row().get("slots") == 2)
        assert (row()["is_celery"], row()["pool"]) == (True, "celery prefork")
        assert "A worker of Celery" in client.get("/workers").text
        assert "pool will grow" in order("worker-grow", n="2")
        eventually(lambda: row().get("slots") == 4, what=lambda: str(row()))
        assert "pool will shrink" in order("worker-shrink")
        eventually(lambda: row().get("slots") == 3, what=lambda: str(row()))
        assert "add consumer" in order("worker-add-queue", queue=other)
        assert app.send_task("sample.add", (2, 3), queue=other).get(timeout=90) == 5
        assert set(row()["queues"]) == {queue, other}
        assert "it would declare" in order("worker-add-queue", queue=ours)
        assert "no longer consuming" in order("worker-remove-queue", queue=other)
        assert "new rate limit" in order("rate-limit", task="sample.add", limit="100/s")
        assert "unknown task" in order("rate-limit", task="nobody", limit="1/s")
        assert "from 1 to" in order("worker-grow", n="x")
        assert "reload started" in order("worker-restart")
        assert app.send_task("sample.add", (2, 3)).get(timeout=90) == 5
        assert queue in order("worker-drain")
        eventually(lambda: row().get("queues") == [], what=lambda: str(row()))
        code, printed = run_cli("-A", OURS, "workers", "--json", "-t", "3", environment={"SAMPLE_QUEUE": queue})
        (told,) = (one for one in json.loads(printed) if one["worker"] == node)
        assert (code, told["pool"], told["queues"]) == (0, "celery prefork", [])
        assert "ends after" in order("worker-shutdown")
        eventually(lambda: not theirs.is_alive, what=lambda: theirs.log)
