"""Signed messages both ways with a real Celery 5.7, on RabbitMQ and on Redis; and nothing of an encrypted value in any file."""

from __future__ import annotations

import base64
import json
import os
import random
import threading
import uuid
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from amqtask import AmqTask, chain, chord, group
from amqtask.cli.broker import open_admin
from amqtask.exceptions import QueueNotFound
from amqtask.protocol.message import Message, Properties
from amqtask.protocol.serialization import AUTH, JSON, dumps
from amqtask.security import SEPARATOR
from integration import celery_peer
from integration.celery_peer import CeleryWorker
from integration.conftest import Broker
from integration.nodes import RabbitNode, rabbitmq_installed
from integration.servers import RedisServer
from integration.signers import Signers
from integration.waiting import PATIENT
from integration.workers import WorkerProcess, eventually, run_cli

APP = "integration.apps.signed"
OLD, NEW = (base64.b64encode(os.urandom(32)).decode() for _ in range(2))


class Peers:
    """A queue of a test's own on a broker: programs of ours and of Celery's that sign with keys of their own."""

    def __init__(self, broker: str, backend: str, signers: Signers, queue: str) -> None:
        self.queue = queue
        self._signers = signers
        self._common = {"broker_url": broker, "result_backend": backend, "task_default_queue": queue}

    def settings(self, name: str, **more: object) -> dict[str, Any]:
        """Of the program that signs as `name`; without a name it does not sign."""
        return {**self._common, **(self._signers.settings(name) if name else {}), **more}

    def client(self, name: str = "web", **more: object) -> AmqTask:
        """Ours, in this process."""
        app = AmqTask("client", set_as_current=False, **PATIENT)
        app.conf.update(self.settings(name, **more))
        if name:
            app.setup_security()
        return app

    def worker(self, name: str, *options: str, **more: object) -> WorkerProcess:
        """Ours."""
        told = {"PROTECTED": json.dumps(self.settings(name, **more))}
        return WorkerProcess(
            APP, "-Q", self.queue, "-c", "2", "-n", f"{name}-{self.queue}@%h", *options, environment=told
        )

    def celery(self, name: str = "celery", **more: object) -> dict[str, str]:
        """The environment of Celery's programs."""
        return {**os.environ, "PROTECTED": json.dumps(self.settings(name, **more)), "PROTECTED_UNDER": "celery"}

    def dead(self, app: AmqTask) -> dict[str, str]:
        """Ids of the dead letters, with their reasons."""
        with open_admin(app) as admin:
            try:
                found = [delivery.properties.headers for delivery in admin.browse(f"{self.queue}.dead", 10_000)]
            except QueueNotFound:
                return {}
        return {str(headers["id"]): str(headers["x-amqtask-reason"]) for headers in found}


@pytest.fixture(scope="session")
def signers(tmp_path_factory: pytest.TempPathFactory) -> Signers:
    made = Signers(tmp_path_factory.mktemp("signers"))
    for name in ("web", "worker", "celery"):
        made.add(name)
    return made


@pytest.fixture(params=["rabbitmq", "redis"])
def peers(request: pytest.FixtureRequest, redis_url: str, signers: Signers) -> Peers:
    """On both brokers; results are in Redis."""
    url = redis_url if request.param == "redis" else request.getfixturevalue("broker_url")
    queue = f"q-{uuid.uuid4().hex[:12]}"
    if request.param == "rabbitmq":
        channel = request.getfixturevalue("rabbit").channel()
        channel.queue_declare(queue, durable=True)  # classic, as Celery declares it
    return Peers(url, redis_url, signers, queue)


# -- signed, with Celery


def test_our_worker_runs_what_celery_signed_and_celery_reads_our_results(peers: Peers) -> None:
    client = peers.client()
    with peers.worker("worker") as worker:
        told = celery_peer.call(
            "print((add.s(1, 2) | add.s(3) | add.s(4)).delay().get(timeout=90), retry.delay('x').get(timeout=90), "
            "add.apply_async((1, 1), countdown=1).get(timeout=90), app.control.inspect(timeout=20).ping())",
            peers.celery(), APP,
        )  # fmt: skip
        unsigned = celery_peer.call("print(add.delay(1, 2).id)", peers.celery(""), APP)
        eventually(lambda: unsigned in peers.dead(client), what=lambda: worker.log[-3000:])
        worker.stop()

    assert told.startswith("10 x 2 ")
    assert "pong" in told
    assert "the message is not signed: its content type 'application/json'" in peers.dead(client)[unsigned]
    client.close()


def test_a_celery_worker_runs_what_we_signed_and_we_read_its_results(peers: Peers) -> None:
    client = peers.client()
    add, total = client.signature("protected.add", (1, 2)), client.signature("protected.total")

    with CeleryWorker(peers.celery(), peers.queue, app=APP):
        assert chain(add, client.signature("protected.add", (3,))).apply_async().get(timeout=90) == 6
        assert group([add, add]).apply_async().get(timeout=90) == [3, 3]
        assert chord([add, add, add])(total).get(timeout=90) == 9
        assert client.send_task("protected.retry", ("x",)).get(timeout=90) == "x"
        assert any("pong" in str(answer) for answer in (client.control.ping(timeout=10) or []))
    client.close()


def test_workers_of_both_share_a_queue_of_signed_messages(peers: Peers) -> None:
    client = peers.client()
    with peers.worker("worker") as worker, CeleryWorker(peers.celery(), peers.queue, app=APP):
        results = [client.send_task("protected.add", (n, n)) for n in range(60)]
        assert [result.get(timeout=90) for result in results] == [2 * n for n in range(60)]
        worker.stop()
    assert peers.dead(client) == {}
    client.close()


def test_events_are_signed_and_those_that_are_not_are_not_counted(peers: Peers) -> None:
    client, stranger = peers.client(), peers.client("", event_serializer="json")
    seen: list[str] = []

    with peers.worker("worker", "-E") as worker:
        handlers = {"task-succeeded": lambda event: seen.append(event["uuid"])}
        receiver = client.events.Receiver(client.connection(), handlers=handlers)
        thread = threading.Thread(target=lambda: receiver.capture(limit=None, timeout=60, wakeup=False), daemon=True)
        thread.start()

        def came() -> bool:
            with stranger.events.default_dispatcher() as dispatcher:
                dispatcher.send("task-succeeded", uuid="forged")
            client.send_task("protected.add", (1, 2)).get(timeout=90)
            return len(seen) > 3

        eventually(came, every=0.2, what="no event came")
        receiver.should_stop = True
        thread.join()
        worker.stop()
    assert "forged" not in seen
    client.close()
    stranger.close()


# -- keys are changed


class Load(threading.Thread):
    """Sends numbered tasks until it is stopped; each leaves its number in a file."""

    def __init__(self, app: AmqTask, path: Path) -> None:
        super().__init__(name="load")
        self.app = app
        self.sent = 0
        self._path = path
        self._is_over = threading.Event()
        # What a test changes in between two calls.
        self.lock = threading.Lock()

    def run(self) -> None:
        while not self._is_over.wait(0.01):
            with self.lock:
                self.app.send_task("protected.leave", (str(self._path), str(self.sent), 0.005))
            self.sent += 1

    def stop(self) -> None:
        self._is_over.set()
        self.join()

    def await_more(self, number: int = 30) -> None:
        """Until so many more have been sent."""
        goal = self.sent + number
        eventually(lambda: self.sent >= goal)

    @property
    def done(self) -> list[str]:
        return self._path.read_text().split() if self._path.exists() else []


def test_a_key_of_encryption_is_changed_under_load_and_nothing_is_lost(peers: Peers, tmp_path: Path) -> None:
    both = {"old": OLD, "new": NEW}
    encrypted = {"task_serializer": "encrypted", "result_serializer": "encrypted", "accept_content": ["encrypted"]}

    client = peers.client("", **encrypted, encryption_keys={"old": OLD})
    load = Load(client, tmp_path / "done")
    with ExitStack() as stack:
        workers = [stack.enter_context(_encrypting(peers, f"old{n}", encrypted, {"old": OLD})) for n in range(2)]
        load.start()
        load.await_more()
        for keys, current in ((both, "old"), (both, "new"), ({"new": NEW}, "new")):
            workers = [_replaced(stack, peers, worker, encrypted, keys, current) for worker in workers]
            with load.lock:
                client.conf.update(encryption_keys=keys, encryption_key_id=current)
            load.await_more()
            if current == "new" and keys == both:
                # The last messages of the old key are read before the old key goes.
                goal = load.sent
                eventually(lambda goal=goal: len(load.done) >= goal)  # type: ignore[misc]
        load.stop()
        eventually(lambda: len(set(load.done)) == load.sent, what=lambda: str(peers.dead(client)))
    assert peers.dead(client) == {}
    assert sorted(map(int, set(load.done))) == list(range(load.sent))
    client.close()


def _encrypting(
    peers: Peers, name: str, settings: Mapping[str, object], keys: Mapping[str, str], current: str = ""
) -> WorkerProcess:
    told = {
        "PROTECTED": json.dumps(peers.settings("", **settings, encryption_keys=keys, encryption_key_id=current or None))
    }
    return WorkerProcess(APP, "-Q", peers.queue, "-c", "1", "-n", f"{name}-{uuid.uuid4().hex[:6]}@%h", environment=told)


def _replaced(
    stack: ExitStack,
    peers: Peers,
    worker: WorkerProcess,
    settings: Mapping[str, object],
    keys: Mapping[str, str],
    current: str,
) -> WorkerProcess:
    """Another worker with these keys, before the one that is there ends."""
    another = stack.enter_context(_encrypting(peers, current, settings, keys, current))
    worker.stop()
    return another


def test_a_signers_key_is_changed_under_load_and_nothing_is_lost(peers: Peers, tmp_path: Path) -> None:
    signers = Signers(tmp_path / "signers")
    for name in ("web", "worker"):
        signers.add(name)
    places = peers.settings("")
    own = Peers(places["broker_url"], places["result_backend"], signers, peers.queue)
    client = own.client()
    load = Load(client, tmp_path / "done")

    with own.worker("worker") as worker:
        load.start()
        load.await_more()
        old = signers.certificate("web").read_bytes()
        signers.add("next")  # its certificate is known to the worker from now on
        with load.lock:
            client.setup_security(key=signers.key("next"), cert=signers.certificate("next"))
        load.await_more()
        goal = load.sent
        eventually(lambda: len(load.done) >= goal)
        signers.certificate("web").unlink()
        load.await_more()
        load.stop()
        eventually(lambda: len(set(load.done)) == load.sent, what=lambda: str(own.dead(client)))
        assert own.dead(client) == {}

        # What the old key signs after that is refused, without a restart.
        (tmp_path / "old.pem").write_bytes(old)
        client.setup_security(key=signers.key("web"), cert=tmp_path / "old.pem")

        def refused() -> bool:
            client.send_task("protected.add", (1, 2))
            return bool(own.dead(client))

        eventually(refused, every=0.5)
        worker.stop()
    assert "whose certificate is not in security_cert_store" in next(iter(own.dead(client).values()))
    client.close()


# -- hostile messages

HOSTILE = int(os.environ.get("SECURITY_HOSTILE", "80"))


def _mutated(chance: random.Random, body: bytes, others: Mapping[str, bytes]) -> tuple[bytes, str, dict[str, Any]]:
    """A signed body that is wrong somewhere, its content type and more headers."""
    fields = base64.b64decode(body).split(SEPARATOR, 4)
    place = chance.randrange(len(body))
    match chance.randrange(12):
        case 0:
            return body[:place] + bytes([chance.randrange(256)]) + body[place + 1 :], AUTH, {}
        case 1:
            return body[:place], AUTH, {}
        case 2:
            return chance.randbytes(chance.randrange(400)), AUTH, {}
        case 3:
            fields[chance.randrange(5)] = chance.choice(
                [b"", b"x" * 100_000, b"\xff\xfe", chance.randbytes(30), b"\x00\x01" * 50]
            )
        case 4:
            fields[4] = json.dumps([["/nowhere", "forged"], {}, None]).encode()
        case 5:
            fields[2] = chance.choice(
                [b"application/x-python-serialize", AUTH.encode(), b"application/x-yaml", b"", b"x" * 300]
            )
        case 6:
            fields[3] = chance.choice([b"binary", b"utf-16", b"punycode", b"", b"\xff"])
        case 7:
            chance.shuffle(fields)
        case 8:
            return others[chance.choice(sorted(others))], AUTH, {}
        case 9:
            return (
                fields[4],
                chance.choice([JSON, "application/x-yaml", "text/plain", "application/x-python-serialize", ""]),
                {},
            )
        case 10:
            return zlib.compress(body) + chance.randbytes(3), AUTH, {"compression": "application/x-gzip"}
        case _:
            return base64.b64encode(body), AUTH, {}
    return base64.b64encode(SEPARATOR.join(fields)), AUTH, {}


@pytest.mark.timeout(420)
@pytest.mark.parametrize("pool", ["prefork", "threads", "eventlet"])
def test_hostile_messages_end_with_the_dead_and_good_ones_run(
    pool: str, rabbit: Broker, redis_url: str, signers: Signers, tmp_path: Path
) -> None:
    chance = random.Random(f"{pool} 1")
    peers = Peers(rabbit.url, redis_url, signers, rabbit.queue("hostile"))
    good_path, bad_path = tmp_path / "good", tmp_path / "bad"
    value: list[Any] = [[str(bad_path), "forged"], {}, None]
    strangers = Signers(tmp_path / "strangers")
    strangers.add("web")
    client = Peers(rabbit.url, redis_url, strangers, peers.queue).client()
    others = {"unknown signer": dumps(value, "auth").body}
    client = peers.client()
    for digest in ("sha512", "sha384"):
        client.setup_security(digest=digest)
        others[digest] = dumps(value, "auth").body
    client.setup_security(serializer="pickle")
    others["pickle"] = dumps(value, "auth").body
    client.setup_security()
    body = dumps(value, "auth").body

    with peers.worker("worker", "-P", pool, "-c", "4") as worker:
        good = 0
        for number in range(HOSTILE):
            changed, mime_type, more = _mutated(chance, body, others)
            headers = {"task": "protected.leave", "id": f"hostile-{number}", "lang": "py", **more}
            properties = Properties(
                content_type=mime_type, content_encoding="utf-8", headers=headers, correlation_id=f"hostile-{number}"
            )
            client.publisher.publish(Message(changed, properties, "", peers.queue))
            if number % 4 == 0:
                client.send_task("protected.leave", (str(good_path), str(good)))
                good += 1

        def ended() -> bool:
            return good_path.exists() and len(good_path.read_text().split()) == good and rabbit.count(peers.queue) == 0

        eventually(ended, 300, every=0.5, what=lambda: worker.log[-3000:])
        assert client.send_task("protected.add", (1, 2)).get(timeout=90) == 3
        assert worker.stop() == 0
        log = worker.log
    dead = peers.dead(client)
    ran = bad_path.read_text().split() if bad_path.exists() else []
    print(f"{pool}: {HOSTILE} hostile, {len(dead)} dead-lettered, {len(ran)} that were still valid, {good} good")
    assert sorted(map(int, good_path.read_text().split())) == list(range(good))
    assert len(dead) + len(ran) == HOSTILE
    assert all(dead.values())
    assert "internal error" not in log
    assert max(map(len, log.splitlines())) < 8_192
    client.close()


# -- nothing is found


def _files_with(folder: Path, text: str) -> list[str]:
    """The files below a folder that have a text in them, as it is or in base64 (whatever comes before it), or as JSON escapes."""
    needles = [text.encode()]
    for shift in range(3):
        encoded = base64.b64encode(b"\0" * shift + text.encode())
        needles.append(encoded[4 if shift else 0 : -4])
    return [
        str(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and any(needle in path.read_bytes() for needle in needles)
    ]


@pytest.fixture(scope="module")
def node() -> Iterator[RabbitNode]:
    """A RabbitMQ whose files nobody else writes to."""
    if not rabbitmq_installed():
        pytest.skip("rabbitmq-server is not installed")
    made = RabbitNode("files")
    try:
        yield made.start()
    finally:
        made.remove()


@pytest.fixture(scope="module")
def persistent_redis() -> Iterator[RedisServer]:
    """A Redis that writes each command down."""
    server = RedisServer("--appendonly", "yes", "--appendfsync", "always")
    try:
        yield server.start()
    finally:
        server.remove()


@pytest.mark.parametrize("kind", ["rabbitmq", "redis"])
@pytest.mark.parametrize("results", ["rpc", "redis"])
def test_nothing_of_an_argument_is_in_the_brokers_files_or_in_logs(
    kind: str, results: str, node: RabbitNode, persistent_redis: RedisServer, tmp_path: Path
) -> None:
    if (kind, results) == ("redis", "rpc"):
        pytest.skip("rpc:// is RabbitMQ's")
    secret, known = f"secret-{uuid.uuid4().hex}-{'x' * 40}", f"public-{uuid.uuid4().hex}-{'x' * 40}"
    broker = node.url if kind == "rabbitmq" else persistent_redis.url
    peers = Peers(
        broker, "rpc://" if results == "rpc" else persistent_redis.url, Signers(tmp_path), f"q-{uuid.uuid4().hex[:8]}"
    )
    settings: dict[str, object] = {
        "encryption_keys": {"k": OLD}, "task_serializer": "encrypted", "result_serializer": "encrypted",
        "accept_content": ["encrypted", "json"], "result_extended": True, "task_send_sent_event": True,
    }  # fmt: skip
    client = peers.client("", **settings)
    send = client.send_task

    with peers.worker("", "-E", "--loglevel", "DEBUG", **settings) as worker:
        assert (
            chain(client.signature("protected.echo", (secret,)), client.signature("protected.echo"))
            .apply_async()
            .get(90)
            == secret
        )
        assert group([client.signature("protected.echo", (secret,))] * 2).apply_async().get(90) == [secret] * 2
        assert (
            chord([client.signature("protected.echo", (secret,))] * 2)(client.signature("protected.echo")).get(90)
            == [secret] * 2
        )
        assert send("protected.retry", (secret,), {"countdown": 0.5}).get(90) == secret
        failed = send("protected.fail", (secret,))
        with pytest.raises(ValueError, match=secret):
            failed.get(90)
        refused = send("protected.echo", (secret,), {"no such": secret})
        with pytest.raises(TypeError):
            refused.get(90)
        send("protected.echo", (known,), serializer="json")
        active = client.control.inspect(timeout=10).stats()
        assert active is not None
        send("protected.echo", (secret,), countdown=3600)
        eventually(lambda: failed.id in peers.dead(client))
        worker.stop()
        # Left in the queue, as a backup of the broker would find them.
        send("protected.echo", (secret,))
        send("protected.echo", (known,), serializer="json")
        log = worker.log
    code, shown = run_cli(
        "-A", APP, "dead", "show", failed.id, environment={"PROTECTED": json.dumps(peers.settings("", **settings))}
    )
    if kind == "rabbitmq":
        node.settle()

    assert (code, secret in shown) == (0, False), shown
    assert secret not in log
    assert "ValueError (hidden: the message is encrypted)" in log
    for folder in (node.folder, persistent_redis.folder):
        assert _files_with(folder, secret) == []
    assert _files_with(node.folder if kind == "rabbitmq" else persistent_redis.folder, known)
    client.close()
