"""Each role of docs/security.md works with the rights that it is given there, on a topology that an operator declared."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import MetaData, create_engine
from sqlalchemy.orm import Session

from amqtask import AmqTask
from amqtask.assembly import build_relay
from amqtask.contrib.sqlalchemy import SqlAlchemyOutbox, outbox_table
from amqtask.exceptions import AccessRefused
from integration.flower_peer import Flower
from integration.nodes import RabbitNode
from integration.rights import EXCHANGES, NOTHING, OPERATED, Guarded, Rights
from integration.waiting import LONG, PATIENT
from integration.workers import BeatProcess, WorkerProcess, eventually, run_cli

APP = "integration.apps.guarded"


@pytest.fixture(scope="module")
def guarded(hurt_node: RabbitNode) -> Guarded:
    """A virtual host on which an operator has declared what the application needs."""
    made = Guarded(hurt_node, f"rights-{uuid.uuid4().hex[:8]}")
    code, said = run_cli("-A", APP, "topology", "declare", environment={"AMQTASK_BROKER_URL": made.operator})
    assert code == 0, said
    return made


@pytest.fixture(scope="module")
def urls(guarded: Guarded) -> dict[str, str]:
    """The broker's URL for each role."""
    return {role: guarded.user(role, rights) for role, rights in OPERATED.items()}


@pytest.fixture(scope="module")
def worker(urls: dict[str, str]) -> Iterator[WorkerProcess]:
    """A worker with a worker's rights."""
    environment = {"AMQTASK_BROKER_URL": urls["worker"]}
    with WorkerProcess(APP, "-P", "threads", "-c", "2", "-E", "-n", "w@guarded", environment=environment) as process:
        yield process
        # It lacked nothing.
        assert "remote control" not in process.log
        assert process.stop() == 0


@pytest.fixture
def caller(urls: dict[str, str]) -> Iterator[AmqTask]:
    """A producer that reads its results."""
    app = AmqTask("caller", broker=urls["producer with results"], backend="rpc://", **PATIENT)
    yield app
    app.close()


def test_a_producer_needs_to_write_to_the_default_exchange_only(urls: dict[str, str], worker: WorkerProcess) -> None:
    app = AmqTask("caller", broker=urls["producer"], **PATIENT)

    sent = app.send_task("guarded.add", (1, 2), queue="jobs")

    worker.await_log(f"guarded.add[{sent.id}] succeeded")
    app.close()


def test_a_producer_with_results_has_a_queue_of_its_own(caller: AmqTask, worker: WorkerProcess) -> None:
    assert caller.send_task("guarded.add", (1, 2), queue="jobs").get(timeout=LONG) == 3


def test_delays_and_retries_need_no_right_to_configure(caller: AmqTask, worker: WorkerProcess) -> None:
    assert caller.send_task("guarded.add", (1, 2), queue="jobs", countdown=0.3).get(timeout=LONG) == 3
    assert caller.send_task("guarded.retry", queue="jobs").get(timeout=LONG) == 1


def test_chains_and_chords_run_with_a_workers_rights(caller: AmqTask, worker: WorkerProcess) -> None:
    assert caller.send_task("guarded.flow", queue="jobs").get(timeout=LONG) == "sent"
    worker.await_log("the flow ended with 6")


def test_dead_letters_are_moved_with_a_workers_rights(caller: AmqTask, worker: WorkerProcess, guarded: Guarded) -> None:
    caller.send_task("guarded.nobody", queue="mail")

    code, said = 1, ""

    def is_there() -> bool:
        nonlocal code, said
        environment = {"AMQTASK_BROKER_URL": guarded.operator}
        code, said = run_cli("-A", APP, "dead", "list", "-Q", "mail", environment=environment)
        return "guarded.nobody" in said

    eventually(is_there, every=0.5, what=lambda: said)


def test_beat_leads_and_sends_with_a_beats_rights(urls: dict[str, str], worker: WorkerProcess) -> None:
    environment = {"AMQTASK_BROKER_URL": urls["beat"]}
    with BeatProcess(APP, "-S", "memory", environment=environment) as beat:
        eventually(lambda: beat.is_leading)
        worker.await_log("guarded.tick")
        assert beat.stop() == 0


def test_a_monitor_asks_workers_and_sees_events(urls: dict[str, str], worker: WorkerProcess, caller: AmqTask) -> None:
    environment = {"AMQTASK_BROKER_URL": urls["monitor"]}
    code, said = run_cli("-A", APP, "inspect", "ping", environment=environment)
    assert (code, "pong" in said) == (0, True), said
    app = AmqTask("monitor", broker=urls["monitor"], **PATIENT)
    seen: list[str] = []
    with app.connection_for_read() as connection:
        receiver = app.events.Receiver(connection, handlers={"*": lambda event: seen.append(event["type"])})
        receiver.capture(limit=1, timeout=LONG, wakeup=True)
    assert seen
    app.close()


def test_a_relay_publishes_with_a_producers_rights(urls: dict[str, str], worker: WorkerProcess, tmp_path: Path) -> None:
    engine, metadata = create_engine(f"sqlite:///{tmp_path / 'shop.db'}"), MetaData()
    with AmqTask("shop", broker=urls["producer"], **PATIENT, set_as_current=False) as app:
        outbox = SqlAlchemyOutbox(app, outbox_table(metadata), engine=engine)
        metadata.create_all(engine)
        with Session(engine) as session, session.begin(), outbox.using(session):
            now = app.send_task("guarded.add", (1, 2), queue="jobs")
            later = app.send_task("guarded.add", (3, 4), queue="jobs", countdown=1)

        relay = build_relay(app)
        done = relay.drain()
        relay.store.close()

    assert (done.sent, done.failed) == (2, 0)
    worker.await_log(f"guarded.add[{now.id}] succeeded")
    worker.await_log(f"guarded.add[{later.id}] succeeded")
    engine.dispose()


def test_flower_shows_workers_with_a_monitors_rights(urls: dict[str, str], worker: WorkerProcess) -> None:
    with Flower(APP, environment={"AMQTASK_BROKER_URL": urls["monitor"]}) as flower:
        eventually(
            lambda: flower.get("/api/workers?status=1").get("w@guarded") is True,
            every=0.5,
            what="Flower does not show the worker",
        )
        found = flower.worker("w@guarded")

    assert "guarded.add" in found["registered"]


@pytest.mark.parametrize(
    ("name", "write", "backend", "lacking"),
    [
        ("poor", NOTHING, None, "no write permission on exchange 'amq.default'"),
        ("waiting", r"^amq\.default$", "rpc://", "no configure permission on queue"),
    ],
)
def test_a_missing_right_is_named_with_the_command_that_gives_it(
    guarded: Guarded, name: str, write: str, backend: str | None, lacking: str
) -> None:
    app = AmqTask("caller", broker=guarded.user(name, Rights(NOTHING, write, NOTHING)), backend=backend, **PATIENT)

    with pytest.raises(AccessRefused, match=lacking) as caught:
        app.send_task("guarded.add", (1, 2), queue="jobs")
    assert f"rabbitmqctl set_permissions -p {guarded.name} {name}-{guarded.name}" in str(caught.value)
    app.close()


def test_a_worker_without_the_right_to_read_ends_and_says_which(guarded: Guarded) -> None:
    rights = OPERATED["worker"]._replace(read=r"^((reply\.)?celery\.pidbox|.+@.+\.celery\.pidbox)$")
    environment = {"AMQTASK_BROKER_URL": guarded.user("deaf", rights)}

    code, said = run_cli("-A", APP, "worker", "-P", "threads", "-Q", "jobs", environment=environment)

    assert code == 1
    assert "no read permission on queue 'jobs'" in said


def test_a_worker_without_a_right_to_its_mailbox_works_and_says_what_it_lacks(guarded: Guarded) -> None:
    rights = OPERATED["worker"]._replace(configure=f"^({EXCHANGES})$")
    environment = {"AMQTASK_BROKER_URL": guarded.user("mute", rights)}

    with WorkerProcess(APP, "-P", "threads", "-Q", "mail", environment=environment) as process:
        process.await_log("takes no remote control")
        assert "no configure permission on queue" in process.log
        assert "another worker named" not in process.log
