"""The short form of `make fuzz`: hostile messages to a live worker on each pool."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest

from integration.fuzz.corpus import corpus
from integration.fuzz.run import Fuzzing
from integration.nodes import RabbitNode

POOLS = ("prefork", "threads", "solo", "eventlet", "gevent", "asyncio")
SEED, MESSAGES = 7, 120


@pytest.mark.timeout(450)
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # sockets of connections that were given up
def test_on_redis_too_whatever_anybody_writes_into_a_queue(redis_url: str) -> None:
    messages = corpus(SEED, range(MESSAGES))

    with ThreadPoolExecutor(3) as threads:
        runs = [threads.submit(Fuzzing(None, pool, messages, seed=SEED).run) for pool in POOLS]
        failures = {pool: run.result().failures for pool, run in zip(POOLS, runs, strict=True)}

    gc.collect()  # here, as below
    assert failures == {pool: [] for pool in POOLS}


@pytest.mark.timeout(450)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # sockets that the broker closed
def test_whatever_arrives_only_that_message_is_affected(hurt_node: RabbitNode) -> None:
    messages = corpus(SEED, range(MESSAGES))

    # Most of a run is waiting for the broker's command line.
    with ThreadPoolExecutor(3) as threads:
        runs = [threads.submit(Fuzzing(hurt_node, pool, messages, seed=SEED).run) for pool in POOLS]
        failures = {pool: run.result().failures for pool, run in zip(POOLS, runs, strict=True)}

    gc.collect()  # here, where what is left of connections that the broker closed may complain
    assert failures == {pool: [] for pool in POOLS}
