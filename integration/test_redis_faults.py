"""Every task runs at least once on a Redis broker, whatever breaks; and once where nothing has to run twice."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import redis
import trustme

from amqtask import AmqTask
from amqtask.exceptions import BrokerUnreachable, PublishError
from amqtask.testing.suites.transport import Listener
from amqtask.transport.broker import open_broker
from amqtask.transport.contract import BrokerOptions
from amqtask.transport.loop import PikaLoop
from amqtask.transport.redis.scripts import SWEEP
from integration.machine import free_port
from integration.redis_faults import FAULTS, MAY_LOSE, run_fault, run_long
from integration.servers import RedisServer
from integration.test_redis_worker import OnRedis
from integration.workers import WorkerProcess, eventually

NUMBERS = 200


class Trial(OnRedis):
    """Numbered tasks on a Redis that writes to its disk before it answers, and what ran."""

    def __init__(self, server: RedisServer, folder: Path) -> None:
        super().__init__(server.url)
        self.server = server
        self.journal = folder / "journal"
        self.folder = folder
        self.workers: list[WorkerProcess] = []

    def start_worker(self, *options: str) -> WorkerProcess:
        """Ready; killed at the end."""
        self.workers.append(self.worker("-c", "2", *options).start())
        return self.workers[-1]

    def publish(self, fault: Callable[[], None], *, at: int = NUMBERS // 2) -> None:
        """Call all numbers, and let the fault happen in between."""
        for number in range(NUMBERS):
            if number == at:
                fault()
            self.send("leave", str(self.journal), str(number), ignore_result=True)

    @property
    def runs(self) -> Counter[str]:
        """How often each number ran."""
        return Counter(self.journal.read_text().split()) if self.journal.exists() else Counter()

    def await_all(self) -> None:
        """Each number has run, and nothing is left."""
        eventually(lambda: len(self.runs) == NUMBERS, 150, what=lambda: f"{NUMBERS - len(self.runs)} did not run")
        eventually(lambda: not self.held and not self.client.llen(self.queue), what="something is left")


@pytest.fixture
def trial(redis_url: str, tmp_path: Path) -> Iterator[Trial]:
    server = RedisServer("--appendonly", "yes", "--appendfsync", "always")
    made = Trial(server.start(), tmp_path)
    try:
        yield made
    finally:
        for worker in made.workers:
            worker.kill()
        made.app.close()
        made.client.close()
        server.remove()


@pytest.mark.timeout(400)
@pytest.mark.parametrize("fault", [name for name in FAULTS if name not in MAY_LOSE])
def test_nothing_is_lost_and_nothing_runs_twice_without_a_reason(redis_url: str, fault: str) -> None:
    report = run_fault(fault, 150)

    assert (report.lost, report.unexplained) == ([], []), str(report)


@pytest.mark.timeout(400)
def test_a_failover_runs_nothing_twice_without_a_reason(redis_url: str) -> None:
    assert not run_fault("failover by Sentinel", 150).unexplained


def test_what_is_longer_than_a_lease_runs_once(redis_url: str) -> None:
    assert run_long(10.0, lease=3.0) == {"long": 1, "later": 1}


def test_a_worker_that_stands_still_loses_what_it_holds_and_does_no_harm(trial: Trial) -> None:
    first = trial.start_worker("--prefetch-multiplier", "4")
    started, release = trial.folder / "started", trial.folder / "release"

    def stand_still() -> None:
        trial.send("wait_for", str(started), str(release), ignore_result=True)  # so that it surely holds something
        eventually(started.exists)
        first.signal(signal.SIGSTOP)

    trial.publish(stand_still)
    release.touch()
    tags: Any = trial.client.zrange("amqtask.lease", 0, -1)
    trial.client.zadd("amqtask.lease", dict.fromkeys(tags, 1.0))  # as if it had stood for long
    trial.start_worker("-n", "second@%h")
    eventually(lambda: len(trial.runs) == NUMBERS, what=lambda: f"{NUMBERS - len(trial.runs)} did not run")
    first.signal(signal.SIGCONT)
    trial.await_all()
    assert first.stop() == 0


def test_a_redis_without_a_disk_forgets_and_the_worker_goes_on(redis_url: str, tmp_path: Path) -> None:
    server = RedisServer().start()
    trial = Trial(server, tmp_path)
    try:
        trial.start_worker()
        client = redis.Redis.from_url(server.url)
        client.set("kept", "?")
        queues = client.hgetall("amqtask.queues")
        assert queues
        server.kill()
        server.start()
        assert not client.exists("kept")
        eventually(lambda: client.hgetall("amqtask.queues") == queues)  # the worker has declared them anew
        trial.publish(lambda: None)
        trial.await_all()
    finally:
        for worker in trial.workers:
            worker.kill()
        trial.app.close()
        server.remove()


MEGABYTE = 1 << 20
ENVELOPE = b'{"body": "%s", "properties": {"body_encoding": "base64"}, "headers": {"task": "sample.add", "id": "x"}}'
HOSTILE = [
    b"",
    b"\xff\xfe",
    b"[]",
    b"null",
    b"{}",
    b"[" * 5000,
    b'{"a":' * 100_000,
    b'{"body": "W10=", "properties": {"body_encoding": "base64"}}',
    ENVELOPE % b"%%%",
    ENVELOPE % (b"[" * 100_000),
    b'{"body": "W10=", "properties": {"correlation_id": {"a": 1}}, "headers": {"task": "sample.add", "id": "x"}}',
    b'{"body": "W10=", "properties": {"priority": "high"}, "headers": {"task": "sample.add", "id": "x"}}',
    b'{"body": "W10=", "properties": [], "headers": {"task": "sample.add", "id": "x"}}',
    b'{"body": "[[1, 2], {}, {}]", "content-type": "application/json", "content-encoding": "utf-8", "properties": {},'
    b' "headers": {"task": ["sample.add"], "id": 7}}',
    b'{"body": "W10=", "properties": {}, "headers": {"x": "' + b"y" * 100_000 + b'"}}',
    b"x" * (100 * MEGABYTE),
    ENVELOPE % (b"AAAA" * (25 * MEGABYTE)),
]


@pytest.mark.timeout(400)
def test_messages_that_are_none_go_to_the_dead_letters_and_harm_no_other(trial: Trial) -> None:
    worker = trial.start_worker()
    for text in HOSTILE:
        trial.client.lpush(trial.queue, text)
        trial.send("leave", str(trial.journal), "good", ignore_result=True)

    eventually(lambda: trial.runs["good"] == len(HOSTILE), what=lambda: worker.log[-4000:])
    eventually(lambda: trial.client.llen(f"{trial.queue}.dead") == len(HOSTILE), what=lambda: worker.log[-4000:])
    assert worker.stop() == 0
    assert not trial.held
    assert "Traceback" not in worker.log
    assert all(b"x-amqtask-reason" in letter for letter in trial.client.lrange(f"{trial.queue}.dead", 0, -1))


def test_who_has_lost_a_message_leaves_the_dead_letter_to_others(trial: Trial) -> None:
    started, release = trial.folder / "started", trial.folder / "release"
    worker = trial.start_worker("-P", "threads")
    document = {
        "body": json.dumps([[str(started), str(release)], {}, {}]),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"task": "sample.reject", "id": "x"},
        "properties": {"correlation_id": "c" * 300},  # longer than AMQP takes: its dead letter is bare
    }
    trial.client.lpush(trial.queue, json.dumps(document))
    eventually(started.exists, what=lambda: worker.log[-4000:])
    tags: Any = trial.client.zrange("amqtask.lease", 0, -1)
    trial.client.zadd("amqtask.lease", dict.fromkeys(tags, 1.0))  # as if it had stood still for long
    trial.client.eval(SWEEP.source, 1, "", 100)
    eventually(lambda: trial.client.zcard("amqtask.lease") and not trial.client.llen(trial.queue))

    release.touch()
    eventually(lambda: not trial.held and trial.client.llen(f"{trial.queue}.dead"), what=lambda: worker.log[-4000:])
    assert worker.stop() == 0
    assert trial.client.llen(f"{trial.queue}.dead") == 1


def test_messages_with_the_same_tag_are_two(trial: Trial) -> None:
    app = trial.app
    trial.send("leave", str(trial.journal), "first", ignore_result=True)
    (text,) = trial.client.lrange(trial.queue, 0, -1)
    trial.client.lpush(trial.queue, text, text)
    worker = trial.start_worker()

    eventually(lambda: trial.runs["first"] == 3)
    assert worker.stop() == 0
    assert not trial.held
    assert app.conf.task_default_queue == trial.queue


@pytest.mark.parametrize("name", ["a\x06\x16b", "a\nb"])
def test_a_name_that_no_queue_can_have_is_an_error_of_the_call(trial: Trial, name: str) -> None:
    with pytest.raises(PublishError):
        trial.app.send_task("sample.leave", (), queue=name)
    assert trial.client.dbsize() == 0


# -- TLS


class TlsServer(RedisServer):
    """A Redis that takes nobody without a certificate of its authority."""

    def __init__(self, folder: Path) -> None:
        self.secure_port = free_port()
        self.certificates = folder
        authority = trustme.CA()
        authority.cert_pem.write_to_path(folder / "ca.pem")
        trustme.CA().cert_pem.write_to_path(folder / "strange.pem")
        for name in ("localhost", "client"):
            issued = authority.issue_cert(name)
            issued.private_key_pem.write_to_path(folder / f"{name}.key")
            issued.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
        super().__init__(
            "--tls-port", str(self.secure_port), "--tls-ca-cert-file", str(folder / "ca.pem"), "--tls-cert-file",
            str(folder / "localhost.pem"), "--tls-key-file", str(folder / "localhost.key"),
        )  # fmt: skip

    def secure_url(self, authority: str = "ca", client: str = "client") -> str:
        """Its URL with these certificates."""
        options = {"ssl_ca_certs": self.certificates / f"{authority}.pem", "ssl_cert_reqs": "required"}
        if client:
            options |= {
                "ssl_certfile": self.certificates / f"{client}.pem",
                "ssl_keyfile": self.certificates / f"{client}.key",
            }
        return f"rediss://localhost:{self.secure_port}/0?{urlencode(options)}"


@pytest.fixture
def tls(redis_url: str, tmp_path: Path) -> Iterator[TlsServer]:
    server = TlsServer(tmp_path)
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.mark.parametrize("pool", ["prefork", "eventlet"])
def test_tasks_and_results_go_through_tls_with_client_certificates(tls: TlsServer, pool: str) -> None:
    on_redis = OnRedis(tls.secure_url())
    with on_redis.worker("-P", pool, "-c", "2") as worker:
        assert on_redis.send("add", 2, 3).get(timeout=90) == 5
        large = "x" * 3_000_000
        assert len(on_redis.send("add", large, large).get(timeout=90)) == 6_000_000
        assert on_redis.send("add", 1, 1, countdown=1).get(timeout=90) == 2
        on_redis.client.client_kill_filter(_type="normal", skipme=True)
        assert on_redis.send("add", 3, 3).get(timeout=90) == 6
        assert worker.stop() == 0
    on_redis.app.close()
    on_redis.client.close()


def test_the_brokers_tls_is_that_of_chords_and_locks_in_its_redis(tls: TlsServer) -> None:
    use_ssl = {
        "ssl_ca_certs": str(tls.certificates / "ca.pem"),
        "ssl_certfile": str(tls.certificates / "client.pem"),
        "ssl_keyfile": str(tls.certificates / "client.key"),
    }
    url = f"redis://localhost:{tls.secure_port}/0"
    app = AmqTask("client", broker=url, broker_use_ssl=use_ssl, set_as_current=False)
    chords, locks = app.runtime.chord_store, app.runtime.flow_store
    assert chords is not None

    chords.set_chord_size("a-group", 2)
    locks.take("a-key", "an-id", 5.0)

    assert tls.ask("GET", "celery-taskset-meta-a-group.s").strip() == "2"
    locks.close()
    app.close()


@pytest.mark.parametrize(
    ("authority", "client", "words"), [("strange", "client", "CERTIFICATE_VERIFY"), ("ca", "", "Redis")]
)
def test_a_certificate_that_is_wrong_or_missing_is_an_error_that_says_so(
    tls: TlsServer, authority: str, client: str, words: str
) -> None:
    app = AmqTask("client", broker=tls.secure_url(authority, client), set_as_current=False, broker_publish_timeout=3.0)
    with pytest.raises(BrokerUnreachable, match=words):
        app.send_task("sample.add", (1, 2))
    app.close()
    loop, listener = PikaLoop(), Listener()
    broker = open_broker(BrokerOptions(tls.secure_url(authority, client)), {})
    consumer = broker.consumer(loop, listener, name="test", heartbeat=None)
    consumer.start()
    eventually(lambda: any(words in text for text in listener.warnings), sleep=loop.run_once)
    consumer.stop()
    loop.close()
