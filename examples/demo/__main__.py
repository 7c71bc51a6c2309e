"""Run the demo: `python -m examples.demo` (or `make demo`, which finds or starts a broker first)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import click

if not os.environ.get("AMQTASK_BROKER_IS_PRIVATE"):
    # Other people's messages stay where they are, and ours go where nobody else looks.
    os.environ["AMQTASK_DEMO_QUEUE"] = f"cma_queue.demo-{os.getpid()}"

from amqtask import GroupResult, group
from examples.demo import server
from examples.demo.tasks import QUEUE, app, fetch

WORKER = ["worker", "-Q", QUEUE, "-P", "eventlet", "-c", "5"]
TASKS = 300


def start_worker() -> subprocess.Popen[bytes]:
    """The line our users type."""
    print("$ amqtask -A examples.demo.tasks", *WORKER, flush=True)
    command = [
        sys.executable,
        "-W",
        "ignore::DeprecationWarning",
        "-m",
        "amqtask",
        "-A",
        "examples.demo.tasks",
        *WORKER,
    ]
    print("the worker starts …", flush=True)
    # A group of its own: Ctrl+C reaches the demo, which then stops the worker warmly.
    return subprocess.Popen(command, start_new_session=True)


def publish(base: str, worker: subprocess.Popen[bytes]) -> tuple[GroupResult, float]:
    """Publish all tasks in one pipelined burst, and wait for their results behind a progress bar."""
    started = time.perf_counter()
    result = group(fetch.s(f"{base}/{1000 + n}") for n in range(TASKS)).apply_async()
    published = time.perf_counter() - started
    print(
        f"published {TASKS} tasks to {QUEUE} in {published * 1000:.0f} ms, each confirmed by the broker",
        flush=True,
    )
    with click.progressbar(length=TASKS, label="fetching") as bar:
        while not result.ready():
            if worker.poll() is not None:
                raise SystemExit(f"the worker ended early with exit code {worker.returncode}")
            done = result.completed_count()
            bar.update(done - bar.pos)
            time.sleep(0.05)
        bar.update(TASKS - bar.pos)
    return result, time.perf_counter() - started


def report(sizes: Sequence[int], seconds: float) -> None:
    """What came back."""
    wrong = [n for n, size in enumerate(sizes) if size != 1000 + n]
    print(f"{len(sizes)} results, {sum(sizes):,} bytes fetched, {len(wrong)} wrong")
    one_by_one = TASKS * server.LATENCY
    print(f"{seconds:.2f} s, {TASKS / seconds:.0f} tasks/s with 5 greenlets (one after another: {one_by_one:.1f} s)")
    if wrong:
        raise SystemExit(1)


def clean_up() -> None:
    """Leave nothing behind on the broker."""
    with app.broker.queue_jobs() as jobs:
        for queue in (QUEUE, f"{QUEUE}.dead"):
            jobs.delete(queue)


def main() -> int:
    """The whole demo; the exit code is the worker's when it did not end warmly, 130 after Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    pages = server.start()
    worker = start_worker()
    is_interrupted = False
    try:
        result, seconds = publish(f"http://127.0.0.1:{pages.server_port}", worker)
        report(result.get(timeout=60), seconds)
    except KeyboardInterrupt:
        is_interrupted = True
        print("\ninterrupted: the worker ends what it runs …", flush=True)
    finally:
        worker.send_signal(signal.SIGTERM)
        code = worker.wait(timeout=60)
        pages.shutdown()
        clean_up()
        app.close()
    how = "finished warmly" if code == 0 else f"ended with exit code {code}"
    print(f"the worker {how}; nothing is left on the broker")
    return 130 if is_interrupted else code


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
