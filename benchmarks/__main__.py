"""`make bench`: the table of costs, ours beside bare pika, Celery, Dramatiq and Taskiq, written to RESULTS.md.

    python -m benchmarks [drain] [roundtrip] [burst] [flows] [publish] [service] [boot] [flow] [history] [history-postgresql]
                         [redis-drain] [redis-green] [redis-roundtrip] [redis-flows] [redis-delayed] [--ours] [--keep]

`--ours` leaves the peers out, `--keep` puts tables measured on Redis into RESULTS.md. Ratios hold within one table on one
machine; the figures of two runs do not compare.
"""

from __future__ import annotations

import argparse
import compileall
import datetime
import os
import platform
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import pika
import redis

from benchmarks import flow, history, measure, on_redis, peers
from benchmarks.measure import ROOT, Drained
from integration.nodes import free_port

OURS = "benchmarks.apps.bench_amqtask"
BARE = "benchmarks.apps.bench_bare"
CELERY = "benchmarks.apps.bench_celery"
DRAMATIQ = "benchmarks.apps.bench_dramatiq"
TASKIQ = "benchmarks.apps.bench_taskiq"
SERVICE = "benchmarks.apps.bench_service"
COUNT = 20_000
GREEN_COUNT = 1000  # more than Celery prefetches for 100 greenlets; its green pools need ten seconds for them
OUR_POOLS = {
    "solo": ("-P", "solo"),
    "prefork": ("-P", "prefork", "-c", "2"),
    "threads": ("-P", "threads", "-c", "8"),
    "eventlet": ("-P", "eventlet", "-c", "100"),
    "gevent": ("-P", "gevent", "-c", "100"),
    "asyncio": ("-P", "asyncio", "-c", "100"),
}
LEAST = {"solo": 0.9, "prefork": 0.75, "threads": 0.65, "eventlet": 0.65, "gevent": 0.65, "asyncio": 0.65}
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
REDIS_HEADING = "## On Redis"
Row = tuple[str, ...]


def our_worker(*options: str) -> list[str]:
    """The command line of our worker."""
    return [sys.executable, "-W", "ignore", "-m", "amqtask", "-q", "-A", OURS, "worker", *options]


def celery_worker(*options: str) -> list[str]:
    """The command line of Celery's worker."""
    return [
        peers.python(),
        "-W",
        "ignore",
        "-m",
        "celery",
        "-q",
        "-A",
        CELERY,
        "worker",
        "-l",
        "ERROR",
        *options,
    ]


def forget(*queues: str) -> None:
    """Delete queues, so that nothing of another measurement is left in them."""
    connection = pika.BlockingConnection(pika.URLParameters(os.environ["AMQTASK_BROKER_URL"]))
    channel = connection.channel()
    for queue in queues:
        channel.queue_delete(queue)
    connection.close()


def await_consumer(queue: str) -> None:
    """Until somebody consumes it (RabbitMQ 3.10 closes one of two connections that declare a quorum queue in one moment)."""
    connection = pika.BlockingConnection(pika.URLParameters(os.environ["AMQTASK_BROKER_URL"]))
    deadline = time.monotonic() + 60
    while True:
        try:
            if connection.channel().queue_declare(queue, passive=True).method.consumer_count:
                connection.close()
                return
        except pika.exceptions.ChannelClosedByBroker:
            pass  # there is no such queue yet
        if time.monotonic() > deadline:
            raise TimeoutError(f"nobody consumes {queue}")
        time.sleep(0.05)


def drain_ours(pool: str, *more: str) -> Drained:
    """Fill, then drain with one of our pools (and more options)."""
    forget("bench_amqtask")
    environment = {"BENCH_ASYNC": "1"} if pool == "asyncio" else {}
    measure.client(sys.executable, OURS, "fill", COUNT, **environment)
    return measure.drain(our_worker(*OUR_POOLS[pool], *more), COUNT)


def drain_kept() -> Drained:
    """The same with task_history: events go into a stream, too."""
    forget("bench_amqtask", "bench_history")
    measure.client(sys.executable, OURS, "fill", COUNT)
    return measure.drain(our_worker(*OUR_POOLS["prefork"]), COUNT, BENCH_HISTORY="1")


def drain_bare(verb: str) -> Drained:
    """The same messages in the same kind of queue, by bare pika."""
    forget("bench_bare")
    measure.client(sys.executable, OURS, "fill", COUNT, BENCH_QUEUE="bench_bare")
    found = measure.client(sys.executable, BARE, verb, COUNT)
    return Drained(found["per_second"], found["cpu_us"], 0.0, 0.0)


def drain_celery(*options: str, count: int = COUNT // 2) -> Drained:
    """Celery's queue is classic, its acks early: its defaults."""
    forget("bench_celery")
    measure.client(peers.python(), CELERY, "fill", count)
    return measure.drain(celery_worker(*options), count)


def drain_dramatiq(processes: int, threads: int) -> Drained:
    """Dramatiq's command line."""
    forget("bench_dramatiq")
    measure.client(peers.python(), DRAMATIQ, "fill", COUNT // 2)
    command = [
        peers.python(),
        "-W",
        "ignore",
        "-m",
        "dramatiq",
        DRAMATIQ,
        "-p",
        str(processes),
        "-t",
        str(threads),
    ]
    return measure.drain(command, COUNT // 2)


def drain_taskiq(processes: int) -> Drained:
    """Taskiq's command line."""
    forget("bench_taskiq")
    measure.client(peers.python(), TASKIQ, "fill", COUNT // 2)
    command = [
        peers.python(),
        "-W",
        "ignore",
        "-m",
        "taskiq",
        "worker",
        f"{TASKIQ}:broker",
        "-w",
        str(processes),
    ]
    return measure.drain(command, COUNT // 2)


def median(run: Callable[[], Drained], times: int = 3) -> Drained:
    """The run with the median throughput."""
    return sorted((run() for _ in range(times)), key=lambda drained: drained.per_second)[times // 2]


def say(name: str, figures: str) -> None:
    """Progress, as it comes."""
    print(f"  {name:<42} {figures}", flush=True)


def drains(with_peers: bool) -> list[Row]:
    """Throughput of every system, as a ratio to the bare loop with single acks."""
    print("drain of a filled queue of no-op tasks", flush=True)
    bare = median(lambda: drain_bare("drain"))
    runs: list[tuple[str, Drained, str]] = [
        ("bare SelectConnection, single acks", bare, ""),
        ("bare SelectConnection, acks every 50", median(lambda: drain_bare("drain_multiple")), ""),
    ]
    for pool, options in OUR_POOLS.items():
        runs.append((f"amqtask {' '.join(options)}", median(lambda pool=pool: drain_ours(pool)), f"≥ {LEAST[pool]}"))  # type: ignore[misc]
        say(runs[-1][0], f"{runs[-1][1].per_second:8,.0f}/s  {runs[-1][1].per_second / bare.per_second:.2f}")
    told = median(lambda: drain_ours("prefork", "-E"))
    runs.append(("amqtask -P prefork -c 2 -E (task events)", told, "≥ 0.7 of that without -E"))
    kept = median(drain_kept)
    runs.append(("amqtask -P prefork -c 2, task_history", kept, "≤ 5 µs more than with -E"))
    if with_peers:
        runs += [
            ("Celery -P solo", drain_celery("-P", "solo"), ""),
            ("Celery -P prefork -c 2", drain_celery("-P", "prefork", "-c", "2"), ""),
            ("Celery -P threads -c 8", drain_celery("-P", "threads", "-c", "8"), ""),
            ("Celery -P eventlet -c 100", drain_celery("-P", "eventlet", "-c", "100", count=GREEN_COUNT), ""),
            ("Celery -P gevent -c 100", drain_celery("-P", "gevent", "-c", "100", count=GREEN_COUNT), ""),
            ("Dramatiq 1 process × 8 threads", drain_dramatiq(1, 8), ""),
            ("Dramatiq 2 processes × 8 threads", drain_dramatiq(2, 8), ""),
            ("Taskiq 1 process", drain_taskiq(1), ""),
            ("Taskiq 2 processes", drain_taskiq(2), ""),
        ]
    for name, run, _ in runs:
        say(name, f"{run.per_second:8,.0f}/s  {run.per_second / bare.per_second:.2f}")
    rows: list[Row] = [("drain", "tasks/s", "ratio to bare", "least", "CPU µs/task", "boot s", "PSS MB")]
    for name, run, least in runs:
        boot, memory = (f"{run.boot:.2f}", f"{run.memory_mb:.0f}") if run.boot else ("", "")
        ratio = f"{run.per_second / bare.per_second:.2f}"
        rows.append((name, f"{run.per_second:,.0f}", ratio, least, f"{run.cpu_us:.0f}", boot, memory))
    return rows


def roundtrips(with_peers: bool) -> list[Row]:
    """delay().get(), one after the other."""
    rows: list[Row] = [("round trip", "p50 ms", "p99 ms", "p50 ratio to bare, same kind of queue", "least")]
    bare: dict[str, dict[str, float]] = {}
    for kind in ("classic", "quorum"):
        forget("bench_echo")
        with measure.worker([sys.executable, "-m", BARE, "echo"], {"BENCH_QUEUE_TYPE": kind}):
            await_consumer("bench_echo")
            bare[kind] = measure.client(sys.executable, BARE, "roundtrip", 1000, BENCH_QUEUE_TYPE=kind)
    found = {f"bare SelectConnection, both ends, {kind} queue": times for kind, times in bare.items()}
    for pool in ("prefork", "solo", "threads", "eventlet"):
        forget("bench_amqtask")
        with measure.worker(our_worker(*OUR_POOLS[pool]), {"BENCH_RESULTS": "rpc://"}):
            found[f"amqtask {pool}"] = measure.client(sys.executable, OURS, "roundtrip", 1000, BENCH_RESULTS="rpc://")
    if with_peers:
        for options in (("-P", "solo"), ("-P", "prefork", "-c", "2")):
            forget("bench_celery")
            with measure.worker(celery_worker(*options), {"BENCH_RESULTS": "rpc://"}):
                found[f"Celery {' '.join(options)}"] = measure.client(
                    peers.python(), CELERY, "roundtrip", 300, BENCH_RESULTS="rpc://"
                )
    for name, times in found.items():
        say(name, f"p50 {times['p50']:.2f} ms")
        # Celery's default queue is classic, ours is a quorum queue: it is on the disk before the broker delivers it.
        kind = "classic" if "classic" in name or "Celery" in name else "quorum"
        least = "≤ 2.5, or 0.8 ms" if name == "amqtask prefork" else ""
        ratio = f"{times['p50'] / bare[kind]['p50']:.2f}"
        rows.append((name, f"{times['p50']:.2f}", f"{times['p99']:.2f}", ratio, least))
    return rows


def bursts(with_peers: bool) -> list[Row]:
    """5,000 delay(), then 5,000 get()."""
    rows: list[Row] = [("5,000 delay + get, prefork -c 2", "calls/s", "publish s", "get s")]
    found: dict[str, dict[str, float]] = {}
    for name, verb in (("in a pipeline: confirmed together", "burst_pipeline"), ("each confirmed", "burst")):
        forget("bench_amqtask")
        with measure.worker(our_worker(*OUR_POOLS["prefork"]), {"BENCH_RESULTS": "rpc://"}):
            run = measure.client(sys.executable, OURS, verb, 5000, BENCH_RESULTS="rpc://")
        found[f"amqtask, {name}"] = run
    if with_peers:
        forget("bench_celery")
        with measure.worker(celery_worker("-P", "prefork", "-c", "2"), {"BENCH_RESULTS": "rpc://"}):
            found["Celery, unconfirmed"] = measure.client(peers.python(), CELERY, "burst", 5000, BENCH_RESULTS="rpc://")
    for name, run in found.items():
        say(name, f"{run['per_second']:,.0f}/s")
        rows.append((name, f"{run['per_second']:,.0f}", f"{run['publish_seconds']:.2f}", f"{run['get_seconds']:.2f}"))
    return rows


def flows(with_peers: bool) -> list[Row]:
    """Compositions from the call to the last result, with results in the broker and in Redis."""
    rows: list[Row] = [("workflows, prefork -c 2", "store", "amqtask s", "Celery s", "ratio", "least")]
    for store, url in (("rpc", "rpc://"), ("redis", os.environ["AMQTASK_REDIS_URL"])):
        for kind, count in (("group", 10_000), ("chord", 1_000), ("chain", 100)):
            forget("bench_amqtask", "bench_celery")
            with measure.worker(our_worker(*OUR_POOLS["prefork"]), {"BENCH_RESULTS": url}):
                ours = measure.client(sys.executable, OURS, kind, count, BENCH_RESULTS=url)["seconds"]
            theirs = 0.0
            # Celery has no chords without a store that counts.
            if with_peers and (kind, store) != ("chord", "rpc"):
                with measure.worker(celery_worker("-P", "prefork", "-c", "2"), {"BENCH_RESULTS": url}):
                    theirs = measure.client(peers.python(), CELERY, kind, count, BENCH_RESULTS=url)["seconds"]
            name = f"{kind} of {count:,}"
            ratio = f"{theirs / ours:.1f}" if theirs else ""
            say(f"{name}, {store}", f"{ours:.3f} s  Celery {theirs:.3f} s  {ratio}")
            rows.append(
                (name, store, f"{ours:.3f}", f"{theirs:.3f}" if theirs else "–", ratio, "≥ 3" if theirs else "")
            )
    return rows


def publishes(with_peers: bool) -> list[Row]:
    """Messages per second from one process."""
    rows: list[Row] = [("publishing", "messages/s", "CPU µs each")]
    forget("bench_amqtask")
    found = {
        "amqtask publish_many (confirmed, pipelined)": measure.client(sys.executable, OURS, "publish_many", 20_000),
        "amqtask delay in a pipeline (confirmed together)": measure.client(sys.executable, OURS, "pipeline", 20_000),
        "amqtask delay (confirmed, one at a time)": measure.client(sys.executable, OURS, "publish", 3_000),
    }
    if with_peers:
        forget("bench_celery", "bench_dramatiq", "bench_taskiq")
        found["Celery delay (unconfirmed)"] = measure.client(peers.python(), CELERY, "publish", 10_000)
        found["Dramatiq send (unconfirmed)"] = measure.client(peers.python(), DRAMATIQ, "publish", 10_000)
        found["Taskiq kiq (confirmed)"] = measure.client(peers.python(), TASKIQ, "publish", 3_000)
    for name, run in found.items():
        say(name, f"{run['per_second']:,.0f}/s")
        rows.append((name, f"{run['per_second']:,.0f}", f"{run['cpu_us']:.0f}"))
    return rows


def services(with_peers: bool) -> list[Row]:
    """A crowd of requests to one FastAPI process; each awaits a result of one worker."""
    del with_peers  # theirs have no `await`
    rows: list[Row] = [("FastAPI, 1,000 requests at once", "requests/s", "p50 s", "p99 s", "errors")]
    forget("bench_amqtask")
    results = {"BENCH_RESULTS": "rpc://"}
    port = str(free_port())
    where = {"BENCH_URL": f"http://127.0.0.1:{port}"}
    server = [sys.executable, "-m", "uvicorn", "--log-level", "error", "--port", port, f"{SERVICE}:service"]
    with measure.worker(our_worker(*OUR_POOLS["threads"]), results), measure.worker(server, results):
        _await_port(int(port))
        found = {
            "no task": measure.client(sys.executable, SERVICE, "plain", 1000, **where),
            "each awaits a task's result": measure.client(sys.executable, SERVICE, "task", 1000, **where),
        }
    for name, run in found.items():
        say(name, f"{run['per_second']:,.0f}/s")
        seconds = (f"{run['p50']:.2f}", f"{run['p99']:.2f}")
        rows.append((name, f"{run['per_second']:,.0f}", *seconds, f"{run['errors']:.0f}"))
    return rows


def _await_port(port: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def boots(with_peers: bool) -> list[Row]:
    """From the worker's start to its first task, median of five.

    Compiled before, as pip does with every package that it installs: an editable install whose environment has
    PYTHONDONTWRITEBYTECODE would be compiled at each start."""
    for folder in ("amqtask", "pools"):
        compileall.compile_dir(ROOT / folder, quiet=1)
    rows: list[Row] = [("boot to first task", "seconds")]
    commands: list[tuple[str, str, str, list[str]]] = [
        ("amqtask -P solo", sys.executable, OURS, our_worker("-P", "solo")),
        ("amqtask -P prefork -c 2", sys.executable, OURS, our_worker("-P", "prefork", "-c", "2")),
    ]
    if with_peers:
        commands += [
            ("Celery -P solo", peers.python(), CELERY, celery_worker("-P", "solo")),
            ("Celery -P prefork -c 2", peers.python(), CELERY, celery_worker("-P", "prefork", "-c", "2")),
        ]
    for name, python, module, command in commands:
        forget("bench_amqtask", "bench_celery")
        times = []
        for _ in range(5):
            measure.client(python, module, "fill", 1)
            times.append(measure.drain(command, 1).boot)
        say(name, f"{statistics.median(times):.3f} s")
        rows.append((name, f"{statistics.median(times):.3f}"))
    return rows


def redis_drains(title: str, *pools: str) -> list[Row]:
    """Ours and Celery's on one Redis; and ours on RabbitMQ."""
    count = GREEN_COUNT if "eventlet" in pools else on_redis.CELERY_COUNT
    return on_redis.drain_rows(
        title,
        pools,
        ours=lambda pool: median(lambda: on_redis.drain_ours(pool, our_worker)),
        theirs=lambda pool: on_redis.drain_celery(pool, celery_worker, count),
        rabbit=lambda pool: median(lambda: drain_ours(pool)),
    )


PARTS: dict[str, Callable[[bool], list[Row]]] = {
    "drain": drains,
    "roundtrip": roundtrips,
    "burst": bursts,
    "flows": flows,
    "publish": publishes,
    "service": services,
    "boot": boots,
    "flow": lambda _: flow.rows(forget, median),
    "redis-drain": lambda _: redis_drains("drain on Redis", "prefork", "threads", "solo", "asyncio"),
    "redis-green": lambda _: redis_drains("drain on Redis, green pools", "eventlet", "gevent"),
    "redis-roundtrip": lambda _: on_redis.roundtrips(our_worker, celery_worker),
    "redis-flows": lambda _: on_redis.flows(our_worker, celery_worker),
    "redis-delayed": lambda _: on_redis.delayed(our_worker, celery_worker),
    "history": lambda _: history.rows("sqlite"),
    "history-postgresql": lambda _: history.rows("postgresql"),
}


def table_text(table: Sequence[Row]) -> str:
    """One table in Markdown."""
    head, *body = table
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)])


def markdown(tables: Sequence[Sequence[Row]], with_peers: bool) -> str:
    """The report, without what was measured on Redis."""
    versions = peers.versions() if with_peers else {}
    names = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [
        "# Benchmark results",
        "",
        f"{datetime.date.today().isoformat()} · Python {platform.python_version()} · {os.cpu_count()} processors · "
        f"pika {pika.__version__}{' · ' + names if names else ''}",
        "",
        "Written by `make bench`. Ratios within one run compare; figures of two runs or machines do not.",
    ]
    return "\n\n".join(["\n".join(lines), *map(table_text, tables)]) + "\n"


def redis_markdown(tables: Sequence[str]) -> str:
    """The part of the report that was measured on Redis."""
    lines = [
        REDIS_HEADING,
        "",
        f"{datetime.date.today().isoformat()} · Redis {on_redis.version()}, without persistence · redis-py {redis.__version__}. "
        "Both systems, one after the other on the same Redis; Celery has its defaults, and acknowledges before it runs a task.",
    ]
    return "\n\n".join(["\n".join(lines), *tables]) + "\n"


def keep(tables: Sequence[Sequence[Row]]) -> None:
    """Put tables measured on Redis into RESULTS.md, each in place of the one of its name."""
    main_part, _, redis_part = RESULTS.read_text().partition(REDIS_HEADING)
    kept = {text.partition(" | ")[0]: text for text in redis_part.strip().split("\n\n") if text.startswith("| ")}
    kept |= {text.partition(" | ")[0]: text for text in map(table_text, tables)}
    RESULTS.write_text(f"{main_part.rstrip()}\n\n{redis_markdown(list(kept.values()))}")


def main() -> int:
    """Measure the parts asked for (all by default) and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="what to measure [everything]")
    parser.add_argument("--ours", action="store_true", help="leave the peers out")
    parser.add_argument("--keep", action="store_true", help="put the tables of parts on Redis into RESULTS.md")
    options = parser.parse_args()
    url = os.environ["AMQTASK_BROKER_URL"]
    if url.endswith("//"):  # the default vhost as Celery spells it, which bare pika takes for an empty name
        os.environ["AMQTASK_BROKER_URL"] = f"{url[:-1]}%2F"
    with_peers = not options.ours
    # On Redis there is nothing to compare ours with but Celery.
    parts = options.parts or [part for part in PARTS if with_peers or not part.startswith("redis-")]
    tables = {part: PARTS[part](with_peers) for part in parts}
    on_redis_too = [table for part, table in tables.items() if part.startswith("redis-")]
    text = markdown([table for part, table in tables.items() if not part.startswith("redis-")], with_peers)
    print("\n" + text + "\n" + "\n\n".join(map(table_text, on_redis_too)))
    if not options.parts and with_peers:
        RESULTS.write_text(text)
    if on_redis_too and (options.keep or not options.parts):
        keep(on_redis_too)
    return 0


if __name__ == "__main__":
    sys.exit(main())
