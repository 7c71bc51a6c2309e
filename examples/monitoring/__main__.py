"""Run it: `python -m examples.monitoring` with a broker in AMQTASK_BROKER_URL (or on this machine)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from examples.monitoring.tasks import app, ship

PORT = int(os.environ.get("MONITORING_PORT", "9123"))
WORKER = ["worker", "-c", "2", "-l", "INFO", "--log-format", "json"]
PORTS = ["--metrics-port", str(PORT), "--health-port", str(PORT), "--http-host", "127.0.0.1"]
SHOWN = ("amqtask_tasks_total", "amqtask_task_queue_wait_seconds_count", "amqtask_pool_slots")


def get(path: str) -> str:
    """What Prometheus or Kubernetes would read; an empty text while nobody listens."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}{path}", timeout=60) as page:
            return str(page.read().decode())
    except urllib.error.HTTPError as error:
        return f"{error.code} {error.read().decode()}"
    except urllib.error.URLError:
        return ""


def start_worker(log: Path) -> subprocess.Popen[bytes]:
    """`amqtask -A examples.monitoring.tasks worker … --metrics-port 9123 --health-port 9123`, once it is ready."""
    command = [
        sys.executable,
        "-m",
        "amqtask",
        "-q",
        "-A",
        "examples.monitoring.tasks",
        *WORKER,
        "-f",
        str(log),
        *PORTS,
    ]
    worker = subprocess.Popen(command, start_new_session=True)
    while not get("/ready").startswith("ready"):
        if worker.poll() is not None:
            raise SystemExit(f"the worker ended early with exit code {worker.returncode}:\n{log.read_text()}")
        time.sleep(0.05)
    return worker


def show(log: Path) -> None:
    """What can be seen from outside while the worker runs."""
    print("/live:", get("/live").strip())
    print("/ready:", get("/ready").strip())
    results = [ship.delay(order) for order in (7, 13)]
    print("results:", [str(result.get(timeout=60, propagate=False)) for result in results])
    for line in get("/metrics").splitlines():
        if line.startswith(SHOWN):
            print(line)
    for entry in map(json.loads, log.read_text().splitlines()):
        if entry.get("task_id") == results[0].id and entry["logger"] != "amqtask.worker":
            print(entry["level"], entry["task_name"], entry["message"])


def main() -> int:
    """The exit code is the worker's."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "worker.log"
        worker = start_worker(log)
        try:
            show(log)
        finally:
            worker.send_signal(signal.SIGTERM)
            code = worker.wait(timeout=60)
            app.close()
    return code


if __name__ == "__main__":
    sys.exit(main())
