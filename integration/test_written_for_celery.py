"""What programs for Celery bring with them, on a real RabbitMQ: consumer steps and schedulers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pika
import pytest

from amqtask import AmqTask
from amqtask.result import AsyncResult
from integration import celery_peer
from integration.conftest import Broker
from integration.faults import Forwarder
from integration.waiting import PATIENT
from integration.workers import ROOT, BeatProcess, WorkerProcess, eventually

APP = "integration.apps.celerys"
# What kombu consists of.
LIBRARIES = ("kombu", "amqp", "vine", "packaging", "tzdata")


@pytest.fixture(scope="session")
def kombu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with kombu and nothing else of the environment that Celery has."""
    where = subprocess.run(
        [celery_peer.python(), "-c", "import kombu; print(kombu.__path__[0])"],
        capture_output=True,
        text=True,
        check=True,
    )
    site, folder = Path(where.stdout.strip()).parent, tmp_path_factory.mktemp("kombu")
    for name in LIBRARIES:
        if (site / name).exists():
            (folder / name).symlink_to(site / name)
    return folder


class Ours:
    """The queues of a test, and the file that its processes write to."""

    def __init__(self, broker: Broker, folder: Path) -> None:
        self.broker = broker
        self.queue = broker.queue("celerys")
        self.file = folder / "lines"

    @property
    def lines(self) -> list[str]:
        return self.file.read_text().splitlines() if self.file.exists() else []

    def environment(self, url: str, **more: str) -> dict[str, str]:
        return {"AMQTASK_BROKER_URL": url, "CELERYS_QUEUE": self.queue, "CELERYS_FILE": str(self.file), **more}

    def tell(self, word: str) -> None:
        """Publish what is no task to the step's queue."""
        channel = self.broker.channel()
        channel.basic_publish(
            f"{self.queue}.own",
            f"{self.queue}.own",
            json.dumps({"word": word}).encode(),
            pika.BasicProperties(content_type="application/json", content_encoding="utf-8"),
        )
        channel.close()


@pytest.fixture
def ours(rabbit: Broker, tmp_path: Path) -> Iterator[Ours]:
    made = Ours(rabbit, tmp_path)
    yield made
    channel = rabbit.channel()
    channel.queue_delete(f"{made.queue}.own")
    channel.exchange_delete(f"{made.queue}.own")
    channel.close()


def test_a_consumer_step_takes_messages_that_are_no_tasks_also_after_its_connection_was_lost(
    ours: Ours, broker_url: str, kombu: Path
) -> None:
    with Forwarder(broker_url) as road:
        environment = ours.environment(road.url, PYTHONPATH=str(kombu), CELERYS_LISTENS="1")
        with WorkerProcess(APP, "-P", "solo", "-Q", ours.queue, environment=environment) as worker:
            eventually(lambda: "listens 0" in ours.lines, what=lambda: worker.log)
            ours.tell("one")
            eventually(lambda: "heard one" in ours.lines, what=lambda: worker.log)

            road.cut()
            ours.tell("two")
            eventually(lambda: "heard two" in ours.lines, what=lambda: worker.log)

            assert worker.stop() == 0
    # An acknowledgement may be lost with the connection.
    assert list(dict.fromkeys(line for line in ours.lines if line.startswith("heard"))) == ["heard one", "heard two"]
    assert ours.lines[-1] == "stopped"
    ours.tell("three")
    eventually(lambda: ours.broker.count(f"{ours.queue}.own") == 1)


@pytest.mark.parametrize("pool", ["solo", "prefork"])
def test_a_worker_runs_a_scheduler_that_was_written_for_celery(ours: Ours, broker_url: str, pool: str) -> None:
    arguments = ("-P", pool, "-c", "1", "-Q", ours.queue, "-B", "--scheduler", f"{APP}:Elsewhere")
    with WorkerProcess(APP, *arguments, environment=ours.environment(broker_url)) as worker:
        eventually(lambda: ours.lines.count("often True") >= 3, what=lambda: worker.log)
        assert worker.stop() == 0
        assert "Traceback" not in worker.log
    counts = [int(line.split()[1]) for line in ours.lines if line.startswith("synced")]
    assert counts == sorted(counts)
    assert counts[-1] >= 3


def test_beat_runs_a_scheduler_that_was_written_for_celery_and_the_setting_names_it(
    ours: Ours, broker_url: str
) -> None:
    environment = ours.environment(broker_url)
    with (
        WorkerProcess(APP, "-P", "solo", "-Q", ours.queue, environment=environment),
        BeatProcess(APP, "-S", f"{APP}.Elsewhere", environment=environment) as beat,
    ):
        eventually(lambda: ours.lines.count("often True") >= 3, what=lambda: beat.log)
        assert beat.stop() == 0
    assert re.search(r"synced \d+", "\n".join(ours.lines))


@pytest.mark.parametrize("store", ["rpc", "redis"])
def test_what_a_task_tells_a_store_under_celery_s_names_arrives(
    ours: Ours, broker_url: str, redis_url: str, store: str
) -> None:
    backend = "rpc://" if store == "rpc" else redis_url
    seen: list[str] = []
    with (
        WorkerProcess(
            APP, "-P", "solo", "-Q", ours.queue, environment=ours.environment(broker_url, CELERYS_BACKEND=backend)
        ),
        AmqTask("asks", broker=broker_url, backend=backend, set_as_current=False, **PATIENT) as app,
    ):
        result = app.send_task("celerys.tell", ("PROGRESS",), queue=ours.queue)
        assert result.get(90, on_message=lambda meta: seen.append(meta["status"]), interval=0.01) == "PROGRESS"
        failed = app.send_task("celerys.tell", ("PROGRESS", True), queue=ours.queue)
        with pytest.raises(KeyError):
            failed.get(90)
    assert seen[-1] == "SUCCESS"


def test_redis_has_a_client_for_locks_and_what_is_stored_under_celery_s_names_is_read(redis_url: str) -> None:
    with AmqTask("locks", broker="memory://", backend=redis_url) as app:
        store: Any = app.backend
        assert store.client.ping()
        with store.client.lock("celerys-lock", timeout=60):
            assert store.client.exists("celerys-lock")
        result = AsyncResult[int](str(uuid.uuid4()), store)
        store.mark_as_started(result.id, pid=1)
        assert result.state == "STARTED"
        store.mark_as_done(result.id, 42)
        assert (result.get(90), store.get_task_meta(result.id)["status"]) == (42, "SUCCESS")
        assert store.wait_for(result.id)["result"] == 42
        result.forget()
        assert not store.task_result_exists(result.id)


# What programs for Celery take from kombu, as Celery's documentation shows: queues, a serializer and a JSON type.
REGISTERED = """
import json
from kombu import Exchange, Queue, binding
from kombu.serialization import register
from kombu.utils.json import register_type
from amqtask import AmqTask
from amqtask.testing.worker import start_worker

class Money:
    def __init__(self, cents):
        self.cents = cents

def dumps(value):
    return json.dumps(value, default=lambda money: {"money": money.cents})

def loads(text):
    return json.loads(text, object_hook=lambda table: Money(table["money"]) if "money" in table else table)

media = Exchange("media", type="topic")
queues = [Queue("a", media, routing_key="a.#", max_priority=3), Queue("b", [binding(media, "x"), binding(media, "y")])]
with AmqTask("routes", broker="memory://", task_queues=queues, task_default_queue="a") as app:
    app.send_task("t", queue=Queue("c", Exchange("c"), routing_key="c"))
    for name in ("a", "b"):
        app.send_task("t", queue=name)  # which declares it
    app.send_task("t", exchange=media, routing_key="a.1")
    app.send_task("t", exchange=media, routing_key="y")
    print(*(len(app.memory_broker.messages(name)) for name in "abc"), app.queues["a"].queue_arguments["x-max-priority"])

register("money", dumps, loads, content_type="application/x-money", content_encoding="utf-8")
register_type(Money, "money", lambda money: money.cents, Money)

for serializer in ("money", "json"):
    with AmqTask("shop", broker="memory://", backend="cache+memory://", task_serializer=serializer,
                 result_serializer=serializer, accept_content=[serializer]) as app:
        double = app.task(name="double")(lambda money: Money(2 * money.cents))
        with start_worker(app, pool="threads"):
            print(serializer, double.delay(Money(4)).get(60).cents)
"""


def test_queues_of_kombu_and_what_was_registered_there_are_used(kombu: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", REGISTERED],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(kombu)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["2", "2", "1", "3", "money", "8", "json", "8"], done.stdout + done.stderr
