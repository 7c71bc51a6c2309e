"""The client's side of every measurement, given a system's own calls; prints one JSON object."""

import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any


def roundtrip(call: Callable[[], Any], count: int) -> dict[str, float]:
    """`call` publishes one task and waits for its result; milliseconds."""
    for _ in range(20):
        call()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1000)
    times.sort()
    return {"p50": times[len(times) // 2], "p99": times[int(len(times) * 0.99) - 1]}


def burst(
    publish: Callable[[], Any],
    get: Callable[[Any], Any],
    count: int,
    block: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, float]:
    """`count` × publish in one `block()`, then `count` × get; whole calls per second."""
    get(publish())
    start = time.perf_counter()
    with block():
        results = [publish() for _ in range(count)]
    published = time.perf_counter()
    for result in results:
        get(result)
    end = time.perf_counter()
    return {
        "per_second": count / (end - start),
        "publish_seconds": published - start,
        "get_seconds": end - published,
    }


def publishing(publish: Callable[[int], Any], count: int) -> dict[str, float]:
    """`publish(n)` publishes n messages; messages per second and CPU microseconds each."""
    publish(100)
    start, cpu = time.perf_counter(), time.process_time()
    publish(count)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {"per_second": count / seconds, "cpu_us": cpu / count * 1e6}


def flow(call: Callable[[int], Any], count: int, times: int = 3) -> dict[str, float]:
    """`call(n)` publishes a composition of n tasks and waits for all of it; the median of some runs, in seconds."""
    call(10)
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        call(count)
        seconds.append(time.perf_counter() - start)
    return {"seconds": sorted(seconds)[len(seconds) // 2]}


def main(verbs: dict[str, Callable[[int], Any]]) -> None:
    """`python app.py VERB COUNT`."""
    verb, count = sys.argv[1], int(sys.argv[2])
    outcome = verbs[verb](count)
    if outcome is not None:
        print(json.dumps(outcome), flush=True)
