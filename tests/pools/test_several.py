"""Several pools in one worker: what `-P` says, and the suite of all pools on two that are one."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from amqtask import AmqTask
from amqtask.assembly import build_worker
from amqtask.exceptions import ConfigurationError, LimitUnsupported, PoolNotFound
from amqtask.pool import find_pool, limits_of, share_of
from amqtask.testing.suites.pool import Bench, PoolSuite
from amqtask.testing.tasks import request
from amqtask.worker.options import WorkerOptions


class TestPreforkBesideThreads(PoolSuite):
    """All requests go to the first one, which has two slots."""

    pool_name = "prefork,threads:1=elsewhere"
    # The worker asks the members themselves for these.
    test_it_grows = test_it_shrinks_when_tasks_end = None  # type: ignore[assignment]


class TestAsyncioBesideThreads(PoolSuite):
    pool_name = "threads:1=elsewhere,asyncio"
    test_it_grows = test_it_shrinks_when_tasks_end = None  # type: ignore[assignment]


def test_what_is_said_is_what_there_is() -> None:
    pool = find_pool("prefork:4=reports+mail, asyncio:200=web , threads")

    assert pool.name == "threads+prefork+asyncio"
    shares = {queue: share_of(pool, queue) for queue in ("reports", "mail", "web", "other")}
    assert {queue: (share.pool.name, share.slots) for queue, share in shares.items()} == {
        "reports": ("prefork", 4),
        "mail": ("prefork", 4),
        "web": ("asyncio", 200),
        "other": ("threads", None),
    }
    assert limits_of(pool, is_async=False) == {"soft", "hard"}
    assert share_of(find_pool("asyncio:2=web,prefork:4=reports"), "other").pool.name == "asyncio"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prefork:0=a,threads=b", r"'prefork:0=a' is not NAME\[:SLOTS\]"),
        ("prefork:four", "'prefork:four' is not"),
        ("prefork:4=,threads=b", "'prefork:4=' is not"),
        ("prefork,", "'' is not"),
        ("prefork=a,threads=a", "a can only be of one pool"),
        ("prefork,threads", "only one pool is for all other queues"),
        ("prefork:2=a,prefork:4=b", "prefork is there twice. Give one the slots of both"),
        ("prefork,processes:4=b", "prefork is there twice"),
        ("solo,threads=a", "solo must be the only pool of a worker: it runs tasks in the thread"),
    ],
)
def test_what_cannot_be_in_one_worker_is_refused_with_the_reason(text: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        find_pool(text)


@pytest.mark.parametrize("name", ["eventlet", "gevent"])
def test_green_pools_share_a_process_with_no_other(name: str) -> None:
    command = [sys.executable, "-m", "amqtask", "worker", "-P", f"prefork,{name}:100=web"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert f"{name} must be the only pool of a worker: it patches Python in the whole process" in done.stderr


def test_an_unknown_one_is_named() -> None:
    with pytest.raises(PoolNotFound, match=r"no pool 'thread'\. Did you mean 'threads'"):
        find_pool("prefork,thread=web")


def test_a_queue_that_is_not_consumed_has_no_pool() -> None:
    app = AmqTask("tests", broker="memory://", set_as_current=False)
    options = WorkerOptions(queues=("reports",), pool="threads:2=reports,asyncio:20=web")

    with pytest.raises(ConfigurationError, match="gives a pool to web, which this worker does not consume"):
        build_worker(app, options)


def test_a_limit_that_the_pool_of_its_queue_has_not_is_refused() -> None:
    app = AmqTask("tests", broker="memory://", set_as_current=False)
    app.task(name="long", queue="web", time_limit=5)(lambda: None)
    options = WorkerOptions(queues=("reports", "web"), pool="prefork:2=reports,threads:20=web")

    with pytest.raises(
        LimitUnsupported, match="long has a hard time limit of 5 s, but the threads pool has no time limits"
    ):
        build_worker(app, options)


def test_a_limit_that_nobody_enforces_here_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(find_pool("asyncio,threads:1=web"), 1)
    with caplog.at_level(logging.WARNING, "amqtask.pools"):
        for number in (1, 2):
            bench.pool.submit(request(number, "add", 1, 1, queue="web", hard_limit=5.0))
            bench.outcome(number)
    bench.close()

    (told,) = [record.getMessage() for record in caplog.records]
    assert told == "task add came from queue web, and the threads pool has no hard time limits for it"


def test_each_one_is_shown() -> None:
    bench = Bench(find_pool("asyncio,threads:1=web+mail"), 2)
    stats = bench.pool.stats()
    bench.close()

    assert stats["max-concurrency"] == 3
    assert {name: (told["queues"], told["max-concurrency"]) for name, told in stats["pools"].items()} == {
        "asyncio": ([], 2),
        "threads": (["web", "mail"], 1),
    }
