"""Run it: `python -m examples.remote_control` with a broker in AMQTASK_BROKER_URL (or on this machine)."""

from __future__ import annotations

import signal
import subprocess
import sys
from functools import partial

from amqtask.exceptions import TaskRevokedError
from examples.remote_control.tasks import app, sleep

NODE = "example@here"
WORKER = ["worker", "-n", NODE, "-c", "2", "-P", "prefork"]


def start_worker() -> subprocess.Popen[bytes]:
    """`amqtask -A examples.remote_control.tasks worker -n example@here -c 2`; returns when it answers."""
    command = [sys.executable, "-m", "amqtask", "-q", "-A", "examples.remote_control.tasks", *WORKER, "-l", "ERROR"]
    worker = subprocess.Popen(command, start_new_session=True)
    while app.control.inspect([NODE], timeout=0.5).ping() is None:
        if worker.poll() is not None:
            raise SystemExit(f"the worker ended early with exit code {worker.returncode}")
    return worker


def ask_and_tell() -> None:
    """What a program says; on the command line it is `amqtask -A examples.remote_control.tasks inspect ping`, …"""
    inspect = app.control.inspect([NODE], timeout=60)
    print("ping:", inspect.ping())
    print("registered:", inspect.registered())

    running = sleep.delay(600)
    while not (active := inspect.active()) or not active[NODE]:
        pass  # it has not begun
    print("active:", [(task["name"], task["args"]) for task in active[NODE]])
    running.revoke(terminate=True)
    try:
        running.get(timeout=60)
    except TaskRevokedError as error:
        print("revoked:", error)

    ask = partial(app.control.broadcast, destination=[NODE], reply=True, timeout=60)
    print("before:", ask("current_prefetch_count"))
    print("our own order:", ask("increase_prefetch_count", {"n": 5}))
    print("after:", ask("current_prefetch_count"))
    print("pattern:", app.control.broadcast("ping", pattern="example@*", reply=True, limit=1, timeout=60))


def main() -> int:
    """The exit code is the worker's."""
    worker = start_worker()
    try:
        ask_and_tell()
        app.control.shutdown(destination=[NODE])
        return worker.wait(timeout=60)
    finally:
        if worker.poll() is None:
            worker.send_signal(signal.SIGTERM)
        app.control.purge()
        app.close()


if __name__ == "__main__":
    sys.exit(main())
