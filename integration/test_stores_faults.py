"""Result stores whose servers come and go: no result is lost, nobody waits for ever, and the errors say what happened."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from amqtask import AmqTask, states
from amqtask.backends.contract import BackendOptions, ResultBackend
from amqtask.backends.memcached import MemcachedBackend
from amqtask.backends.registry import open_backend
from amqtask.exceptions import BackendUnreachable, EncodeError
from amqtask.protocol.result import ResultMessage
from amqtask.testing.suites.backend import PATIENCE
from integration.conftest import Broker
from integration.faults import Forwarder
from integration.servers import MemcachedServer, PostgresServer, Sentinel, postgres_programs
from integration.waiting import PATIENT
from integration.workers import WorkerProcess, eventually


def opened(url: str, **options: Any) -> ResultBackend:
    made = open_backend(url, BackendOptions(url=url, connect_timeout=2.0, **options))
    assert made is not None
    return made


def success(value: Any = None) -> ResultMessage:
    return ResultMessage(str(uuid.uuid4()), states.SUCCESS, value)


# -- connections that end


class Cuttable:
    """A store behind a forwarder, and the same store without it."""

    def __init__(self, forwarder: Forwarder, through: str, directly: str) -> None:
        self.forwarder = forwarder
        self.store = opened(through)
        self.direct = opened(directly)


@pytest.fixture(params=["postgres", "mongodb", "memcached"])
def cuttable(request: pytest.FixtureRequest) -> Iterator[Cuttable]:
    """Each store whose client keeps connections (Redis has tests of its own)."""
    match request.param:
        case "postgres":
            url = request.getfixturevalue("postgres")
            scheme, suffix = "db+", ""
        case "mongodb":
            # The driver would ask the server for its address, and go there.
            url, scheme, suffix = request.getfixturevalue("mongodb_url"), "", "?directConnection=true"
        case _:
            url, scheme, suffix = f"memcached://{request.getfixturevalue('memcached_address')}", "cache+", ""
    with Forwarder(url) as forwarder:
        login = url.partition("://")[2].rpartition("@")[0]
        place = f"{login}@127.0.0.1:{forwarder.port}" if login else f"127.0.0.1:{forwarder.port}"
        path = url.partition("://")[2].partition("/")[2]
        kind = url.partition("://")[0]
        made = Cuttable(forwarder, f"{scheme}{kind}://{place}/{path}{suffix}", f"{scheme}{url}")
        yield made
        made.store.close()
        made.direct.close()


def test_a_connection_that_was_cut_is_made_again(cuttable: Cuttable) -> None:
    first, second = success(1), success(2)
    cuttable.store.store(first)

    cuttable.forwarder.cut()
    cuttable.store.store(second)
    cuttable.forwarder.cut()

    assert cuttable.store.wait(first.task_id, timeout=PATIENCE).result == 1
    assert cuttable.store.wait(second.task_id, timeout=PATIENCE).result == 2
    assert cuttable.forwarder.accepted > 1


def test_who_waits_is_told_though_the_connection_was_cut(cuttable: Cuttable) -> None:
    store = cuttable.store
    outcomes: dict[str, Any] = {}
    waited, called, awaited = success("waited"), success("called"), success("awaited")
    arrived = threading.Event()

    def wait() -> None:
        outcomes["waited"] = store.wait(waited.task_id, timeout=PATIENCE).result

    def await_it() -> None:
        outcomes["awaited"] = asyncio.run(store.await_result(awaited.task_id, timeout=PATIENCE)).result

    threads = [threading.Thread(target=wait), threading.Thread(target=await_it)]
    for thread in threads:
        thread.start()

    def note(result: ResultMessage) -> None:
        outcomes["called"] = result.result
        arrived.set()

    store.add_callback(called.task_id, note)
    eventually(lambda: cuttable.forwarder.accepted > 0)

    cuttable.forwarder.cut()
    for result in (waited, called, awaited):
        cuttable.direct.store(result)

    for thread in threads:
        thread.join(PATIENCE)
    assert arrived.wait(PATIENCE)
    assert outcomes == {"waited": "waited", "called": "called", "awaited": "awaited"}


# -- servers that die


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    """A server that the test may kill."""
    server = PostgresServer(postgres_programs())
    try:
        yield server.start()
    finally:
        server.remove()


@pytest.mark.parametrize("always", [True, False], ids=["always_retry", "default"])
def test_no_result_is_lost_when_the_database_is_away(
    rabbit: Broker, own_postgres: PostgresServer, tmp_path: Path, always: bool
) -> None:
    queue, backend = rabbit.queue("stored"), f"db+{own_postgres.url}"
    environment = {"STORED_BACKEND": backend, "STORED_QUEUE": queue, "STORED_ALWAYS_RETRY": "1" if always else ""}
    app = AmqTask("caller", broker=rabbit.url, backend=backend, **PATIENT)
    app.conf.result_backend_transport_options = {"retry_for": 0.5}
    leave = app.signature("stored.leave", queue=queue)
    with WorkerProcess("integration.apps.stored", "-Q", queue, "-c", "1", environment=environment) as worker:
        assert leave.clone(args=(str(tmp_path / "before"),)).apply_async().get(timeout=PATIENCE) == 1
        own_postgres.kill()
        path = tmp_path / "runs"
        result = leave.clone(args=(str(path),)).apply_async()
        said = "trying again until it does" if always else "its result could not be stored"
        eventually(lambda: said in worker.log, what=lambda: worker.log[-2000:])
        with pytest.raises(BackendUnreachable, match=f"127.0.0.1:{own_postgres.port}"):
            result.get(timeout=PATIENCE)

        own_postgres.start()

        value = result.get(timeout=90)
        worker.stop()
    app.close()
    runs = path.read_text().split()
    assert value == len(runs)
    assert len(runs) == 1 if always else len(runs) > 1


def test_results_are_kept_and_waited_for_while_sentinels_change_the_master(sentinel: Sentinel) -> None:
    # A sentinel whose machine stood still trusts nobody for 30 seconds (TILT); the default patience is no more than that.
    options = {"transport_options": (("master_name", sentinel.master_name), ("retry_for", 120.0))}
    worker, caller = opened(sentinel.url, **options), opened(sentinel.url, **options)
    before, waited, awaited = success("before"), success("waited"), success("awaited")
    worker.store(before)
    assert sentinel.master.ask("wait", "1", "90000").strip() == "1"
    outcomes: dict[str, Any] = {}

    def wait() -> None:
        outcomes["waited"] = caller.wait(waited.task_id, timeout=150).result

    def await_it() -> None:
        outcomes["awaited"] = asyncio.run(caller.await_result(awaited.task_id, timeout=150)).result

    threads = [threading.Thread(target=wait), threading.Thread(target=await_it)]
    for thread in threads:
        thread.start()

    sentinel.master.kill()
    worker.store(waited)
    worker.store(awaited)

    for thread in threads:
        thread.join(150)
    assert outcomes == {"waited": "waited", "awaited": "awaited"}
    assert "role:master" in sentinel.replica.ask("info", "replication")
    assert caller.wait(before.task_id, timeout=PATIENCE).result == "before"
    worker.close()
    caller.close()


# -- what memcached does differently


def test_a_result_that_is_too_large_for_memcached_is_an_error_of_that_task(memcached_address: str) -> None:
    store = opened(f"cache+memcached://{memcached_address}")

    with pytest.raises(EncodeError, match="too large"):
        store.store(success("x" * 2_000_000))
    store.store(success("the connection still works"))
    store.close()


def test_a_result_that_is_kept_for_longer_than_a_month_does_not_expire_at_once(memcached_address: str) -> None:
    store = opened(f"cache+memcached://{memcached_address}", expires=40 * 24 * 3600.0)
    result = success(1)

    store.store(result)

    assert store.wait(result.task_id, timeout=PATIENCE).result == 1
    store.close()


def test_memcached_keeps_a_result_for_all_of_its_time(memcached_address: str) -> None:
    store = opened(f"cache+memcached://{memcached_address}", expires=1.0)
    result = success(1)
    store.store(result)
    stored_at = time.monotonic()

    while True:
        is_there = store.find(result.task_id) is not None
        if time.monotonic() - stored_at >= 1.0:
            break
        assert is_there, f"it has gone after {time.monotonic() - stored_at:.3f} s"
    store.close()


def test_results_are_spread_over_several_memcached_servers(memcached_address: str) -> None:
    other = MemcachedServer().start()
    try:
        url = f"cache+memcached://{memcached_address};{other.address}"
        store = opened(url)
        results = [success(number) for number in range(40)]
        for result in results:
            store.store(result)

        arriving = dict(store.iter_ready([result.task_id for result in results], timeout=PATIENCE))

        assert {task_id: result.result for task_id, result in arriving.items()} == {
            result.task_id: result.result for result in results
        }
        alone = MemcachedBackend(BackendOptions(url=f"cache+memcached://{other.address}"))
        there = list(alone.read([result.task_id for result in results]))
        assert 0 < len(there) < len(results)
        other.kill()
        impatient = opened(url, transport_options=(("retry_for", 0.1),))
        with pytest.raises(BackendUnreachable, match=other.address):
            impatient.find(there[0].task_id)
        for each in (store, alone, impatient):
            each.close()
    finally:
        other.remove()
