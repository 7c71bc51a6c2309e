"""Ours, with a queue that tenants share and two queues that share a worker. Each run notes whose it was, its begin and its wait.

BENCH_FAIR: the tenants take turns. A record is a tenant's or a queue's first letter, when the run began and when it was called.
"""

import os
import struct
import time
from functools import lru_cache

from amqtask import AmqTask

RECORD = struct.Struct("<cdd")
SHARED, WEB, REPORTS = "bench_fair", "bench_web", "bench_reports"
# Seconds of a run.
SERVED, PAGE, REPORT = 0.01, 0.01, 1.0

app = AmqTask("bench_fair", set_as_current=False)
app.conf.task_default_queue = SHARED


@lru_cache
def _file() -> int:
    return os.open(os.environ["BENCH_RUNS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def _note(who: str, called: float) -> None:
    os.write(_file(), RECORD.pack(who[:1].encode(), time.time(), called))


@app.task(name="bench.serve", ignore_result=True, fair_by="tenant" if os.environ.get("BENCH_FAIR") else None)
def serve(tenant: str) -> None:
    """A call of a tenant."""
    _note(tenant, 0.0)
    time.sleep(SERVED)


@app.task(name="bench.page", ignore_result=True, queue=WEB)
def page(called: float) -> None:
    """A short task that somebody waits for."""
    _note("web", called)
    time.sleep(PAGE)


@app.task(name="bench.report", ignore_result=True, queue=REPORTS)
def report() -> None:
    """A long one."""
    _note("reports", 0.0)
    time.sleep(REPORT)
